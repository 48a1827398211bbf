"""The first tensor that was not finite is named, and nothing else is blamed for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pl_normkit.errors import DataError
from pl_normkit.methods.nan_safety.diagnosis.first_bad import Diagnosis, diagnose
from pl_normkit.methods.nan_safety.diagnosis.replay import RandomState, replay, save_replay


class Net(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.head = nn.Linear(4, 1)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.encoder(x)))


def found(act: Callable[[Tensor], Tensor], x: Tensor | None = None, loss: Callable[[Tensor], Tensor] = Tensor.mean) -> Diagnosis:
    net = Net(act)
    batch = {"image": torch.ones(2, 4) if x is None else x}
    return diagnose(lambda: loss(net(batch["image"])), net, batch)[0]


class CustomLog(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 0).log()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def overwrite(h: Tensor) -> Tensor:
    h = h.clone()
    h[0, 0] = math.inf
    return h * 2


def masked(h: Tensor) -> Tensor:
    scores = h.masked_fill(torch.tensor([[True, False, False, False]]), -math.inf)
    return (scores + 1.0).softmax(1) * (h * 0 - 1).sqrt()


@pytest.mark.parametrize(
    ("act", "op"),
    [
        (lambda h: (h * 0).log(), "torch.Tensor.log"),
        (lambda h: (h + 100).exp() / (h + 100).exp(), "torch.Tensor.exp"),
        (lambda h: (h * 0 - 1).sqrt() * 0 + 1, "torch.Tensor.sqrt"),
        (lambda h: F.softmax(h * 0 - math.inf, dim=1), "torch.Tensor.sub"),
        (lambda h: F.softmax(h.masked_fill(torch.ones(2, 4, dtype=torch.bool), -math.inf), dim=1), "torch.nn.functional.softmax"),
        (masked, "torch.Tensor.sqrt"),
        (overwrite, "torch.Tensor.__setitem__"),
        (CustomLog.apply, "torch.Tensor.log"),
        (lambda h: (h + 1).mul_(3e38).mul_(10.0).add_(1.0), "torch.Tensor.mul_"),
    ],
)
def test_the_operation_is_named(act: Callable[[Tensor], Tensor], op: str) -> None:
    diagnosis = found(act)
    assert (diagnosis.kind, diagnosis.op, diagnosis.module) == ("forward", op, "")
    assert "test_first_bad.py:" in diagnosis.source


def test_the_module_is_named() -> None:
    net = Net()
    net.encoder.register_forward_hook(lambda module, args, output: output / 0)
    diagnosis, _ = diagnose(lambda: net(torch.ones(2, 4)).mean(), net, None)
    assert (diagnosis.kind, diagnosis.op) == ("forward", "torch.Tensor.div")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_batch_is_named(value: float) -> None:
    x = torch.ones(2, 4)
    x[1, 2] = value
    diagnosis = found(torch.tanh, x, lambda out: (out - out.detach() + torch.tensor(value)).mean() if math.isinf(value) else out.mean())
    if math.isnan(value):
        assert (diagnosis.kind, diagnosis.module, diagnosis.inputs[0]["nan"]) == ("batch", "batch['image']", 1)
    assert diagnosis.kind in ("batch", "forward")


def test_nan_in_the_batch_that_is_masked_out_is_not_blamed() -> None:
    x = torch.ones(2, 4)
    x[0, 0] = math.nan
    net = Net()
    diagnosis, _ = diagnose(lambda: net(torch.nan_to_num(x)).mean().sub(1e9).log(), net, {"x": x})
    assert (diagnosis.kind, diagnosis.op) == ("forward", "torch.Tensor.log")


def test_a_bad_parameter_is_named() -> None:
    net = Net()
    with torch.no_grad():
        net.head.weight[0, 1] = math.nan
    diagnosis, _ = diagnose(lambda: net(torch.ones(2, 4)).mean(), net, None)
    assert (diagnosis.kind, diagnosis.module) == ("parameter", "head.weight")


def test_a_bad_backward_is_named() -> None:
    diagnosis = found(lambda h: (h * 0).sqrt())
    assert (diagnosis.kind, diagnosis.op) == ("backward", "torch.Tensor.sqrt")


def test_a_gradient_spoiled_by_a_hook_is_named() -> None:
    net = Net()
    net.head.weight.register_hook(lambda gradient: gradient * math.nan)
    diagnosis, _ = diagnose(lambda: net(torch.ones(2, 4)).mean(), net, None)
    assert (diagnosis.kind, diagnosis.module) == ("gradient", "head.weight")


def test_a_finite_step_is_unknown_and_nothing_is_left_behind() -> None:
    net = nn.Sequential(Net(), nn.BatchNorm1d(1), nn.Dropout(0.5))
    net[0].head.weight.grad = torch.full((1, 4), 7.0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    diagnosis, record = diagnose(lambda: net(torch.randn(3, 4)).mean(), net, None)
    assert (diagnosis.kind, record) == ("unknown", None)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(net[0].head.weight.grad, torch.full((1, 4), 7.0))
    assert net[0].encoder[0].weight.grad is None


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (lambda h: (h * 0).log(), "forward"),
        (lambda h: (h * 0).sqrt(), "backward"),
        (overwrite, "forward"),
        (lambda h: h[:, :4].div(0), "forward"),
    ],
)
def test_an_operation_replays_from_its_file_alone(act: Callable[[Tensor], Tensor], kind: str, tmp_path: Path) -> None:
    net = Net(act)
    diagnosis, record = diagnose(lambda: net(torch.ones(2, 4)).mean(), net, None)
    path = tmp_path / "event.pt"
    save_replay(path, diagnosis, record, {"x": torch.ones(2), "name": "a", "other": object()}, RandomState.now(), {"step": 3})
    report = replay(path)
    assert (report.how, report.reproduced, report.saved.kind) == ("operation", True, kind)
    assert "reproduced" in str(report)


def test_the_random_state_goes_through_the_file(tmp_path: Path) -> None:
    state = RandomState.now()
    expected = torch.rand(3)
    path = tmp_path / "event.pt"
    save_replay(path, Diagnosis("unknown"), None, torch.ones(1), state, {"step": 0})
    net = nn.Linear(1, 1)
    drawn: list[Tensor] = []

    def step(batch: Tensor) -> Tensor:
        drawn.append(torch.rand(3))
        return net(batch).sum()

    report = replay(path, net, step)
    assert torch.equal(drawn[0], expected)
    assert (report.how, report.reproduced) == ("step", False)
    assert replay(path).reproduced is None


@pytest.mark.parametrize("content", [b"", b"not a file"])
def test_a_broken_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "event.pt"
    path.write_bytes(content)
    with pytest.raises(DataError):
        replay(path)
    with pytest.raises(DataError):
        replay(tmp_path / "missing.pt")


def attend(h: Tensor, **masks: Any) -> Tensor:
    torch.manual_seed(0)
    return nn.MultiheadAttention(4, 2, batch_first=True)(h[None], h[None], h[None], need_weights=True, **masks)[0][0]


MASKED_ROW = torch.tensor([[True, True], [False, False]])


@pytest.mark.parametrize(
    "act",
    [
        lambda h: F.softmax(h.masked_fill(torch.ones(2, 4, dtype=torch.bool), -math.inf), dim=1),
        lambda h: h.masked_fill(MASKED_ROW.repeat(1, 2), -math.inf).softmax(-1),
        lambda h: torch.log_softmax(h + torch.full((2, 1), -math.inf), 1),
        lambda h: F.log_softmax(h.where(~MASKED_ROW.repeat(1, 2), torch.tensor(-math.inf)), dim=-1),
        lambda h: attend(h, key_padding_mask=torch.ones(1, 2, dtype=torch.bool)),
        lambda h: attend(h, attn_mask=MASKED_ROW),
        lambda h: attend(h, attn_mask=torch.zeros(2, 2).masked_fill(MASKED_ROW, -math.inf)),
    ],
)
def test_a_fully_masked_softmax_is_named_as_such(act: Callable[[Tensor], Tensor]) -> None:
    diagnosis = found(act)
    assert diagnosis.kind == "forward"
    assert "fully masked" in diagnosis.detail


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda out: F.mse_loss(out[:0], out[:0]), "nothing was selected"),
        (lambda out: out[out.isnan()].mean(), "nothing was selected"),
        (lambda out: F.cross_entropy(out.repeat(1, 3), torch.full((2,), 255), ignore_index=255), "every target is ignored"),
        (lambda out: F.nll_loss(out.repeat(1, 3), torch.full((2,), -100)), "every target is ignored"),
    ],
)
def test_losses_over_nothing_are_named(loss: Callable[[Tensor], Tensor], words: str) -> None:
    diagnosis = found(torch.tanh, loss=loss)
    assert words in diagnosis.detail
    assert "test_first_bad.py:" in diagnosis.source


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    ("inside", "kind", "op"), [(lambda h: (h * 0).log(), "forward", "log"), (lambda h: (h * 0).sqrt(), "backward", "sqrt")]
)
def test_the_inside_of_a_checkpoint_is_named(inside: Callable[[Tensor], Tensor], kind: str, op: str, reentrant: bool) -> None:
    diagnosis = found(lambda h: checkpoint(inside, h, use_reentrant=reentrant))
    assert (diagnosis.kind, diagnosis.op) == (kind, f"torch.Tensor.{op}")
    assert "test_first_bad.py:" in diagnosis.source


@dataclass
class Sample:
    image: Tensor
    label: Tensor


def _poisoned(rows: list[int]) -> Tensor:
    x = torch.ones(5, 4)
    x[rows] = math.nan
    return x


@pytest.mark.parametrize("rows", [[0], [1, 4], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("form", ["dict", "dataclass", "list"])
def test_the_guilty_samples_of_a_batch(form: str, rows: list[int]) -> None:
    x, label = _poisoned(rows), torch.ones(5)
    batch: Any = {"dict": {"image": x, "label": label}, "dataclass": Sample(x, label), "list": [x, [label]]}[form]
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    assert diagnose(lambda: net(x).mean(), net, batch)[0].samples == rows


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (lambda out, factor: (out.squeeze(1) * factor).log().sum(), "forward"),
        (lambda out, factor: (out.squeeze(1) * factor).sqrt().sum(), "backward"),
        (lambda out, factor: F.mse_loss(out.squeeze(1), 1e30 * (1 - factor), reduction="mean"), "forward"),
    ],
)
def test_the_guilty_samples_of_an_operation(loss: Callable[[Tensor, Tensor], Tensor], kind: str) -> None:
    net = nn.Linear(4, 1)
    nn.init.constant_(net.weight, 1.0)
    factor = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    diagnosis, _ = diagnose(lambda: loss(net(torch.ones(5, 4)).abs(), factor), net, torch.ones(5, 4))
    assert (diagnosis.kind, diagnosis.samples) == (kind, [1, 4])
    assert str(diagnosis).endswith("samples 1, 4 of the batch")


def test_a_loss_function_needs_no_module() -> None:
    diagnosis, record = diagnose(lambda: torch.zeros(3, requires_grad=True).sqrt().sum())
    assert (diagnosis.kind, diagnosis.op) == ("backward", "torch.Tensor.sqrt")
    assert record is not None
    assert "test_first_bad.py:" in diagnosis.source
