"""`NormSchedule` counts optimizer steps, validates as exported, resumes, and says when the run was too short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import NormSchedule, SwapNorms
from pl_normkit.errors import ConfigError, NormkitWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


class Regressor(pl.LightningModule):
    """Records the shares that training and validation see."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
        self.seen: list[list[float]] = []
        self.validated: list[float] = []

    def shares(self) -> list[float]:
        return [round(float(module.share), 3) for module in self.net if hasattr(module, "share")]

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.seen.append(self.shares())
        result: Tensor = self.net(batch[0]).square().mean()
        return result

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.validated += self.shares()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(module: Regressor, callbacks: list[pl.Callback], folder: Path, ckpt: Path | None = None, **options: Any) -> pl.Trainer:
    data = DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", callbacks=callbacks, default_root_dir=folder, **quiet, **options)
    trainer.fit(module, data, data, ckpt_path=ckpt, weights_only=False if ckpt else None)
    return trainer


def test_a_line_over_optimizer_steps_with_accumulation(tmp_path: Path) -> None:
    module, schedule = Regressor(), NormSchedule(steps=4, start=1)
    fit(module, [SwapNorms("prepbn"), schedule], tmp_path, max_epochs=3, accumulate_grad_batches=2)
    shares = [1.0, 1.0, 1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.0, 0.0]
    assert module.seen == [[share, share] for share in shares]
    assert schedule.share == 0
    assert set(module.validated) == {0.0}


def test_constant_norms_switch_one_after_another(tmp_path: Path) -> None:
    module = Regressor()
    fit(module, [SwapNorms("fixed_std"), NormSchedule(steps=4)], tmp_path, max_epochs=2)
    assert module.seen == [[1.0, 1.0]] * 2 + [[0.0, 1.0]] * 2 + [[0.0, 0.0]] * 4
    assert set(module.validated) == {0.0}


def test_a_resumed_run_goes_on_where_it_was_and_a_short_one_says_so(tmp_path: Path) -> None:
    callbacks = lambda: [SwapNorms("prepbn"), NormSchedule(steps=8)]  # noqa: E731
    with pytest.warns(NormkitWarning, match="share of 0.5"):
        fit(Regressor(), callbacks(), tmp_path, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=False)["state_dict"]
    assert saved["net.0.share"] == 0.5
    module = Regressor()
    fit(module, callbacks(), tmp_path / "more", tmp_path / "half.ckpt", max_epochs=2)
    assert module.seen == [[share] * 2 for share in (0.5, 0.375, 0.25, 0.125)]


def test_without_such_norms_it_warns_and_the_run_goes_on(tmp_path: Path) -> None:
    module = Regressor()
    with pytest.warns(NormkitWarning, match="no norm that turns"):
        fit(module, [NormSchedule(steps=2)], tmp_path, max_epochs=1)
    assert len(module.seen) == 4


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"steps": 1.5}, {"steps": 2, "start": -1}])
def test_bad_numbers_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        NormSchedule(**arguments)
