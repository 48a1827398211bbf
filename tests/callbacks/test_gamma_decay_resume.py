"""GammaDecay and checkpoints: a resumed run is the run, another layout is refused, groups of other callbacks count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor

from pl_normkit.callbacks import GammaDecay
from pl_normkit.errors import ConfigError
from pl_normkit.methods.weight_decay import read_model
from tests.callbacks.decaying import DECAYED, EXPECTED, SPARED, Module, adamw, decays_of, fit, loader, trainer_with
from tests.callbacks.test_gamma_decay import two_optimizers
from tests.callbacks.test_gamma_decay_in_runs import SCHEDULERS, equality


class SaveEpoch(pl.Callback):
    def __init__(self, epoch: int, path: Path) -> None:
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def flat(state: dict[int, dict[str, Tensor]]) -> dict[tuple[int, str], Tensor]:
    return {(index, key): value for index, kept in state.items() for key, value in kept.items()}


@pytest.fixture
def _roles_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same network is fitted again and again here: trace it once."""
    known = read_model(Module(), torch.zeros(2, 3, 8, 8))
    monkeypatch.setattr("pl_normkit.callbacks.gamma_decay.read_parts", lambda *_: (known, []))


def scheduled(name: str) -> Callable[[pl.LightningModule], Any]:
    def configure(module: pl.LightningModule) -> Any:
        optimizer = adamw(module)
        scheduler = {"scheduler": SCHEDULERS[name](optimizer), "interval": "step", "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    return configure


@pytest.mark.usefixtures("_roles_read_once")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
def test_one_epoch_and_one_more_are_two(name: str, tmp_path: Path) -> None:
    of_two_epochs: dict[str, Any] = {"steps": -1, "max_epochs": 2}
    whole = Module(scheduled(name))
    at_once = fit(whole, GammaDecay(), SaveEpoch(0, tmp_path / "half.ckpt"), **of_two_epochs)
    resumed = Module(scheduled(name))
    in_two = fit(resumed, GammaDecay(), ckpt_path=tmp_path / "half.ckpt", **of_two_epochs)

    assert equality(whole.state_dict(), resumed.state_dict()) == dict.fromkeys(whole.state_dict(), True)
    expected, actual = at_once.optimizers[0].state_dict(), in_two.optimizers[0].state_dict()
    assert expected["param_groups"] == actual["param_groups"]
    before, after = flat(expected["state"]), flat(actual["state"])
    assert equality(before, after) == dict.fromkeys(before, True)
    assert len(before) == 3 * (len(DECAYED) + len(SPARED))
    assert {step.item() for (_, key), step in after.items() if key == "step"} == {8.0}


def checkpoint_of(module: Module, callback: GammaDecay | None, folder: Path) -> Path:
    fit(module, callback).save_checkpoint(folder / "run.ckpt")
    return folder / "run.ckpt"


def test_resuming_with_another_layout_is_refused_by_name(tmp_path: Path) -> None:
    path = checkpoint_of(Module(), GammaDecay(policy="no_norm"), tmp_path)

    with pytest.raises(ConfigError, match=r"net\.bn1\.weight \(1 -> 0\), net\.bn2\.weight \(1 -> 0\)"):
        fit(Module(), GammaDecay(policy="gamma_roles"), steps=4, ckpt_path=path)


def test_resuming_a_run_without_the_callback_is_refused(tmp_path: Path) -> None:
    path = checkpoint_of(Module(), None, tmp_path)

    with pytest.raises(ConfigError, match=r"\[\[14\]\] before, \[\[5, 9\]\] now"):
        fit(Module(), GammaDecay(), steps=4, ckpt_path=path)


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze([pl_module.net.stem, pl_module.net.bn], train_bn=False)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        late = [pl_module.net.stem, pl_module.net.bn]
        if epoch >= 1:
            self.make_trainable(late)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if epoch >= 1 and id(pl_module.net.stem.weight) not in held:  # on resume it is in there already
            self.unfreeze_and_add_param_group(late, optimizer, lr=0.01)


def trainable(module: pl.LightningModule) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("order", [1, -1])
def test_groups_added_in_mid_run_are_split_too(order: int, tmp_path: Path) -> None:
    """Also those that come again on resume, and a checkpoint with them is taken."""
    options: dict[str, Any] = {"steps": -1, "max_epochs": 3}
    whole, halves = Module(trainable), [Module(trainable), Module(trainable)]

    def callbacks(*more: pl.Callback) -> list[pl.Callback]:
        return [*[GammaDecay(record_every=0), Unfreeze()][::order], *more]

    at_once = fit(whole, *callbacks(), **options)
    assert decays_of(at_once, whole) == EXPECTED
    assert [(group["lr"], len(group["params"])) for group in at_once.optimizers[0].param_groups[2:]] == [(0.01, 1), (0.01, 2)]

    fit(halves[0], *callbacks(SaveEpoch(1, tmp_path / "half.ckpt")), **options)
    in_two = fit(halves[1], *callbacks(), ckpt_path=tmp_path / "half.ckpt", **options)
    assert decays_of(in_two, halves[1]) == EXPECTED
    assert equality(whole.state_dict(), halves[1].state_dict()) == dict.fromkeys(whole.state_dict(), True)


def test_more_optimizers_than_before_are_refused(tmp_path: Path) -> None:
    path = checkpoint_of(Module(manual=True), GammaDecay(), tmp_path)

    with pytest.raises(ConfigError, match="holds 1 optimizers, this run has 2"):
        fit(Module(two_optimizers, manual=True), GammaDecay(), steps=4, ckpt_path=path)


def test_validating_a_checkpoint_of_a_run_without_the_callback_is_fine(tmp_path: Path) -> None:
    path = checkpoint_of(Module(), None, tmp_path)
    module = Module()
    module.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign,assignment]

    assert trainer_with(GammaDecay()).validate(module, loader(), ckpt_path=path, verbose=False) == [{}]
