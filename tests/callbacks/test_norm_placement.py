"""`NormPlacement` in a Trainer: placed before the optimizer, resumed bit for bit, evaluated from a checkpoint with its own placement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit import restore_edits
from pl_normkit.callbacks import NormPlacement
from pl_normkit.errors import ConfigError, EditError, NormkitWarning

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:enable_nested_tensor")


class Module(pl.LightningModule):
    def __init__(self, norm_first: bool = True, inputs: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=norm_first)
        self.net = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        if inputs:
            self.example_input_array = torch.randn(2, 5, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return (self(batch[0]) - 1).square().mean()

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("loss", (self(batch[0]) - 1).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.linspace(-1, 1, 160).reshape(4, 5, 8)), batch_size=2)


def trainer(folder: Path, *callbacks: pl.Callback, epochs: int = 1, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=list(callbacks), **options,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "norm_first", "inputs"), [("peri", True, False), ("post", True, True), ("deepnorm", False, True)])
def test_it_is_placed_once_trained_and_resumed(kind: str, norm_first: bool, inputs: bool, tmp_path: Path) -> None:
    module, callback = Module(norm_first, inputs), NormPlacement(kind)
    first = trainer(tmp_path, callback)
    first.fit(module, loader())
    made = len(callback.changes.made)
    assert made
    first.save_checkpoint(tmp_path / "last.ckpt")
    [expected] = first.test(module, loader(), verbose=False)
    assert len(callback.changes.made) == made
    new = [parameter for name, parameter in module.named_parameters() if "placed" in name]
    held = {id(parameter) for group in first.optimizers[0].param_groups for parameter in group["params"]}
    assert {id(parameter) for parameter in new} <= held
    assert all(bool((parameter != parameter.flatten()[0]).any()) for parameter in new)  # they were trained

    torch.manual_seed(1)
    first.fit_loop.max_epochs = 2
    first.fit(module, loader())
    resumed = Module(norm_first, inputs)
    torch.manual_seed(1)
    trainer(tmp_path, NormPlacement(kind), epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.state_dict().keys() == module.state_dict().keys()

    evaluated = Module(norm_first, inputs)
    [found] = trainer(tmp_path, NormPlacement(kind)).test(evaluated, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert found == expected

    by_hand = Module(norm_first, inputs)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert restore_edits(by_hand, checkpoint)
    assert restore_edits(by_hand, checkpoint).made == []
    by_hand.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(by_hand.eval()(loader().dataset[:][0]), evaluated.eval()(loader().dataset[:][0]))


def test_resuming_goes_on_as_one_run(tmp_path: Path) -> None:
    def fit(epochs: int, **options: Any) -> Module:
        module = Module()
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
            if isinstance(part, nn.MultiheadAttention):
                part.dropout = 0.0
        run = trainer(tmp_path, NormPlacement("mix"), epochs=epochs)
        run.fit(module, loader(), **options)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    whole = fit(2)
    fit(1)
    resumed = fit(2, ckpt_path=tmp_path / "1.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_run_that_cannot_be_what_was_asked_for_stops(tmp_path: Path) -> None:
    with pytest.raises(EditError, match="'deepnorm' cannot be placed without rewriting forward"):
        trainer(tmp_path, NormPlacement("deepnorm")).fit(Module(), loader())
    trained = Module()
    trained.net.layers[0].norm1.weight.data[0] = 2.0
    with pytest.raises(EditError, match="changes what a trained model computes"):
        trainer(tmp_path, NormPlacement("peri")).fit(trained, loader())
    trainer(tmp_path, NormPlacement("peri", retrain=True)).fit(trained, loader())


def test_a_network_without_blocks_gets_one_warning(tmp_path: Path) -> None:
    module = Module()
    module.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with pytest.warns(NormkitWarning, match="NormPlacement changes nothing: it looked for residual blocks"):
        trainer(tmp_path, NormPlacement("peri")).fit(module, loader())


def test_bad_kinds_are_refused_when_it_is_built() -> None:
    with pytest.raises(ConfigError, match="there is no norm placement 'perry'"):
        NormPlacement("perry")
    with pytest.raises(ConfigError, match="'peri' has no option 'share'"):
        NormPlacement("peri", share=0.5)
