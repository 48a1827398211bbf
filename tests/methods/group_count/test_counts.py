"""The divisor nearest to a target."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pl_normkit import num_groups
from pl_normkit.errors import ConfigError


@given(st.integers(1, 700), st.integers(1, 64))
def test_it_is_the_nearest_divisor_by_logarithms(channels: int, wanted: int) -> None:
    found = num_groups(channels, wanted)
    assert channels % found == 0
    for other in range(1, channels + 1):
        if channels % other == 0:
            nearer = abs(math.log(found / wanted)) - abs(math.log(other / wanted))
            assert nearer < 1e-9 or other == found
            assert nearer < -1e-9 or other >= found  # of two that are as near, the smaller


@pytest.mark.parametrize(
    ("channels", "target", "expected"),
    [
        (64, "32 groups", 32),
        (48, "32 groups", 24),
        (96, "16 channels per group", 6),
        (8, "16 channels per group", 1),
        (36, 6, 6),
        (8, 16, 8),
        (16, "8 channels per group", 2),
        (7, 4, 7),
        (6, "32 groups", 6),
        (1, 32, 1),
        (18, 4, 3),
        (16, 3, 4),  # by differences 2 is as near
        (34, 8, 17),  # by differences 2 is nearer
        (10, 3, 2),
        (45, "10 channels per group", 5),
    ],
)
def test_examples(channels: int, target: int | str, expected: int) -> None:
    assert num_groups(channels, target) == expected


@pytest.mark.parametrize(
    ("channels", "target"), [(0, 1), (-3, 1), (2.0, 1), (True, 1), (8, 0), (8, -1), (8, "many"), (8, "0 groups"), (8, True)]
)
def test_what_is_no_number_of_groups(channels: object, target: object) -> None:
    with pytest.raises(ConfigError):
        num_groups(channels, target)  # type: ignore[arg-type]
