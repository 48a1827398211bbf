"""`GradientHealth` against numbers taken by hand, under accumulation, and with the weights of a run without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import GradientHealth
from pl_normkit.cli import main
from pl_normkit.errors import ConfigError
from pl_normkit.recipes.outcome import write_page
from pl_normkit.report.block_curves import read_block_curves


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU())
        self.head = nn.Linear(12, 3)
        nn.init.constant_(self.body[0].bias[:3], -50.0)  # three of twelve units are dead

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(callbacks: list[pl.Callback], folder: Path, **options: Any) -> Net:
    module = Net()
    torch.manual_seed(1)
    data = DataLoader(TensorDataset(torch.randn(24, 6), torch.randint(0, 3, (24,))), 4)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, default_root_dir=folder, **{**quiet, **options}).fit(module, data)
    return module


def by_hand(accumulate: int) -> dict[str, tuple[float, float]]:
    """Gradient norm and update ratio of the first step."""
    module = Net()
    torch.manual_seed(1)
    x, y = torch.randn(24, 6), torch.randint(0, 3, (24,))
    losses = [F.cross_entropy(module.head(module.body(x[4 * i : 4 * i + 4])), y[4 * i : 4 * i + 4]) for i in range(accumulate)]
    (sum(losses) / accumulate).backward()  # type: ignore[union-attr]
    found = {}
    for name in ("body", "head"):
        parameters = list(module.get_submodule(name).parameters())
        gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm()
        weight = torch.cat([p.detach().flatten() for p in parameters]).norm()
        found[name] = (float(gradient), float(0.1 * gradient / weight))
    return found


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_numbers_are_those_of_the_first_step(accumulate: int, tmp_path: Path) -> None:
    health = GradientHealth(every_n_steps=50)
    fit([health], tmp_path, accumulate_grad_batches=accumulate)
    expected = by_hand(accumulate)
    assert list(health.latest) == ["body", "head"]
    for block, (gradient, ratio) in expected.items():
        assert health.latest[block].gradient_norm == pytest.approx(gradient, rel=1e-4)
        assert health.latest[block].update_ratio == pytest.approx(ratio, rel=1e-4)
    assert health.latest["head"].dead_share is None
    assert health.latest["body"].dead_share is not None
    assert health.latest["body"].dead_share >= 3 / 12


def test_they_reach_the_logger_every_few_steps(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit([GradientHealth(every_n_steps=2)], tmp_path, logger=logger, log_every_n_steps=1)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert "normkit/gradient_norm/body" in rows[0]
    assert len(rows) == 1 + 3  # steps 0, 2 and 4 of six


def test_the_run_is_that_without_it(tmp_path: Path) -> None:
    plain, watched = fit([], tmp_path), fit([GradientHealth(1)], tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_bad_intervals(steps: Any) -> None:
    with pytest.raises(ConfigError):
        GradientHealth(steps)


def test_a_page_draws_the_last_measurement_along_the_blocks(tmp_path: Path) -> None:
    health = GradientHealth(every_n_steps=2)
    module = Net()
    data = DataLoader(TensorDataset(torch.randn(24, 6), torch.randint(0, 3, (24,))), 4)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[health], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, data)
    write_page(trainer, module, {}, tmp_path / "report.html", Console(quiet=True))
    page = (tmp_path / "report.html").read_text()
    assert all(f"{what} by block, step 5" in page for what in ("Gradient norm", "Update-to-weight ratio", "Share of dead units"))
    assert f"body 0: {health.latest['body'].gradient_norm:.4g}" in page
    assert f"head 1: {health.latest['head'].gradient_norm:.4g}" in page


def test_report_draws_what_a_csv_logger_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    health, logger = GradientHealth(every_n_steps=2), CSVLogger(tmp_path)
    fit([health], tmp_path, logger=logger, log_every_n_steps=1)
    curves = read_block_curves(Path(logger.log_dir) / "metrics.csv")
    assert {measure: list(blocks) for measure, blocks in curves.items()} == {
        "dead_share": ["body"],
        "gradient_norm": ["body", "head"],
        "update_ratio": ["body", "head"],
    }
    assert [step for step, _ in curves["gradient_norm"]["head"]] == [1, 3, 5]  # steps taken
    assert curves["gradient_norm"]["head"][-1][1] == pytest.approx(health.latest["head"].gradient_norm)
    assert main(["report", logger.log_dir, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "block_health.png")
    assert (tmp_path / "block_health.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["", "step,loss\n1,2\n"])
def test_report_of_a_run_without_records_is_one_error(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    assert "nothing was recorded that could be drawn" in capsys.readouterr().err


def test_report_of_a_broken_log_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.csv").write_text("step,normkit/gradient_norm/body\n1,two\n")
    assert main(["report", str(tmp_path)]) == 2
    assert "metrics.csv" in capsys.readouterr().err
