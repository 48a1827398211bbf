"""`GaussianBias` in a Trainer: added once, before the optimizer and the wrappers, found again on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import GaussianBias
from pl_normkit.errors import ConfigError, NormkitWarning
from pl_normkit.nn import GaussianAttentionBias
from tests.callbacks.biased_runs import Module, network
from tests.callbacks.processes import run_on_two_ranks

KINDS = ("ddp_heads", "fsdp2_heads", "ddp_relpos", "fsdp2_relpos", "fsdp2_late")


class BuiltLate(Module):
    """The network is there after `configure_model` only; nothing is sharded."""

    def __init__(self) -> None:
        super().__init__("late")

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = network()

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.net(batch[0])


class Built(BuiltLate):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.randn(8, 3, 16, 16), torch.randint(3, (8,))), batch_size=4)


def trainer(callback: GaussianBias, folder: Path, epochs: int = 1) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[callback],
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("kind", [Built, BuiltLate])
def test_it_is_added_once_over_all_stages_trained_and_resumed(kind: type[BuiltLate], tmp_path: Path) -> None:
    module, callback = kind(), GaussianBias(sigma=2.0)
    first = trainer(callback, tmp_path)
    first.fit(module, loader())
    biases = [part for part in module.modules() if isinstance(part, GaussianAttentionBias)]
    assert [change.module for change in callback.changes.made] == ["net.patch_embed.proj", "net.blocks.0.attn", "net.blocks.1.attn"]
    assert biases[0].sigma.item() != 2.0
    first.test(module, loader(), verbose=False)
    assert len(callback.changes.made) == 3
    first.save_checkpoint(tmp_path / "last.ckpt")

    resumed = kind()
    trainer(GaussianBias(), tmp_path, epochs=1).fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert {name: value.tolist() for name, value in resumed.state_dict().items()} == {
        name: value.tolist() for name, value in module.state_dict().items()
    }
    callback.changes.undo()
    assert [part for part in module.modules() if isinstance(part, GaussianAttentionBias)] == []


def test_bad_arguments_and_models_without_attention(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        GaussianBias(amplitude=0.0)
    module, callback, run = BuiltLate(), GaussianBias(), trainer(GaussianBias(), tmp_path)
    module.net = torch.nn.Linear(3, 3)

    def set_up(stage: str) -> None:
        callback.setup(run, module, stage)
        module.configure_model()

    with pytest.warns(NormkitWarning, match="GaussianBias changes nothing: it looked for self-attention over a grid of patches"):
        set_up("fit")
    set_up("test")  # said once
    assert "configure_model" not in vars(module)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The biases after two steps, in each of two processes, by kind."""
    return run_on_two_ranks("biased_runs", tmp_path_factory.mktemp("ranks"), *KINDS)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_ranks_train_one_bias_under(kind: str, runs: list[dict[str, Any]]) -> None:
    first, second = (run[kind] for run in runs)
    assert first == second
    start = {"amplitude": 1.0, "sigma": 2.0}
    moved = {name: values for name, values in first.items() if values[0] != start[name.rpartition(".")[2]]}
    assert len(first) == 4
    assert len(moved) == (4 if "relpos" in kind else 2)  # a class token alone gives the last layer's bias no gradient


@pytest.mark.parametrize(("sharded", "whole"), [("fsdp2_heads", "ddp_heads"), ("fsdp2_relpos", "ddp_relpos")])
def test_sharding_trains_the_same_bias_as_ddp(sharded: str, whole: str, runs: list[dict[str, Any]]) -> None:
    assert runs[0][sharded] == {name: pytest.approx(values, rel=1e-5) for name, values in runs[0][whole].items()}


def test_a_network_that_is_built_and_sharded_at_once_is_refused(runs: list[dict[str, Any]]) -> None:
    assert runs[0]["fsdp2_late"]["error"].startswith("EditError: configure_model both builds and shards the network")
