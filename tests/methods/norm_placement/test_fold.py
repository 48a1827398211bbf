"""Constant gains folded for export: the same function to 1e-12, in the keys of the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pl_normkit import fold_placed_gains, place_norms
from pl_normkit.errors import NothingMatchedError
from tests.methods.norm_placement.by_hand import bert, convnext, difference, doubled, gpt2, llama, output, swin, torch_encoder

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")


class OffsetNorm(nn.Module):
    """Scales by 1 + weight, as Gemma's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class OffsetBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = OffsetNorm(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x)).relu()


def offset() -> tuple[nn.Module, Any]:
    return nn.Sequential(OffsetBlock(), OffsetBlock()), torch.randn(2, 3, 8)


CASES = [(gpt2, "norm"), (gpt2, "output"), (llama, "norm"), (swin, "output"), (torch_encoder, "norm"), (offset, "norm")]


@pytest.mark.parametrize(("make", "at"), CASES, ids=[f"{make.__name__}-{at}" for make, at in CASES])
def test_the_fold_is_exact(make: Callable[[], tuple[nn.Module, Any]], at: str) -> None:
    model, inputs = doubled(*make())
    keys = set(model.state_dict())
    place_norms(model, "lns", inputs, retrain=True, at=at)
    placed = output(model, inputs)
    changes = fold_placed_gains(model)
    assert difference(output(model, inputs), placed) < 1e-12
    assert changes.skipped == []
    assert set(model.state_dict()) == keys
    assert not any(type(module).__module__.startswith("pl_normkit") for module in model.modules())
    changes.undo()
    assert torch.equal(output(model, inputs), placed)


def test_convolutions_and_what_has_no_parameters() -> None:
    model, inputs = doubled(*convnext(conv_mlp=True))
    for block in [module for module in model.modules() if type(module).__name__ == "ConvNeXtBlock"]:
        block.gamma = None  # LayerScale
    place_norms(model, "lns", inputs, retrain=True)
    placed = output(model, inputs)
    fold_placed_gains(model)
    assert difference(output(model, inputs), placed) < 1e-12

    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)
    layer.norm1, layer.norm2 = nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm(8)
    place_norms(layer, "lns", torch.zeros(5, 2, 8))
    folded = fold_placed_gains(layer)
    assert [change.module for change in folded.skipped] == ["norm1"]
    assert {change.module for change in folded.made} == {"norm2"}


def test_deepnorm_folds_into_the_keys_of_the_library() -> None:
    model, inputs = doubled(*bert())
    keys = set(model.state_dict())
    place_norms(model, "deepnorm", inputs, retrain=True)
    placed = output(model, inputs)
    assert fold_placed_gains(model).skipped == []
    assert difference(output(model, inputs), placed) < 1e-12
    assert set(model.state_dict()) == keys


def test_nothing_to_fold() -> None:
    with pytest.raises(NothingMatchedError, match="no constant gain"):
        fold_placed_gains(nn.Linear(2, 2))
