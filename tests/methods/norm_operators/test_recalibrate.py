"""`recalibrate_batch_norm` against statistics of all elements at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, DataError, NothingMatchedError
from pl_normkit.methods.norm_operators import recalibrate_batch_norm


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)]
    return nn.Sequential(*layers).double()


def batches(sizes: tuple[int, ...] = (4, 4, 1, 3)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, 2, 7, 6, generator=generator, dtype=torch.float64) * 2 + 1 for size in sizes]


def brute_force(model: nn.Sequential, data: list[Tensor]) -> dict[str, Tensor]:
    """Each layer by hand: normalized by its own batch, dropout left out, statistics of all values that ever reached a norm."""
    seen: dict[str, list[Tensor]] = {"1": [], "5": []}
    for x in data:
        x = model[0](x)
        seen["1"].append(x)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
        x = (x - mean) / (var + model[1].eps).sqrt() * model[1].weight.view(1, -1, 1, 1) + model[1].bias.view(1, -1, 1, 1)
        seen["5"].append(model[4](x.clamp(min=0)))
    expected = {}
    for path, values in seen.items():
        rows = torch.cat([value.transpose(0, 1).flatten(1) for value in values], 1)
        expected |= {f"{path}.running_mean": rows.mean(1).detach(), f"{path}.running_var": rows.var(1).detach()}
    return expected


@pytest.mark.parametrize("source_weight", [0.0, 0.25, 1.0])
def test_statistics_equal_brute_force(source_weight: float) -> None:
    model, data = net().train(), batches()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    measured = brute_force(net(), data)
    changes = recalibrate_batch_norm(model, [(x, "target") for x in data], source_weight=source_weight)
    expected = {name: source_weight * before[name] + (1 - source_weight) * value for name, value in measured.items()}
    after = model.state_dict()
    torch.testing.assert_close({name: after[name] for name in expected}, expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(after[name], before[name]) for name in before if name not in expected)
    assert model[2].training
    assert torch.equal(torch.get_rng_state(), rng)
    changes.undo()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_modes_of_layers_stay() -> None:
    model = net().train()
    model[1].eval()
    recalibrate_batch_norm(model, batches())
    assert [module.training for module in model] == [True, False, True, True, True, True]


def test_evaluation_on_the_only_batch_equals_training_on_it() -> None:
    """But for the variance, which training divides by n and the buffer by n - 1."""
    torch.manual_seed(0)
    model, x = timm.create_model("resnet10t", num_classes=3).double(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    trained = model.train()(x).detach()
    changes = recalibrate_batch_norm(model, [x])
    for change in changes.made:
        count = int(change.what.split()[3])
        model.get_submodule(change.module).running_var.mul_((count - 1) / count)
    torch.testing.assert_close(model.eval()(x).detach(), trained, rtol=1e-10, atol=1e-10)


def test_a_shared_norm_is_measured_over_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1, affine=False).double()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            result: Tensor = self.norm(a) + self.norm(b)
            return result

    model = Twice()
    a, b = torch.tensor([[0.0], [2.0]]).double(), torch.tensor([[4.0], [10.0]]).double()
    recalibrate_batch_norm(model, [{"a": a, "b": b}])
    joined = torch.cat([a, b])
    assert (model.norm.running_mean.item(), model.norm.running_var.item()) == pytest.approx((joined.mean().item(), joined.var().item()))


def test_large_offsets_do_not_cancel() -> None:
    """A sum of squares minus a square would lose the variance."""
    norm = nn.BatchNorm1d(1).double()
    x = torch.randn(1000, 1, dtype=torch.float64) + 1e8
    recalibrate_batch_norm(norm, list(x.split(100)))
    assert norm.running_var.item() == pytest.approx(x.var().item(), rel=1e-6)


def test_the_filter_and_norms_without_statistics() -> None:
    model = net()
    model.append(nn.BatchNorm2d(5, track_running_stats=False).double())
    before = copy.deepcopy(model.state_dict())
    changes = recalibrate_batch_norm(model, batches(), filter_fn=lambda _, path: path != "1")
    assert [change.module for change in changes.made] == ["5"]
    assert {change.module: change.what for change in changes.skipped} == {
        "1": "not chosen by the filter",
        "6": "it keeps no running statistics",
    }
    assert torch.equal(model.state_dict()["1.running_mean"], before["1.running_mean"])


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ([], {}, DataError, "the loader is empty"),
        (batches(), {"max_batches": 0}, DataError, "the loader is empty"),
        ([batches()[0] * float("nan")], {}, DataError, "not finite"),
        (batches(), {"source_weight": -0.1}, ConfigError, r"outside \[0, 1\]"),
        (batches(), {"source_weight": float("nan")}, ConfigError, r"outside \[0, 1\]"),
        (batches(), {"filter_fn": lambda *_: False}, NothingMatchedError, "no batch norm keeps running statistics"),
    ],
)
def test_bad_input_changes_nothing(data: list[Tensor], options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        recalibrate_batch_norm(model, data, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
