"""The stability triad: each run against a loop written out, and nothing is left behind."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from pl_normkit.cli import main
from pl_normkit.errors import ConfigError
from pl_normkit.methods.depth_profile import stability_probe

STEPS, WARMUP = 6, 3
X = torch.linspace(-1.0, 1.0, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8).sin()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 2))


def batches() -> list[Tensor]:
    return [X, X.flip(0) + 1.0, X * 2.0]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1.0).square().mean()


def by_hand(rate: float, spread: float, warmup: int) -> list[float]:
    model = network()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= spread
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    torch.manual_seed(5)
    losses = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / max(1, warmup))
        optimizer.zero_grad()
        loss = loss_of(model, batches()[step % 3])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    return copy.deepcopy((model.state_dict(), gradients, optimizer.state_dict(), modes, torch.get_rng_state()))


def test_each_run_is_the_loop_written_out_and_everything_is_as_before() -> None:
    model = network().eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for batch in batches()[:2]:
        loss_of(model, batch).backward()
        optimizer.step()
    model.load_state_dict(network().state_dict())  # with history in the optimizer and in `.grad`
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1)
    torch.manual_seed(5)
    before = state_of(model, optimizer)

    report = stability_probe(model, batches(), loss_of, optimizer=optimizer, steps=STEPS, warmup_steps=WARMUP, clip_norm=0.5)

    torch.testing.assert_close(state_of(model, optimizer), before, rtol=0.0, atol=0.0)
    plans = {
        "as it is": (0.01, 1.0, WARMUP),
        "learning rate x5": (0.05, 1.0, WARMUP),
        "initial std x0.1": (0.01, 0.1, WARMUP),
        "no warm-up": (0.01, 1.0, 0),
    }
    assert {run.name: list(run.losses) for run in report.runs} == {
        name: pytest.approx(by_hand(*plan), rel=1e-5) for name, plan in plans.items()
    }
    assert [run.final for run in report.runs] == [run.losses[-1] for run in report.runs]
    assert scheduler.get_last_lr() == [pytest.approx(0.001)]


def test_what_fails_on_the_way_is_undone_too() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = state_of(model, optimizer)
    calls = []

    def fails(module: nn.Module, batch: Tensor) -> Tensor:
        calls.append(1)
        return loss_of(module, batch) if len(calls) < 9 else module(batch)

    with pytest.raises(ConfigError, match="no scalar"):
        stability_probe(model, batches(), fails, optimizer=optimizer, steps=STEPS, warmup_steps=WARMUP)
    torch.testing.assert_close(state_of(model, optimizer), before, rtol=0.0, atol=0.0)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=16, n_positions=16))


def text() -> dict[str, Tensor]:
    tokens = torch.arange(32).reshape(2, 16) % 16
    return {"input_ids": tokens, "labels": tokens}


@pytest.mark.parametrize(("rate", "diverged"), [(3e-3, ()), (2.0, ("as it is", "learning rate x5", "initial std x0.1", "no warm-up"))])
def test_a_language_model_trains_at_a_usual_rate_only(rate: float, diverged: tuple[str, ...]) -> None:
    report = stability_probe(
        gpt2(), text(), lambda model, batch: model(**batch).loss, optimizer=lambda m: torch.optim.Adam(m.parameters(), rate), steps=20,
        warmup_steps=5,
    )  # fmt: skip
    assert report.diverged == diverged
    assert json.loads(report.to_json())["diverged"] == list(diverged)
    if not diverged:
        share = report.share(report.runs[1])
        assert share == (report.runs[0].losses[0] - report.runs[1].final) / (report.runs[0].losses[0] - report.runs[0].final)


def test_a_loss_that_is_not_finite_ends_its_run() -> None:
    model = nn.Linear(2, 1)
    sgd = torch.optim.SGD(model.parameters(), 1e3)
    report = stability_probe(model, torch.ones(3, 2), lambda model, x: -model(x).exp().mean(), optimizer=sgd, steps=8, warmup_steps=0)
    assert [run.name for run in report.runs] == ["as it is", "learning rate x5", "initial std x0.1"]
    assert [run.losses[-1] for run in report.runs[:2]] == [-math.inf, -math.inf]
    assert report.runs[0].has_diverged
    assert len(report.runs[0].losses) < 8


class Trained(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Tensor, _: int) -> dict[str, Tensor]:
        loss = loss_of(self.net, batch)
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 0.1)}


def test_a_module_with_a_training_step_brings_loss_and_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(5)
    own = stability_probe(Trained(), batches(), steps=STEPS, warmup_steps=WARMUP)
    torch.manual_seed(5)
    given = stability_probe(
        network(), batches(), loss_of, optimizer=lambda m: torch.optim.Adam(m.parameters(), 0.01), steps=STEPS, warmup_steps=WARMUP
    )
    assert own.runs[1:] != own.runs[:-1]
    assert [run.name for run in own.runs] == [run.name for run in given.runs]
    here = "tests.methods.depth_profile.test_stability"
    code = main(["stability", f"{here}:Trained", "--batches", f"{here}:batches", "--steps", "6", "--warmup", "3", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert code == int(bool(shown["diverged"]))
    assert [len(run["losses"]) for run in shown["runs"]] == [6] * 4
    assert main(["stability", f"{here}:network", "--batches", f"{here}:batches", "--loss", f"{here}:loss_of", "--lr", "1e-3"]) == 0
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]] == [run.name for run in own.runs]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no loss": ({"loss_fn": None}, "needs a loss"),
    "no optimizer": ({"optimizer": None}, "needs an optimizer"),
    "two optimizers": ({"optimizer": lambda m: [torch.optim.SGD(m.parameters(), 0.1) for _ in range(2)]}, "2 were configured"),
    "no batches": ({"batches": []}, "no batches"),
    "warm-up only": ({"steps": 4, "warmup_steps": 4}, "more steps"),
    "meta": ({"module": nn.Linear(2, 2, device="meta")}, "meta device"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_one_message(case: str) -> None:
    change, message = BAD[case]
    usual = {"module": network(), "batches": X, "loss_fn": loss_of, "optimizer": lambda m: torch.optim.SGD(m.parameters(), 0.1)}
    with pytest.raises(ConfigError, match=message):
        stability_probe(**(usual | change))
