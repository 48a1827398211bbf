"""`TimestepEmbedding` in a Trainer: applied once, before optimizer and wrappers, found again on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import TimestepEmbedding
from pl_normkit.errors import ConfigError, NormkitWarning
from pl_normkit.methods.timestep_embedding import apply_positional_time
from tests.methods.timestep_embedding.networks import AdaptiveBlock, ResBlock, res_block


class Module(pl.LightningModule):
    def __init__(self, norm: str = "instance") -> None:
        super().__init__()
        self.example_input_array = ResBlock.inputs()
        if norm:
            self.net = res_block(norm)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.net(x, temb)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self(*batch).square().mean()

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.randn(4, 3, 8, 8), torch.randn(4, 16)), batch_size=2)


def trainer(callback: TimestepEmbedding, folder: Path, *earlier: pl.Callback, epochs: int = 1) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[*earlier, callback],
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_it_is_applied_once_over_all_stages_trained_and_resumed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = Module(), TimestepEmbedding()
    first = trainer(callback, tmp_path)
    first.fit(module, loader())
    assert [change.module for change in callback.changes.made] == ["net.temb_proj.1", "net.block2.0"]
    first.test(module, loader(), verbose=False)
    assert len(callback.changes.made) == 2
    first.save_checkpoint(tmp_path / "last.ckpt")

    resumed = Module()
    trainer(TimestepEmbedding(), tmp_path).fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert {name: value.tolist() for name, value in resumed.state_dict().items()} == {
        name: value.tolist() for name, value in module.state_dict().items()
    }


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize(("remedy", "changed"), [("bias", ["net.temb_proj.1"]), ("groups", ["net.block2.0"])])
def test_the_other_remedies(remedy: Any, changed: list[str], tmp_path: Path) -> None:
    module, callback = Module("group of 4"), TimestepEmbedding(remedy)
    trainer(callback, tmp_path).fit(module, loader())
    assert [change.module for change in callback.changes.made] == changed


class BuiltLate(Module):
    def __init__(self) -> None:
        super().__init__("")

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = res_block("instance")


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_network_that_is_built_late(tmp_path: Path) -> None:
    callback = TimestepEmbedding()
    trainer(callback, tmp_path).fit(BuiltLate(), loader())
    assert [change.module for change in callback.changes.made] == ["net.temb_proj.1", "net.block2.0"]


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="positional"):
        TimestepEmbedding("positionnal")  # type: ignore[arg-type]
    module = Module()
    module.example_input_array = None
    with pytest.raises(ConfigError, match="what the network is called with"):
        trainer(TimestepEmbedding(), tmp_path).fit(module, loader())
    with pytest.raises(ConfigError, match="EMAWeightAveraging copied the network before TimestepEmbedding"):
        trainer(TimestepEmbedding(), tmp_path, EMAWeightAveraging()).fit(Module(), loader())


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_network_with_nothing_to_remedy_trains_as_it_is(tmp_path: Path) -> None:
    module = Module()
    module.net = AdaptiveBlock()  # type: ignore[assignment]
    with pytest.warns(NormkitWarning, match="times that a norm takes something of"):
        trainer(TimestepEmbedding(example_inputs=ResBlock.inputs()), tmp_path).fit(module, loader())


def test_ddp_reduces_the_new_parameters(tmp_path: Path) -> None:
    """One process is enough to see that DDP takes every parameter into a bucket and finds none without a gradient."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model, inputs = res_block("instance"), ResBlock.inputs()
        apply_positional_time(model, inputs)
        wrapped = DistributedDataParallel(model)
        for _ in range(2):  # the second forward fails where a parameter had no gradient
            wrapped(*inputs).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
