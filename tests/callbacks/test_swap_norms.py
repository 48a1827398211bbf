"""`SwapNorms` in a Trainer: before the optimizer is built, once, checkpoints load, and a network without norms trains on."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import SwapNorms
from pl_normkit.errors import ConfigError, NormkitWarning

pytestmark = [pytest.mark.filterwarnings("ignore:The number of training batches")]


class Classifier(pl.LightningModule):
    """A residual network of images with two stages and a layer norm in its head, built at once or in `configure_model`."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.net: nn.Module | None = None if late else Net()

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Net()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        assert self.net is not None
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("loss", self.training_step(batch, index), batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.stem, self.down = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 2, stride=2)
        self.deep = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.head = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.down(x + self.branch(x))
        x = x + self.deep(x)
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), torch.randint(3, (8,))), batch_size=4)


def trainer(callback: pl.Callback, folder: Path) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[callback], default_root_dir=folder, **quiet)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("to", "where"), [("dyt", "net.head.0"), ("prepbn", "net.head.0"), ("ibn_a", "branch.1")])
def test_new_norms_are_trained_saved_and_loaded(to: str, where: str, late: bool, tmp_path: Path) -> None:
    module, callback = Classifier(late), SwapNorms(to)
    first = trainer(callback, tmp_path)
    first.fit(module, loader())
    assert [change.module for change in callback.changes.made] == [where]
    trained = {id(parameter) for group in first.optimizers[0].param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in module.parameters()}
    first.test(module, loader(), verbose=False)
    assert len(callback.changes.made) == 1
    first.save_checkpoint(tmp_path / "run.ckpt")
    other = Classifier(late)
    trainer(SwapNorms(to), tmp_path).test(other, loader(), ckpt_path=tmp_path / "run.ckpt", weights_only=False, verbose=False)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in module.state_dict().items())


def test_a_network_without_such_norms_trains_as_it_is(tmp_path: Path) -> None:
    module = Classifier()
    assert module.net is not None
    module.net.head[0] = nn.Identity()
    with pytest.warns(NormkitWarning, match="SwapNorms changes nothing: it looked for norms"):
        trainer(SwapNorms("rmsnorm"), tmp_path).fit(module, loader())


@pytest.mark.parametrize(("to", "options"), [("rmsnrm", {}), ("dyt", {"alhpa": 1.0})])
def test_bad_words_are_refused_at_once(to: str, options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        SwapNorms(to, **options)
