"""`RecalibrateBatchNorm` tests with statistics of the test data and leaves the model as it was."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import RecalibrateBatchNorm
from pl_normkit.errors import ConfigError, NormkitWarning


class Probed(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.seen: dict[str, Tensor] = {}

    def test_step(self, batch: list[Tensor], index: int, dataloader_idx: int = 0) -> None:
        self.seen = {name: value.clone() for name, value in self.net.state_dict().items()}
        self.net(batch[0])


def run(module: Probed, callback: RecalibrateBatchNorm, folder: Path, *data: Tensor) -> None:
    loaders = [DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=4) for x in data]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    pl.Trainer(accelerator="cpu", callbacks=[callback], **quiet).test(module, loaders, verbose=False)


@pytest.mark.parametrize(("weight", "count"), [(0.0, 1), (0.75, 2)])
def test_a_test_sees_the_statistics_of_its_data_and_gives_the_old_ones_back(weight: float, count: int, tmp_path: Path) -> None:
    module, callback = Probed(), RecalibrateBatchNorm(weight)
    before = {name: value.clone() for name, value in module.net.state_dict().items()}
    data = [torch.randn(8, 3) * (i + 2) + 5 for i in range(count)]
    run(module, callback, tmp_path, *data)
    x = torch.cat(data)
    torch.testing.assert_close(module.seen["0.running_mean"], (1 - weight) * x.mean(0))
    torch.testing.assert_close(module.seen["0.running_var"], weight + (1 - weight) * x.var(0))
    assert all(torch.equal(value, before[name]) for name, value in module.net.state_dict().items())


def test_only_the_first_batches_of_each_loader(tmp_path: Path) -> None:
    module, data = Probed(), [torch.randn(12, 3), torch.randn(12, 3)]
    run(module, RecalibrateBatchNorm(max_batches=1), tmp_path, *data)
    torch.testing.assert_close(module.seen["0.running_mean"], torch.cat([data[0][:4], data[1][:4]]).mean(0))


def test_without_batch_norm_it_warns(tmp_path: Path) -> None:
    module = Probed()
    module.net = nn.Linear(3, 2)
    with pytest.warns(NormkitWarning, match="RecalibrateBatchNorm changes nothing"):
        run(module, RecalibrateBatchNorm(), tmp_path, torch.randn(4, 3))


def test_a_weight_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError):
        RecalibrateBatchNorm(1.5)
