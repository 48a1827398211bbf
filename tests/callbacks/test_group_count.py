"""`GroupCount` in a Trainer: converted once, trained, averaged, resumed, on two processes too."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import GroupCount
from pl_normkit.errors import ConfigError, NormkitWarning
from tests.callbacks.processes import run_on_two_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


class Classifier(pl.LightningModule):
    def __init__(self, has_norm: bool = True, late: bool = False) -> None:
        super().__init__()
        self.has_norm = has_norm
        self.net: nn.Module | None = None if late else self._build()

    def _build(self) -> nn.Module:
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(8) if self.has_norm else nn.Identity()
        return nn.Sequential(nn.Conv2d(1, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self._build()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        assert self.net is not None
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.training_step(batch, index)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8) % 3), batch_size=2)


def trainer(folder: Path, *callbacks: pl.Callback, epochs: int = 1) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=list(callbacks),
    )  # fmt: skip


@pytest.mark.parametrize("late", [False, True])
def test_it_converts_once_and_resumes_bit_equal_beside_a_moving_average(late: bool, tmp_path: Path) -> None:
    def fit(epochs: int, path: Path | None = None) -> tuple[pl.Trainer, Classifier, GroupCount]:
        module, callback = Classifier(late=late), GroupCount(groups=4)
        saved = ModelCheckpoint(tmp_path, f"{{epoch}}-of-{epochs}", save_top_k=-1)
        run = trainer(tmp_path, callback, EMAWeightAveraging(decay=0.9), saved, epochs=epochs)
        run.fit(module, loader(), ckpt_path=path)
        return run, module, callback

    _, _, callback = fit(1)
    assert [change.module for change in callback.changes.made] == ["net.1"]
    run, whole, callback = fit(2)
    assert isinstance(whole.net, nn.Sequential)
    assert (type(whole.net[1]).__name__, whole.net[1].num_groups) == ("GroupNorm", 4)
    run.test(whole, loader(), verbose=False)
    assert len(callback.changes.made) == 1
    _, resumed, _ = fit(2, tmp_path / "epoch=0-of-1.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_network_without_batch_norms_trains_as_it_is(tmp_path: Path) -> None:
    with pytest.warns(NormkitWarning, match="batch norms"):
        trainer(tmp_path, GroupCount(), ModelCheckpoint(tmp_path)).fit(Classifier(has_norm=False), loader())


def test_a_bad_target_is_refused_at_once() -> None:
    with pytest.raises(ConfigError):
        GroupCount("few")


def test_two_processes_train_one_converted_network(tmp_path: Path) -> None:
    """Beside a network whose time varies over positions; both ranks end with the same weights."""
    first, second = run_on_two_ranks("edited_ranks", tmp_path)
    assert first == second
    assert first["norms"] == ["GroupNorm", "InstanceNorm2d"]
    assert first["changed"] == 1 + 2
    assert any("positional_time" in name for name in first["weights"])
