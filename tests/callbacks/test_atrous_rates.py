"""`AtrousRates` in a Trainer: from every source of the crop's size, once, kept by checkpoints, and the same in every process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pl_normkit.callbacks import AtrousRates
from pl_normkit.errors import ConfigError, NormkitWarning

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:.*checkpoint directory.*exists")


class Log:
    """No container that torch.export looks into."""

    def __init__(self) -> None:
        self.rates: set[int] = set()

    def add(self, rate: int) -> None:
        self.rates.add(rate)


class Network(nn.Module):
    """ASPP at stride 4 on 48 pixels: the map has 12 cells, and (2, 4, 6) fits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 4, 4)
        self.branches = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=r, dilation=r) for r in (12, 24, 36))
        self.head = nn.Conv2d(12, 2, 1)
        self.seen = Log()

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        if not torch.compiler.is_exporting():
            self.seen.add(self.branches[0].dilation[0])  # type: ignore[union-attr,index,arg-type]
        return self.head(torch.cat([branch(x) for branch in self.branches], 1))


class Module(pl.LightningModule):
    """`style` says how the network is reached: by forward, by attribute, beside a second one, or built late."""

    def __init__(self, style: str = "forward") -> None:
        super().__init__()
        self.style = style
        self.net: nn.Module | None = None if style == "late" else Network()
        if style == "beside":
            self.probe = nn.Linear(1, 1)

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Network()

    def training_step(self, batch: Any, index: int) -> Tensor:
        image = batch["picture"] if isinstance(batch, dict) else batch[0]
        assert self.net is not None
        return self.net(image).square().mean()

    def test_step(self, batch: Any, index: int) -> None:
        assert self.net is not None
        self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class ForwardModule(Module):
    def forward(self, image: Tensor) -> Tensor:
        assert self.net is not None
        out: Tensor = self.net(image)
        return out


class Pictures(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"picture": torch.randn(1, 48, 48)}


class Stream(IterableDataset[tuple[Tensor]]):
    def __iter__(self) -> Any:
        return iter([(torch.randn(1, 48, 48),)] * 4)


def images(size: int = 48) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(4, 1, size, size)), batch_size=2)


SOURCES = {"samples": images, "dicts": lambda: DataLoader(Pictures(), batch_size=2), "stream": lambda: DataLoader(Stream(), batch_size=2)}


def fit(module: pl.LightningModule, callback: AtrousRates, loader: Any = None, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "callbacks": [callback],
    }  # fmt: skip
    ckpt_path = options.pop("ckpt_path", None)
    trainer = pl.Trainer(**{**settings, **options})
    trainer.fit(module, images() if loader is None else loader, ckpt_path=ckpt_path)
    return trainer


def rates(module: Module) -> list[int]:
    assert isinstance(module.net, Network)
    return [branch.dilation[0] for branch in module.net.branches]  # type: ignore[union-attr,index,misc]


@pytest.mark.parametrize("style", ["forward", "attribute", "beside", "late"])
@pytest.mark.parametrize("source", SOURCES)
def test_auto_sets_the_rates_before_the_first_forward(style: str, source: str) -> None:
    module = ForwardModule(style) if style == "forward" else Module(style)
    callback = AtrousRates()
    fit(module, callback, SOURCES[source]())
    assert isinstance(module.net, Network)
    assert (rates(module), module.net.seen.rates) == ([2, 4, 6], {2})
    assert callback.rates_set == {f"net.branches.{k}": rate for k, rate in enumerate((2, 4, 6))}
    assert [hook for part in module.modules() for hook in part._forward_pre_hooks] == []
    callback.changes.undo()
    assert rates(module) == [12, 24, 36]


@pytest.mark.parametrize(("size", "expected"), [(96, [4, 8, 12]), ((48, 96), [2, 4, 6]), ([96, 200], [4, 8, 12])])
def test_a_size_that_is_given_counts(size: Any, expected: list[int]) -> None:
    module = ForwardModule()
    fit(module, AtrousRates(size))
    assert rates(module) == expected


def test_the_crop_counts_before_the_example_array() -> None:
    module = ForwardModule()
    module.example_input_array = torch.zeros(1, 1, 96, 96)
    fit(module, AtrousRates())
    assert rates(module) == [2, 4, 6]
    module = ForwardModule()
    module.example_input_array = torch.zeros(1, 1, 96, 96)
    fit(module, AtrousRates(), DataLoader(Stream(), batch_size=2))
    assert rates(module) == [4, 8, 12]


def test_c_and_rates() -> None:
    module = ForwardModule()
    fit(module, AtrousRates(c=0.25))
    assert rates(module) == [3, 6, 9]
    fit(module, AtrousRates(rates=(1, 5, 11)))
    assert rates(module) == [1, 5, 11]


def test_a_checkpoint_keeps_its_rates(tmp_path: Path) -> None:
    """On resume with another crop, with one warning; and in a test run of a fresh model, which has no training data to measure."""
    trainer = fit(ForwardModule(), AtrousRates())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = ForwardModule()
    with pytest.warns(NormkitWarning, match=r"keeps the rates of the checkpoint \(net.branches.0 2, "):
        fit(resumed, AtrousRates(), images(96), ckpt_path=tmp_path / "a.ckpt", max_epochs=2)
    assert rates(resumed) == [2, 4, 6]
    tested, callback = ForwardModule(), AtrousRates()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.test(tested, images(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert (rates(tested), callback.rates_set["net.branches.2"]) == ([2, 4, 6], 6)


def test_a_second_fit_changes_nothing() -> None:
    module, callback = ForwardModule(), AtrousRates()
    fit(module, callback)
    fit(module, callback)
    assert (rates(module), len(callback.changes.made), callback.rates_set["net.branches.0"]) == ([2, 4, 6], 3, 2)


@pytest.mark.parametrize("options", [{"input_size": 0}, {"input_size": "big"}, {"rates": (3, 2, 1)}])
def test_bad_options_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AtrousRates(**options)


def test_a_network_without_aspp_and_a_map_too_small() -> None:
    module = Module()
    module.net = nn.Conv2d(1, 2, 3)
    with pytest.warns(NormkitWarning, match="AtrousRates changes nothing: it looked for ASPPs.*the model has no ASPP"):
        assert fit(module, AtrousRates()).global_step == 2
    with pytest.raises(ConfigError, match="3 cells"):
        fit(ForwardModule(), AtrousRates(), images(12))
