"""`StochasticPooling` in a Trainer: swaps in setup, once, and leaves evaluation as it was."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import StochasticPooling
from pl_normkit.errors import ConfigError, NormkitWarning
from pl_normkit.nn import StochasticAdaptiveAvgPool2d


class NoPool(pl.LightningModule):
    """A network without pools, and without `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 3)


class Classifier(pl.LightningModule):
    """A small classifier, its network built at once or in `configure_model`."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.net: nn.Module | None = None if late else self._build()

    @staticmethod
    def _build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self._build()

    def _loss(self, batch: list[Tensor]) -> Tensor:
        assert self.net is not None
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self._loss(batch)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("loss", self._loss(batch), batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.randn(16, 1, 8, 8), torch.randint(3, (16,))), batch_size=8)


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("late", [False, True])
def test_swaps_once_over_all_stages(late: bool) -> None:
    module, callback = Classifier(late), StochasticPooling(keep=0.3, scale="none")
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, loader())
    assert module.net is not None
    pool = module.net[2]
    assert isinstance(pool, StochasticAdaptiveAvgPool2d)
    assert (pool.keep, pool.scale) == (0.3, "none")
    trainer.test(module, loader(), verbose=False)
    assert module.net[2] is pool
    assert [change.module for change in callback.changes.made] == ["net.2"]
    callback.changes.undo()
    assert type(module.net[2]) is nn.AdaptiveAvgPool2d


def test_bad_arguments_and_models_without_pools() -> None:
    with pytest.raises(ConfigError):
        StochasticPooling(keep=0.0)
    with pytest.warns(NormkitWarning, match="StochasticPooling changes nothing: it looked for average pools"):
        StochasticPooling().setup(pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), NoPool(), "fit")
