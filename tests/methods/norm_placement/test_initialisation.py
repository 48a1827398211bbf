"""DeepNorm's constants, with what public codes have otherwise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pl_normkit import deepnorm_constants

COUNTS = st.integers(1, 1000)


def test_the_table() -> None:
    (alpha, beta), _ = deepnorm_constants(12, 0)
    assert (alpha, beta) == pytest.approx(((2 * 12) ** (1 / 4), (8 * 12) ** (-1 / 4)))
    assert deepnorm_constants(0, 12)[1] == (alpha, beta)
    (enc_alpha, enc_beta), (dec_alpha, dec_beta) = deepnorm_constants(6, 4)
    assert (enc_alpha, enc_beta) == pytest.approx((0.81 * (6**4 * 4) ** (1 / 16), 0.87 * (6**4 * 4) ** (-1 / 16)))
    assert (dec_alpha, dec_beta) == pytest.approx(((3 * 4) ** (1 / 4), (12 * 4) ** (-1 / 4)))


def test_no_constant_of_a_public_code_that_differs() -> None:
    """Beta 3.13 at 12 layers has its exponent inverted; alpha 2.828 holds for 32 layers alone; 1.15 is the reciprocal of 0.87."""
    (alpha, beta), _ = deepnorm_constants(12, 0)
    assert beta == pytest.approx(1 / 3.13, rel=1e-3)
    assert alpha != pytest.approx(2.828, rel=0.1)
    assert deepnorm_constants(32, 0)[0][0] == pytest.approx(2.828, rel=1e-3)
    assert deepnorm_constants(1, 1)[0][1] == pytest.approx(1 / 1.15, rel=1e-3)


@given(COUNTS, COUNTS)
def test_depth_amplifies_the_shortcut_and_shrinks_the_weights(encoder: int, decoder: int) -> None:
    shallow, deep = deepnorm_constants(encoder, decoder), deepnorm_constants(encoder + 1, decoder + 1)
    for (alpha, beta), (deep_alpha, deep_beta) in zip(shallow, deep, strict=True):
        assert deep_alpha > alpha
        assert deep_beta < beta
