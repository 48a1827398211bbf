"""`merge_batch_norms` keeps the function at 1e-12 in float64, on real models, and leaves alone what it cannot prove."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pl_normkit.errors import NothingMatchedError
from pl_normkit.methods.norm_operators import merge_batch_norms, swap_norms
from pl_normkit.methods.norm_operators.operators.prepbn import ProgressiveBatchNorm
from tests.methods.norm_operators.tiny_models import build, difference, output, trained_like


def turned(model: nn.Module) -> nn.Module:
    """With progressive norms at the end of their schedule, whose buffers look trained."""
    swap_norms(model, "prepbn")
    trained_like(model)
    for norm in model.modules():
        if isinstance(norm, ProgressiveBatchNorm):
            norm.share.zero_()
            norm.running_mean.normal_(generator=torch.Generator().manual_seed(2))
            norm.running_var.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(3))
    return model.eval()


@pytest.mark.parametrize(
    ("name", "left"), [("vit", 0), ("deit", 0), ("timm_vit", 0), ("timm_deit", 0), ("gpt2", 1), ("gpt_neox", 1), ("dinov2", 1)]
)
def test_real_models_compute_the_same(name: str, left: int) -> None:
    """GPT-2's last norm is read by its tied head, GPT-NeoX' by a head without a bias, DINOv2's by a concatenation."""
    model, inputs = build(name)
    turned(model)
    before, state = output(model, inputs), copy.deepcopy(model.state_dict())
    changes = merge_batch_norms(model, inputs)
    assert difference(output(model, inputs), before) < 1e-12
    assert len(changes.skipped) == left == sum(isinstance(module, ProgressiveBatchNorm) for module in model.modules())
    changes.undo()
    assert torch.equal(output(model, inputs), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Shared(nn.Module):
    """One norm, run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.norm(self.a(self.norm(x))))
        return result


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2, bias=False)), "has no bias to take the shift"),
        (nn.Sequential(nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2)), "reads its output too"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "returns its output"),
        (Shared(), "it runs 2 times"),
    ],
)
def test_what_cannot_be_proved_is_left_alone(model: nn.Module, reason: str) -> None:
    turned(model)
    with pytest.raises(NothingMatchedError, match=reason):
        merge_batch_norms(model, torch.randn(3, 4, dtype=torch.float64))


def test_a_norm_that_has_not_turned_is_refused() -> None:
    model = turned(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)))
    model[0].share.fill_(0.5)
    with pytest.raises(NothingMatchedError, match=r"share of the layer norm is 0\.5"):
        merge_batch_norms(model, torch.randn(3, 4, dtype=torch.float64))
