"""The formula against brute force, its limits, its gradients, and what the module refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pl_normkit.errors import ConfigError, NormkitWarning
from pl_normkit.methods.gaussian_bias import gaussian_bias
from pl_normkit.nn import GaussianAttentionBias


def brute_force(rows: int, columns: int, prefix: int, amplitude: float, sigma: float) -> Tensor:
    """The formula of the authors' code, pair by pair."""
    length = prefix + rows * columns
    bias = torch.zeros(length, length, dtype=torch.float64)
    for i in range(rows * columns):
        for j in range(rows * columns):
            distance2 = (i // columns - j // columns) ** 2 + (i % columns - j % columns) ** 2
            bias[prefix + i, prefix + j] = amplitude**2 * math.exp(-distance2 / (2 * sigma**2))
    return bias


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    prefix=st.integers(0, 5),
    pairs=st.lists(st.tuples(st.floats(-3, 3), st.floats(0.3, 20)), min_size=1, max_size=3),
)
def test_every_pair_of_tokens_has_the_value_of_the_formula(rows: int, columns: int, prefix: int, pairs: list[tuple[float, float]]) -> None:
    amplitude, sigma = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
    expected = torch.stack([brute_force(rows, columns, prefix, *pair) for pair in pairs])
    torch.testing.assert_close(gaussian_bias((rows, columns), amplitude, sigma, prefix), expected, rtol=2e-4, atol=1e-12)


def test_the_numbers_at_the_start_are_those_of_the_paper_s_defaults() -> None:
    """14 x 14 patches, a = 1, sigma = 5: 1 on the diagonal, .607 at distance 5, .14 to .034 far away."""
    bias = GaussianAttentionBias((14, 14))()
    assert bias.shape == (1, 196, 196)
    assert torch.equal(bias[0].diagonal(), torch.ones(196))
    assert bias[0, 0, 5].item() == pytest.approx(0.6065, abs=1e-4)
    assert bias[0, 90, 195].item() == pytest.approx(math.exp(-(7**2 + 7**2) / 50), abs=1e-4)  # from the centre to a corner


def test_the_row_and_column_of_a_prefix_token_are_zero() -> None:
    bias = GaussianAttentionBias((2, 3), num_heads=4, num_prefix_tokens=5)()
    assert bias.shape == (4, 11, 11)
    assert (bias[:, :5].abs().sum() + bias[:, :, :5].abs().sum()).item() == 0
    assert bool((bias[:, 5:, 5:] > 0).all())


def test_the_sign_of_the_amplitude_has_no_effect() -> None:
    assert torch.equal(GaussianAttentionBias((3, 4), amplitude=-2)(), GaussianAttentionBias((3, 4), amplitude=2)())


def test_gradients_are_those_of_the_formula() -> None:
    amplitude, sigma = (torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in ([1.5, -0.4], [2.0, 0.7]))
    assert torch.autograd.gradcheck(lambda a, s: gaussian_bias((2, 3), a, s, 1), (amplitude, sigma))


def test_sigma_at_zero_gives_numbers() -> None:
    module = GaussianAttentionBias((3, 2), amplitude=2.0)
    with torch.no_grad():
        module.sigma.zero_()
    bias = module()
    bias.sum().backward()
    assert torch.equal(bias[0], 4 * torch.eye(6))
    assert [bool(p.grad.isfinite().all()) for p in module.parameters()] == [True, True]


def test_half_types_are_computed_in_float32() -> None:
    half = GaussianAttentionBias((14, 14), sigma=3.0, dtype=torch.bfloat16)
    assert torch.equal(half(), GaussianAttentionBias((14, 14), sigma=3.0)())


def test_the_grid_may_change() -> None:
    module = GaussianAttentionBias(4, num_prefix_tokens=1)
    assert (module.grid_size, module().shape, module((2, 3)).shape) == ((4, 4), (1, 17, 17), (1, 7, 7))
    module.set_grid_size((2, 5))
    assert (module().shape, module.bias_for(11).shape) == ((1, 11, 11), (1, 11, 11))
    assert list(module.state_dict()) == ["amplitude", "sigma"]


def test_tokens_that_do_not_fit_the_grid_are_refused() -> None:
    with pytest.raises(ConfigError, match="17 tokens do not fit a grid of 4 x 4 patches and 2 prefix tokens"):
        GaussianAttentionBias(4, num_prefix_tokens=2).bias_for(17)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amplitude": 0}, "other than 0"),
        ({"amplitude": float("nan")}, "nan"),
        ({"amplitude": True}, "True"),
        ({"sigma": -1.0}, "positive"),
        ({"sigma": 0}, "positive"),
        ({"sigma": float("inf")}, "positive"),
        ({"grid_size": (4, 0)}, "grid_size"),
        ({"grid_size": (4,)}, "grid_size"),
        ({"grid_size": (4, 4, 4)}, "grid_size"),
        ({"grid_size": 3.0}, "grid_size"),
        ({"grid_size": "14"}, "grid_size"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_prefix_tokens": -1}, "num_prefix_tokens"),
    ],
)
def test_what_is_out_of_range_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GaussianAttentionBias(**{"grid_size": (4, 4), **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(("amplitude", "sigma", "warns"), [(3, 2, True), (-4, 1, True), (3, 2.5, False), (2.9, 1, False)])
def test_a_start_that_collapses_the_softmax_is_warned_of(amplitude: float, sigma: float, warns: bool) -> None:
    if warns:
        with pytest.warns(NormkitWarning, match="its own neighbours"):
            GaussianAttentionBias(4, amplitude=amplitude, sigma=sigma)
    else:
        GaussianAttentionBias(4, amplitude=amplitude, sigma=sigma)


def test_it_survives_the_meta_device() -> None:
    module = GaussianAttentionBias((2, 3), num_heads=2, amplitude=1.5, sigma=2.5, device="meta")
    assert module().shape == (2, 6, 6)
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    assert torch.equal(module(), GaussianAttentionBias((2, 3), num_heads=2, amplitude=1.5, sigma=2.5)())


def test_weights_from_before_load_strictly_and_leave_it_as_it_is() -> None:
    module = GaussianAttentionBias(3, amplitude=1.5)
    module.load_state_dict({}, strict=True)
    assert module.amplitude.item() == 1.5
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({"amplitude": torch.ones(1)})
    other = GaussianAttentionBias(3, amplitude=2.5, sigma=7)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(), other())


def test_a_copy_has_parameters_of_its_own() -> None:
    module = GaussianAttentionBias(3)
    copied = copy.deepcopy(module)
    with torch.no_grad():
        copied.amplitude.fill_(2.0)
    assert torch.equal(copied(), 4 * module())
