"""Findings in loggers: Lightning's own where they can be imported, else a stand-in that records calls of the same signature."""

from __future__ import annotations

import csv
import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers import WandbLogger as RealWandb
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import ModelAudit
from pl_normkit.callbacks._loggers import log_findings
from pl_normkit.errors import NormkitWarning
from pl_normkit.findings import Evidence, Finding, FixSafety, Place, Severity
from pl_normkit.report import Report
from tests.methods.residual_networks import BlockSpec, Net, NetSpec

FINDING = Finding(
    "NK101",
    "a-name",
    Severity.WARNING,
    "It | shifts",
    (Place("a\udcff", "b.py:3"),),
    (Evidence("ratio", 2.0, "1"),),
    "Move it",
    FixSafety.SAFE,
)
REPORT = Report([FINDING], "net")
ROW = ["NK101 a-name", "warning", "It | shifts", "a\udcff (b.py:3)", "ratio: 2 (should be 1)", "Move it"]


class Recorder:
    """Takes every call of every method."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *values: self.calls.append((name, *values))


class MLFlowLogger:
    run_id = "run-1"

    def __init__(self) -> None:
        self.experiment = Recorder()


class WandbLogger:
    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def log_table(self, **options: Any) -> None:
        inspect.signature(RealWandb.log_table).bind(self, **options)
        self.calls.append(options)


def test_wandb_gets_a_table() -> None:
    logger = WandbLogger()
    log_findings([logger], REPORT, 3)
    (call,) = logger.calls
    assert call["data"] == [ROW]
    assert (call["step"], len(call["columns"])) == (3, len(ROW))


def test_mlflow_gets_a_text_of_its_run() -> None:
    logger = MLFlowLogger()
    log_findings([logger], REPORT, 3)
    ((method, run, text, file),) = logger.experiment.calls
    assert (method, run, file) == ("log_text", "run-1", "normkit_findings.md")
    assert text.splitlines()[0] == "| rule | severity | message | places | evidence | advice |"
    assert text.splitlines()[2].startswith("| NK101 a-name | warning | It &#124; shifts |")


def test_a_subclass_of_tensorboards_logger_gets_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiment is Lightning's property over the writer of tensorboard, which need not be installed."""
    writer = Recorder()
    monkeypatch.setattr(TensorBoardLogger, "experiment", writer)
    logger = type("Own", (TensorBoardLogger,), {})
    log_findings([object.__new__(logger)], REPORT, 3)
    ((method, tag, text, step),) = writer.calls
    assert (method, tag, step) == ("add_text", "normkit_findings", 3)
    assert "NK101 a-name" in text


def test_tensorboard_itself_reads_the_text_back(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    log_findings([logger], REPORT, 3)
    logger.experiment.flush()
    events = accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    assert "normkit_findings/text_summary" in events.Tags()["tensors"]


def test_a_logger_that_fails_is_a_warning() -> None:
    broken = MLFlowLogger()
    broken.experiment = None  # type: ignore[assignment]
    with pytest.warns(NormkitWarning, match="MLFlowLogger could not store the findings: AttributeError"):
        log_findings([broken, other := WandbLogger()], REPORT, 0)
    assert len(other.calls) == 1


def test_an_unknown_logger_and_a_clean_report_write_nothing() -> None:
    recorder = Recorder()
    log_findings([recorder], REPORT, 0)
    log_findings([wandb := WandbLogger()], Report(), 0)
    assert (recorder.calls, wandb.calls) == ([], [])


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net(NetSpec((BlockSpec("pre-basic", (2,)),)))

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-2)


def test_a_run_with_the_csv_logger_keeps_counts_and_findings(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    audit = ModelAudit(select=["NK101"], config=False)
    trainer = pl.Trainer(
        max_steps=1, logger=logger, callbacks=[audit], accelerator="cpu", log_every_n_steps=1, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(TensorDataset(torch.randn(8, 3, 16, 16)), batch_size=8))
    assert audit.report is not None
    assert [finding.code for finding in audit.report.findings] == ["NK101"]
    with (Path(logger.log_dir) / "normkit_findings.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["rule"], row["message"]) for row in rows] == [("NK101 dropout-before-batch-norm", audit.report.findings[0].message)]
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["normkit/warnings"] == "1.0"
