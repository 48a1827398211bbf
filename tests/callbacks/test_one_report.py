"""`ModelAudit`'s report: one, whole before the first optimizer step, written where asked; and what its fixes leave in checkpoints."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit import restore_edits
from pl_normkit.callbacks import AtrousRates, GammaDecay, ModelAudit
from pl_normkit.errors import AuditFailedError, ConfigError, NormkitWarning
from tests.methods.residual_networks import BlockSpec, Net, NetSpec

WRONG = NetSpec((BlockSpec("pre-basic", (2,)),))
pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:You defined a `validation_step`")


class Module(pl.LightningModule):
    """Dropout before a batch norm, Adam with a large L2 term, a loss that ends in a square root of 0: three parts, a finding each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net(WRONG)
        self.steps: list[Tensor] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.steps.append(next(self.net.parameters()).detach().clone())
        return self.net(batch[0]).square().mean().sqrt()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2, weight_decay=0.05)


class Aspp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, 4, 3, padding=r, dilation=r) for r in (12, 24, 36))
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.cat([branch(x) for branch in self.branches], 1))
        return out


class Segmenter(pl.LightningModule):
    """Rates that are dead on its crops."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Aspp()
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self(batch[0]).square().mean()

    def _look(self, batch: Any, index: int) -> Tensor:
        self.seen = self(batch[0])
        return self.seen

    validation_step = test_step = predict_step = _look

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)

    @property
    def rates(self) -> list[int]:
        return [branch.dilation[0] for branch in self.net.branches]  # type: ignore[union-attr,index,misc]


def loader(side: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(8, 3, side, side, generator=generator), torch.zeros(8).long()), batch_size=4)


def trainer(*callbacks: Any, **options: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(**(quiet | {"max_epochs": 1, "accelerator": "cpu"} | options), callbacks=list(callbacks))


def test_network_loss_and_optimizers_stop_the_run_together(tmp_path: Path) -> None:
    module, audit = Module(), ModelAudit(fail_on="note", output=tmp_path / "audit.json")
    with pytest.raises(AuditFailedError) as caught:
        trainer(audit).fit(module, loader())
    assert audit.report is not None
    codes = {finding.code for finding in audit.report.findings}
    assert {"NK101", "NK205", "NK401"} <= codes
    assert all(code in str(caught.value) for code in codes)
    assert len(module.steps) == 1
    assert torch.equal(next(module.net.parameters()), module.steps[0])
    assert {finding["code"] for finding in json.loads((tmp_path / "audit.json").read_text())["findings"]} == codes


@pytest.mark.parametrize("name", ["audit.sarif", "audit.json", "audit.html"])
def test_the_report_is_written_whole_and_each_finding_shown_once(name: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    audit = ModelAudit(output=tmp_path / "deep" / name)
    trainer(audit).fit(Module(), loader())
    assert audit.report is not None
    written = (tmp_path / "deep" / name).read_text()
    shown = capsys.readouterr().out
    for finding in audit.report.findings:
        assert finding.code in written
        assert shown.count(f"silence: {finding.silence}") == 1
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [name]


def test_a_report_that_cannot_be_written_is_one_warning() -> None:
    with pytest.raises(ConfigError, match="names no format"):
        ModelAudit(output="audit.txt")
    run = trainer(ModelAudit(output="/proc/self/nowhere/audit.json"))
    with pytest.warns(NormkitWarning, match="could not be written to /proc/self/nowhere/audit.json"):
        run.fit(Segmenter(), loader(24))
    assert run.global_step == 2


class Gan(pl.LightningModule):
    """The discriminator is called after the generator's first step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 192), nn.Unflatten(1, (3, 8, 8)))
        self.discriminator = Net(WRONG)

    def forward(self, noise: Tensor) -> Tensor:
        out: Tensor = self.generator(noise)
        return out

    def training_step(self, batch: Any, index: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        for optimizer, images in ((first, self(torch.randn(4, 4))), (second, batch[0])):
            optimizer.zero_grad()
            self.manual_backward((images if optimizer is first else self.discriminator(images)).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.generator, self.discriminator)]


@pytest.mark.filterwarnings("ignore:the role of", "ignore:GammaDecay changes nothing")
@pytest.mark.parametrize("other", [[], [GammaDecay()]])
def test_every_network_is_read_once(other: list[Any]) -> None:
    audit = ModelAudit(select=["NK101"])
    trainer(audit, *other).fit(Gan(), loader())
    assert audit.report is not None
    assert [[place.module for place in finding.places] for finding in audit.report.findings] == [["discriminator.blocks.0.drop2"]]


def test_the_network_is_read_as_the_other_callbacks_left_it() -> None:
    for order in (lambda pair: pair, reversed):
        audit = ModelAudit(select=["NK501", "NK502", "NK503"])
        trainer(*order([audit, AtrousRates()])).fit(Segmenter(), loader(24))
        assert audit.report is not None
        assert list(audit.report.findings) == []


@pytest.mark.parametrize("make", [lambda: ModelAudit(select=["NK501", "NK502"], fix="unsafe"), AtrousRates])
def test_edits_are_in_force_wherever_a_checkpoint_is_loaded(make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, path = Segmenter(), tmp_path / "run.ckpt"
    with caplog.at_level(logging.INFO):
        run = trainer(make())
        run.fit(first, loader(24))
        run.save_checkpoint(path)
        run.save_checkpoint(path)
    assert first.rates != [12, 24, 36]
    assert sum("belong to an edited network" in message for message in caplog.messages) == 1
    assert sum("changed" in message and "restore_edits(model, checkpoint)" in message for message in caplog.messages) == 1
    wanted = first.eval()(loader(24).dataset[:4][0])
    for stage in ("test", "validate", "predict"):
        module = Segmenter()
        getattr(trainer(make(), limit_test_batches=1, limit_val_batches=1, limit_predict_batches=1), stage)(
            module, loader(24), ckpt_path=path
        )
        assert module.rates == first.rates
        assert module.seen is not None
        torch.testing.assert_close(module.seen, wanted)
    resumed = Segmenter()
    trainer(make(), max_epochs=2).fit(resumed, loader(24), ckpt_path=path)
    assert resumed.rates == first.rates
    plain = Segmenter()
    checkpoint = torch.load(path, weights_only=True)
    for model, prefix in ((plain, ""), (Segmenter().net, "net.")):
        changes = restore_edits(model, checkpoint)
        model.load_state_dict({key.removeprefix(prefix): value for key, value in checkpoint["state_dict"].items()})
        assert [branch.dilation[0] for branch in model.get_submodule("branches" if prefix else "net.branches")] == first.rates  # type: ignore[attr-defined]
        torch.testing.assert_close(model.eval()(loader(24).dataset[:4][0]), wanted)
        assert not restore_edits(model, checkpoint)
        changes.undo()
        assert [branch.dilation[0] for branch in model.get_submodule("branches" if prefix else "net.branches")] == [12, 24, 36]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="no checkpoint of a Trainer"):
        restore_edits(plain, checkpoint["state_dict"])


def test_four_callbacks_trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from pl_normkit.callbacks import NaNGuard, ScaleEqualization
    from pl_normkit.graph import trace as tracing

    traces: list[Any] = []
    export = tracing.export_model
    monkeypatch.setattr(tracing, "export_model", lambda model, *rest: traces.append(type(model)) or export(model, *rest))
    with pytest.warns(NormkitWarning, match="ScaleEqualization changes nothing"):
        trainer(ModelAudit(), GammaDecay(), NaNGuard(), ScaleEqualization()).fit(Module(), loader())
    assert traces == [Net]
