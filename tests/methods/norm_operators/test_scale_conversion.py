"""`to_scalenorm`: the same function with one number a norm, and a reason wherever no ScaleNorm can compute what the norm does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pl_normkit.errors import NothingMatchedError
from pl_normkit.methods.norm_operators import fold_norms, swap_norms, to_rmsnorm, to_scalenorm
from pl_normkit.methods.norm_operators.operators.scalenorm import ScaleNorm
from tests.methods.norm_operators.tiny_models import build, difference, output, timm_vit, trained_like

LAYER = "it is a layer norm, and takes the mean away: turn it by to_rmsnorm first"


@pytest.mark.parametrize(
    ("name", "turned", "kept"),
    [
        ("gpt2", 4, {"transformer.ln_f": "transformer.wte.weight is tied: transformer.wte reads it too"}),
        ("llama", 5, {}),
        ("timm_vit_average", 5, {f"blocks.{i}.attn.{x}_norm": LAYER for i in (0, 1) for x in "qk"}),
    ],
)
def test_real_models_keep_their_function(name: str, turned: int, kept: dict[str, str]) -> None:
    model, inputs = build(name)
    if name == "llama":
        swap_norms(model, "rmsnorm")  # the same norm in the model's own precision: Llama's rounds to float32
    else:
        to_rmsnorm(model, inputs)
    before, values = output(model, inputs), copy.deepcopy(model.state_dict())
    changes = to_scalenorm(model, inputs)
    assert {change.module: change.what for change in changes.skipped} == kept
    assert sum(isinstance(module, ScaleNorm) for module in model.modules()) == turned
    assert difference(output(model, inputs), before) < 1e-12
    assert difference(output(copy.deepcopy(model), inputs), before) < 1e-12
    changes.undo()
    assert torch.equal(output(model, inputs), before)
    assert set(model.state_dict()) == set(values)
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


def test_norms_that_round_to_float32_are_kept_to_its_rounding() -> None:
    model, inputs = build("llama")
    before = output(model, inputs)
    to_scalenorm(model, inputs)
    assert 1e-12 < difference(output(model, inputs), before) < 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_lower_precision_stays_within_rounding(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    model, x = trained_like(timm_vit()).to(dtype), torch.randn(2, 3, 16, 16).to(dtype)
    before = output(model, x)
    to_rmsnorm(model, x)
    to_scalenorm(model, x)
    assert difference(output(model, x), before) < bound


def test_small_rows_keep_what_eps_does_to_them() -> None:
    """The published clamp would not: rows far below eps come out of it as long as all others."""
    model = trained_like(nn.Sequential(nn.RMSNorm(6, eps=1e-2), nn.Linear(6, 3)))
    x = torch.randn(4, 6, dtype=torch.float64) * torch.tensor([[1e-4], [1e-2], [1.0], [1e3]]).double()
    before = model(x)
    to_scalenorm(model, x)
    assert difference(model(x), before) < 1e-12
    swapped = trained_like(nn.Sequential(nn.RMSNorm(6, eps=1e-2), nn.Linear(6, 3)))
    fold_norms(swapped, x)
    swap_norms(swapped, "scalenorm")
    assert difference(swapped(x), before) > 0.1


class Read(nn.Module):
    """An RMS norm whose output an activation reads: its scale cannot go into a layer."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.head = norm, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.norm(x)))
        return result


def test_one_scale_for_all_channels_goes_into_g() -> None:
    model, x = Read(nn.RMSNorm(6, eps=1e-6)).double(), torch.randn(4, 6, dtype=torch.float64)
    with torch.no_grad():
        model.norm.weight.fill_(3.0)
    before = model(x)
    to_scalenorm(model, x)
    assert model.norm.g.item() == pytest.approx(3 * 6**0.5, rel=1e-12)
    assert difference(model(x), before) < 1e-12


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Read(nn.RMSNorm(6)), "relu of the model reads its output too"),
        (nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2)), "turn it by to_rmsnorm first"),
        (nn.Sequential(nn.RMSNorm((2, 6)), nn.Linear(6, 2)), "it normalizes several dimensions"),
    ],
)
def test_what_cannot_be_turned_is_left_alone(model: nn.Module, reason: str) -> None:
    trained_like(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NothingMatchedError, match=reason):
        to_scalenorm(model, torch.randn(3, 2, 6, dtype=torch.float64))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_filter_chooses() -> None:
    model, inputs = build("llama")
    changes = to_scalenorm(model, inputs, filter_fn=lambda _, path: path == "model.norm")
    assert {change.module for change in changes.made} == {"model.norm"}
