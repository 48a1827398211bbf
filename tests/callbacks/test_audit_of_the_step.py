"""What `ModelAudit` sees of the wiring in the first real step, and that clean runs hear nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import ModelAudit
from tests.callbacks.processes import run_on_two_ranks


class Net(pl.LightningModule):
    """Clean: every layer learns."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.0)


class Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(6, 6)


class Cut(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.net[3](self.net[2](self.net[1](self.net[0](x))).detach())


class SoftmaxTwice(Net):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]).softmax(-1), batch[1])


class NoRate(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class FrozenBody(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net[:3].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class WarmUp(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class NoLossAtFirst(Net):
    def training_step(self, batch: Any, index: int) -> Any:
        return None if index == 0 else super().training_step(batch, index)


class Gan(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(3, 1)

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        first, second = self.optimizers()
        for optimizer, part in ((first, self.net), (second, self.other)):
            optimizer.zero_grad()
            made = self.net(batch[0])
            self.manual_backward(self.other(made if part is self.net else made.detach()).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net, self.other)]


def wiring_of(module: pl.LightningModule, folder: Path, *, measure: bool = False, **options: Any) -> set[str]:
    audit = ModelAudit(config=False, measure=measure)
    data = DataLoader(TensorDataset(torch.randn(16, 6), torch.randint(0, 3, (16,))), 4)
    settings: dict[str, Any] = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[audit], enable_model_summary=False, default_root_dir=folder, **{**settings, **options}
    )
    trainer.fit(module, data)
    assert audit.report is not None
    assert [str(note) for note in audit.report.failures] == []
    assert torch._C._len_torch_function_stack() == 0
    return {finding.name for finding in audit.report.findings if finding.code.startswith("NK0")}


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Net, set()),
        (WarmUp, set()),
        (NoLossAtFirst, set()),
        (Gan, set()),
        (Unused, {"parameter-without-gradient"}),
        (Cut, {"parameter-without-gradient"}),
        (SoftmaxTwice, {"activation-before-loss"}),
        (NoRate, {"parameter-not-updated"}),
        (FrozenBody, {"statistics-of-frozen-norm"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_what_is_said_of_the_first_step(kind: type[pl.LightningModule], expected: set[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert wiring_of(kind(), tmp_path) == expected


def test_accumulation_is_silent(tmp_path: Path) -> None:
    assert wiring_of(Net(), tmp_path, accumulate_grad_batches=2) == set()


def test_nothing_is_watched_after_the_second_batch(tmp_path: Path) -> None:
    module = Net()
    wiring_of(module, tmp_path)
    hooks = [part for part in module.modules() if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks]
    assert hooks == []
    assert not torch.nn.modules.module._global_forward_hooks


class EmptyMask(Net):
    """Its loss is the mean over a mask, which may be empty."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return (self(x)[y > 0]).square().mean()


@pytest.mark.parametrize("stress", [False, True])
def test_stress_runs_the_step_on_corner_batches_and_changes_nothing(stress: bool, tmp_path: Path) -> None:
    def train(callbacks: list[pl.Callback]) -> Net:
        torch.manual_seed(0)
        module = EmptyMask()
        data = DataLoader(TensorDataset(torch.randn(16, 6), torch.ones(16, dtype=torch.long)), 4)
        settings: dict[str, Any] = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        pl.Trainer(accelerator="cpu", callbacks=callbacks, enable_model_summary=False, default_root_dir=tmp_path, **settings).fit(
            module, data
        )
        return module

    audit = ModelAudit(config=False, stress=stress)
    stressed, plain = train([audit]), train([])
    assert audit.report is not None
    assert ("NK411" in {finding.code for finding in audit.report.findings}) is stress
    pairs = zip(stressed.state_dict().values(), plain.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_two_processes_are_told_of_unused_parameters_before_torch_stops_them(tmp_path: Path) -> None:
    for run in run_on_two_ranks("unused_ranks", tmp_path):
        message, advice, names = run["ddp"]["told"][0]
        assert (len(run["ddp"]["told"]), names) == (1, ["heads.later.weight", "heads.later.bias"])
        assert "DistributedDataParallel waits for all of them" in message
        assert "find_unused_parameters=True" in advice
        assert (run["ddp"]["steps"], "find_unused_parameters" in run["ddp"]["error"]) == (1, True)
        assert run["ddp_find_unused_parameters_true"] == {"told": [], "steps": 4, "error": ""}


class Evaluated(Net):
    """Leaves no dropout on in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.drop(x))

    def validation_step(self, batch: Any, index: int) -> Tensor:
        return self.training_step(batch, index)


class EvaluatedInTrainingMode(Evaluated):
    def on_validation_start(self) -> None:
        self.train()

    def on_validation_end(self) -> None:
        self.train()


class DropsAlways(Evaluated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.2))


@pytest.mark.parametrize("sanity_steps", [0, 2])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [(Evaluated, []), (EvaluatedInTrainingMode, ["module-in-eval-mode"]), (DropsAlways, ["dropout-active-in-evaluation"])],
)
def test_what_is_said_of_the_first_validation_batch(
    kind: type[pl.LightningModule], expected: list[str], sanity_steps: int, tmp_path: Path
) -> None:
    audit = ModelAudit(config=False, select=["NK0"])
    data = DataLoader(TensorDataset(torch.randn(8, 6), torch.randint(0, 3, (8,))), 4)
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[audit], max_epochs=2, num_sanity_val_steps=sanity_steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(kind(), data, data)
    assert audit.report is not None
    assert [finding.name for finding in audit.report.findings] == expected
    assert audit.report.failures == []
    assert torch._C._len_torch_function_stack() == 0
    assert not torch.nn.modules.module._global_forward_hooks


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.GRU(2, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(x)[0][:, -1])


class TimeOverTheBatch(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = Recurrent()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.view(-1, 3, 2))


@pytest.mark.parametrize(
    ("kind", "measure", "expected"),
    [(TimeOverTheBatch, False, set()), (TimeOverTheBatch, True, {"samples-mixed"}), (Net, True, set())],
)
def test_samples_that_mix_are_measured_where_that_is_allowed(
    kind: type[pl.LightningModule], measure: bool, expected: set[str], tmp_path: Path
) -> None:
    assert wiring_of(kind(), tmp_path, measure=measure) == expected
