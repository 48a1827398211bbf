"""From a name and an example to a call."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pl_normkit import audit_loss, bounded
from pl_normkit.errors import ConfigError, ModelSpecError
from pl_normkit.methods.nan_safety.losses.loss_call import example_arguments, read_loss_call
from pl_normkit.nn import RMSELoss, SILogLoss

LOSSES = """
import torch

def silog(pred, gt, mask):
    g = torch.log(pred[mask]) - torch.log(gt[mask])
    return 10 * torch.sqrt(torch.var(g) + 0.15 * g.mean() ** 2)

def needs_example(pair, number: int):
    return torch.sigmoid(pair["z"]).log().sum() * number["n"]

def needs_example_example():
    return {"pair": {"z": torch.zeros(3)}, "number": {"n": 2}}

class Rmse(torch.nn.Module):
    def forward(self, pred, target):
        return (pred - target).square().mean().sqrt()

broken = 3
"""


@pytest.fixture
def losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "nan_losses_fixture.py").write_text(LOSSES)
    monkeypatch.syspath_prepend(tmp_path)
    return "nan_losses_fixture"


def test_the_line_is_named(losses: str) -> None:
    found = {finding.code: finding for finding in audit_loss(f"{losses}:silog").at_least("error")}
    assert set(found) == {"NK401", "NK403", "NK404"}
    assert [Path(place.source).name for place in found["NK401"].places] == ["nan_losses_fixture.py:6"]
    assert [Path(place.source).name for place in found["NK404"].places] == ["nan_losses_fixture.py:5"]


def test_arguments_in_nests_have_names(losses: str) -> None:
    (finding,) = audit_loss(f"{losses}:needs_example").findings
    assert finding.code == "NK402"
    assert finding.witness.changed[0].startswith("pair['z'] := -200")
    assert set(finding.witness.arguments) == {"pair", "number"}


def test_classes_modules_and_functions(losses: str) -> None:
    pair = torch.rand(3, 4), torch.rand(3, 4)
    assert [finding.code for finding in audit_loss(f"{losses}:Rmse", pair).findings] == ["NK401"]
    assert audit_loss(RMSELoss(), pair).findings == []
    assert [finding.code for finding in audit_loss(lambda pred, target: (pred - target).square().mean().sqrt()).findings] == ["NK401"]


def test_the_stable_losses_stay_finite_at_every_move() -> None:
    depth = (0.5 + torch.rand(2, 1, 6, 6)).requires_grad_(), 0.5 + torch.rand(2, 1, 6, 6), torch.rand(2, 1, 6, 6) > 0.3
    for form in ("bts", "adabins"):
        for root in (False, True):
            assert audit_loss(SILogLoss(form, root=root), depth).findings == []


@pytest.mark.parametrize("spec", ["nowhere", "no_such_module:x", "{}:silgo", "{}:broken"])
def test_what_is_no_loss_is_refused(losses: str, spec: str) -> None:
    with pytest.raises(ModelSpecError):
        audit_loss(spec.format(losses))


def test_it_says_how_to_give_examples() -> None:
    with pytest.raises(ModelSpecError, match="--example"):
        audit_loss(lambda pred, target: pred["x"])
    with pytest.raises(ModelSpecError, match="no gradient"):
        audit_loss(lambda pred, target: target.sum())


@pytest.mark.parametrize(
    "world",
    [
        {"domain": {"prde": (0, 1)}},
        {"fixed": [7]},
        {"domain": {"pred": (1, 0)}},
        {"domain": {"pred": "positive"}},
        {"fixed": ["batch"]},
    ],
)
def test_a_world_that_names_nothing_is_refused(world: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        audit_loss(lambda pred, target: (pred - target).sum(), (torch.rand(3), torch.rand(3)), **world)  # type: ignore[arg-type]


def test_bounds_in_the_example() -> None:
    def loss(depth: Tensor) -> Tensor:
        return depth.log().mean()

    assert audit_loss(loss, (bounded(torch.ones(4), 0.1, 80.0),)).findings == []
    assert [finding.code for finding in audit_loss(loss, (torch.ones(4),)).findings] == ["NK404"]
    with pytest.raises(ConfigError):
        bounded(torch.ones(4), 2, 1)


def test_generated_arguments() -> None:
    def loss(pred: Tensor, gt: Tensor, valid_mask: Tensor, weight: float = 1.0) -> Tensor:
        return pred

    pred, gt, mask = example_arguments(loss)
    assert (pred.requires_grad, gt.requires_grad, mask.dtype) == (True, False, torch.bool)
    assert float(pred.detach().min()) >= 0.05
    assert float(pred.detach().max()) <= 0.95
    assert math.prod(mask.shape) == 128


def test_parameters_of_the_loss_count() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.0))

        def forward(self, x: Tensor) -> Tensor:
            return (self.scale.abs().sqrt() * x).sum()

    (finding,) = audit_loss(Learned(), (torch.rand(3),)).findings
    assert (finding.code, finding.witness.changed) == ("NK401", ())


def test_a_call_is_the_same_each_time() -> None:
    call = read_loss_call(lambda x: (x + torch.rand(3)).mean(), (torch.rand(3),))
    assert torch.equal(call.value(call.example)[0], call.value(call.example)[0])
