"""`NormalizeAndProject` projects after optimizer steps, goes on from a checkpoint, and watches where it does not project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import NormalizeAndProject
from pl_normkit.errors import ConfigError, NormkitWarning

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


class Regressor(pl.LightningModule):
    def __init__(self, has_norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4) if has_norm else nn.Tanh(), nn.Tanh(), nn.Linear(4, 1))
        self.lengths: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.lengths.append(self.net[0].weight.norm().item())
        return (self.net(batch[0]) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.5)


def fit(
    module: pl.LightningModule, callback: pl.Callback, folder: Path, epochs: int = 1, path: str | None = None, **options: Any
) -> pl.Trainer:
    loader = DataLoader(TensorDataset(torch.randn(20, 3, generator=torch.Generator().manual_seed(1))), batch_size=5)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", callbacks=[callback], max_epochs=epochs, default_root_dir=folder, **quiet, **options)
    trainer.fit(module, loader, ckpt_path=path)
    return trainer


def test_lengths_stay_after_every_step_and_grow_without(tmp_path: Path) -> None:
    kept, free = Regressor(), Regressor()
    start = kept.net[0].weight.norm().item()
    fit(kept, NormalizeAndProject(), tmp_path)
    fit(free, NormalizeAndProject(every=0), tmp_path)
    assert kept.lengths == pytest.approx([start] * 4, rel=1e-6)
    assert free.lengths[-1] > 1.001 * start


def test_steps_are_those_of_the_optimizer(tmp_path: Path) -> None:
    module = Regressor()
    start = module.net[0].weight.norm().item()
    fit(module, NormalizeAndProject(every=2), tmp_path, epochs=2, accumulate_grad_batches=2)
    changed = [abs(length - start) > 1e-6 for length in module.lengths]
    assert changed == [False, False, True, True, False, False, True, True]


def test_a_resumed_run_keeps_the_lengths_of_the_first_start(tmp_path: Path) -> None:
    module = Regressor()
    start = module.net[0].weight.norm().item()
    trainer = fit(module, NormalizeAndProject(every=100), tmp_path)
    assert module.net[0].weight.norm().item() > 1.001 * start
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Regressor()
    fit(again, NormalizeAndProject(), tmp_path, epochs=2, path=str(tmp_path / "last.ckpt"))
    assert again.net[0].weight.norm().item() == pytest.approx(start, rel=1e-6)


def test_growth_is_said_once_where_nothing_is_projected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pl_normkit.callbacks.normalize_and_project.WATCHED_EVERY", 1)
    module = Regressor()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 20.0)  # type: ignore[method-assign]
    with pytest.warns(NormkitWarning, match="net.0.weight is .* times as long") as caught:
        fit(module, NormalizeAndProject(every=0), tmp_path)
    assert sum(issubclass(each.category, NormkitWarning) for each in caught) == 1


def test_networks_without_such_weights_and_bad_numbers(tmp_path: Path) -> None:
    with pytest.warns(NormkitWarning, match="weights in front of norms"):
        fit(Regressor(has_norm=False), NormalizeAndProject(), tmp_path)
    with pytest.raises(ConfigError, match="not below 0"):
        NormalizeAndProject(every=-1)
