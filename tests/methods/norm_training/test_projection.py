"""`WeightProjection` keeps lengths and the function, takes the weights that are invariant, and names the others."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from pl_normkit.errors import DataError, NothingMatchedError
from pl_normkit.methods.norm_training import WeightProjection
from tests.methods.norm_operators.tiny_models import difference, trained_like


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """Each kind of norm behind a layer, and layers that must be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-12)
        self.second, self.group = nn.Conv2d(4, 4, 1, bias=False), nn.GroupNorm(2, 4, eps=1e-12)
        self.up, self.norm = nn.Linear(4, 6), nn.LayerNorm(6, eps=1e-12)
        self.branch, self.last, self.head = nn.Linear(6, 6), nn.RMSNorm(6, eps=1e-12), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.batch(self.conv(x)))
        x = self.group(self.second(x)).mean((2, 3))
        x = torch.relu(self.norm(self.up(x)))
        result: Tensor = self.head(self.last(x + self.branch(x)))
        return result


@pytest.mark.parametrize("training", [True, False])
def test_any_change_of_length_is_taken_back_and_changes_nothing(training: bool) -> None:
    model, x = trained_like(Net()), random(5, 3, 6, 6)
    projection = WeightProjection(model, x)
    assert set(projection.lengths) == {"conv.weight", "second.weight", "up.weight"}
    assert {change.module: change.what for change in projection.skipped} == dict.fromkeys(
        ("branch", "head"), "more than norms read its output"
    )
    model.train()(x)  # running statistics that are not those of the start
    with torch.no_grad():
        for name in projection.lengths:
            parameter = model.get_parameter(name)
            parameter.add_(random(*parameter.shape, seed=3))
    lengths = {name: model.get_parameter(name).norm().item() for name in projection.lengths}
    assert projection.growth() == pytest.approx({name: lengths[name] / projection.lengths[name] for name in lengths})
    twin = copy.deepcopy(model).train(training)
    projection.project()
    assert projection.growth() == pytest.approx(dict.fromkeys(lengths, 1.0))
    assert difference(model.train(training)(x), twin(x)) < 1e-9


def test_the_step_of_a_projected_weight_turns_it_as_far_as_at_the_start() -> None:
    """Under SGD a weight twice as long is turned a quarter as far: what the projection takes away."""
    turned = {}
    for factor in (1.0, 2.0):
        torch.manual_seed(0)
        model, x = trained_like(nn.Sequential(nn.Linear(3, 5, bias=False), nn.LayerNorm(5, eps=1e-12), nn.Linear(5, 1))), random(7, 3)
        projection = WeightProjection(model, x)
        weight = model[0].weight
        with torch.no_grad():
            weight.mul_(factor)
        for name in ("free", "projected"):
            before = weight.detach().clone()
            model.zero_grad()
            model(x).square().mean().backward()
            with torch.no_grad():
                moved = weight - 1e-6 * weight.grad
            turned[factor, name] = (moved / moved.norm() - before / before.norm()).norm().item()
            projection.project()
    assert turned[2.0, "free"] / turned[1.0, "free"] == pytest.approx(0.25, rel=1e-3)
    assert turned[2.0, "projected"] / turned[1.0, "projected"] == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("model", "count", "left"),
    [
        (torchvision.models.resnet18(num_classes=3), 20, ["fc"]),
        (timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=3), 5, None),
        (timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, num_heads=2, depth=1, qk_norm=True), 0, None),
    ],
    ids=["resnet18", "convnext", "vit"],
)
def test_real_models(model: nn.Module, count: int, left: list[str] | None) -> None:
    """In a pre-norm transformer no weight is in front of a norm alone, but q and k of a packed layer, which v is not."""
    x = torch.randn(2, 3, 32, 32)
    if not count:
        with pytest.raises(NothingMatchedError, match="more than norms read its output"):
            WeightProjection(model, x)
        return
    projection = WeightProjection(model, x)
    assert len(projection.lengths) == count
    if left is not None:
        assert [change.module for change in projection.skipped] == left


def test_tied_and_reparametrized_weights_are_left_alone() -> None:
    layer = nn.Linear(4, 4)
    twice = nn.Sequential(layer, nn.LayerNorm(4), layer, nn.ReLU())
    with pytest.raises(NothingMatchedError, match="more than norms"):
        WeightProjection(twice, torch.randn(2, 4))
    tied = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    with pytest.raises(NothingMatchedError, match="read elsewhere too"):
        WeightProjection(tied, torch.randn(2, 4))
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.LayerNorm(4), nn.Linear(4, 1))
    with pytest.raises(NothingMatchedError, match="not known as a layer with one weight of its own"):
        WeightProjection(normed, torch.randn(2, 4))


def test_lengths_come_back_from_a_checkpoint_and_broken_weights_stay() -> None:
    model, x = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 1)), torch.randn(3, 2)
    lengths = WeightProjection(model, x).state_dict()
    with torch.no_grad():
        model[0].weight.mul_(3)
    later = WeightProjection(model, x)
    later.load_state_dict(lengths)
    assert later.growth() == pytest.approx({"0.weight": 3.0})
    with torch.no_grad():
        model[0].weight.zero_()
    later.project()
    assert not model[0].weight.any()
    with pytest.raises(DataError, match="other weights"):
        later.load_state_dict({"1.weight": 1.0})
