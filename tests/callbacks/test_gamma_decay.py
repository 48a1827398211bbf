"""GammaDecay splits groups by role in whatever form optimizers are configured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import lr_scheduler as schedulers

from pl_normkit.callbacks import GammaDecay
from pl_normkit.errors import EditError, NormkitWarning
from pl_normkit.methods.weight_decay import param_groups
from tests.callbacks.decaying import DECAYED, EXPECTED, SPARED, Module, adamw, decays_of, fit

SCALES_IN_BRANCH = {"net.bn1.weight", "net.bn2.weight"}


def test_decay_goes_by_role_with_nothing_changed_in_the_users_code() -> None:
    module = Module()
    trainer = fit(module, GammaDecay())

    assert decays_of(trainer, module) == EXPECTED
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [len(DECAYED), len(SPARED)]
    assert "configure_optimizers" not in vars(module)


def test_scales_in_branches_are_decayed_when_asked_for() -> None:
    module = Module()

    assert decays_of(fit(module, GammaDecay(policy="gamma_roles")), module) == EXPECTED | dict.fromkeys(SCALES_IN_BRANCH, 0.1)


def test_the_rule_of_another_library_needs_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("pl_normkit.graph.ModelGraph.from_model")
    module = Module()

    assert decays_of(fit(module, GammaDecay(policy="timm")), module) == EXPECTED


def test_what_was_done_is_told_and_can_be_taken_back() -> None:
    module, callback = Module(), GammaDecay()
    trainer = fit(module, callback)

    assert str(callback.changes) == "AdamW: decay 0.1 of a group becomes 5 with 0.1, 9 with 0"
    callback.changes.undo()
    assert decays_of(trainer, module) == dict.fromkeys(EXPECTED, 0.1)


@pytest.mark.parametrize(
    ("configure", "why"),
    [
        (lambda module: torch.optim.AdamW(module.parameters(), weight_decay=0.0), "No optimizer has a weight decay"),
        (lambda module: torch.optim.AdamW(param_groups(module, 0.1)), "Every parameter has the decay already that policy 'no_norm'"),
    ],
)
def test_a_run_in_which_nothing_changes_goes_on_with_one_warning(configure: Callable[[nn.Module], Any], why: str) -> None:
    module, callback = Module(configure), GammaDecay()
    with pytest.warns(NormkitWarning, match=f"GammaDecay changes nothing: it looked for parameter groups.*{why}") as seen:
        trainer = fit(module, callback)

    assert (trainer.global_step, bool(callback.changes), len([w for w in seen if w.category is NormkitWarning])) == (2, False, 1)


def test_a_group_with_a_name_keeps_it_and_names_stay_apart() -> None:
    """Lightning's monitor refuses two groups of one name."""
    module = Module(lambda m: torch.optim.AdamW([{"params": list(m.parameters()), "name": "net"}], lr=0.1, weight_decay=0.1))
    fit(module, callback := GammaDecay(), LearningRateMonitor(), logger=CSVLogger(tempfile.mkdtemp()))

    assert [group["name"] for group in module.trainer.optimizers[0].param_groups] == ["net", "net, decay 0"]
    assert str(callback.changes) == "AdamW: decay 0.1 of net becomes 5 with 0.1, 9 with 0"


def test_a_parameter_that_is_added_and_unknown_is_named() -> None:
    class Grow(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == 1:
                pl_module.register_parameter("late", nn.Parameter(torch.zeros(2, 2)))
                trainer.optimizers[0].add_param_group({"params": [pl_module.late]})

    module = Module()
    with pytest.warns(NormkitWarning, match="the role of 1 parameters is unknown.*: late"):
        trainer = fit(module, GammaDecay(), Grow())
    assert decays_of(trainer, module) == {**EXPECTED, "late": 0.0}
    with pytest.raises(ValueError, match="more than one parameter group"):
        trainer.optimizers[0].add_param_group({"params": [module.net.stem.weight]})


def step_lr(optimizer: torch.optim.Optimizer) -> Any:
    return schedulers.StepLR(optimizer, 1)


def two_optimizers(module: pl.LightningModule) -> list[torch.optim.Optimizer]:
    net = module.get_submodule("net")
    head = list(net.get_submodule("head").parameters())
    body = [parameter for parameter in net.parameters() if not any(parameter is known for known in head)]
    return [torch.optim.SGD(body, lr=0.1, weight_decay=0.1), torch.optim.AdamW(iter(head), lr=0.1, weight_decay=0.1)]


def with_scheduler(form: str) -> Callable[[pl.LightningModule], Any]:
    def configure(module: pl.LightningModule) -> Any:
        optimizer = adamw(module)
        scheduler = step_lr(optimizer)
        return {
            "lists": ([optimizer], [scheduler]),
            "dict": {"optimizer": optimizer, "lr_scheduler": scheduler},
            "nested": {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}},
            "tuple of dicts": ({"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}},),
            "list": [optimizer],
            "named": optimizer,
        }[form]

    return configure


@pytest.mark.parametrize("form", ["lists", "dict", "nested", "tuple of dicts", "list"])
def test_every_form_that_lightning_allows(form: str) -> None:
    module = Module(with_scheduler(form))

    assert decays_of(fit(module, GammaDecay()), module) == EXPECTED


def test_several_optimizers_in_manual_optimization() -> None:
    module = Module(two_optimizers, manual=True)
    trainer = fit(module, GammaDecay())

    assert decays_of(trainer, module) == EXPECTED
    assert [len(optimizer.param_groups) for optimizer in trainer.optimizers] == [2, 2]


def test_named_parameters_and_other_options_are_kept() -> None:
    def configure(module: pl.LightningModule) -> torch.optim.Optimizer:
        net = module.get_submodule("net")
        head = {f"head.{name}" for name, _ in net.get_submodule("head").named_parameters()}
        groups = [
            {"params": [(name, p) for name, p in net.named_parameters() if name not in head], "lr": 0.01, "betas": (0.8, 0.9)},
            {"params": [(name, p) for name, p in net.named_parameters() if name in head], "lr": 0.1, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, weight_decay=0.1)

    module = Module(configure)
    trainer = fit(module, GammaDecay())
    groups = trainer.optimizers[0].param_groups

    assert [(group["lr"], group["betas"], group["weight_decay"]) for group in groups] == [
        (0.01, (0.8, 0.9), 0.1),
        (0.01, (0.8, 0.9), 0.0),
        (0.1, (0.9, 0.999), 0.0),
    ]
    assert {f"net.{name}" for name in groups[0]["param_names"]} == DECAYED - {"net.head.weight"}


def test_a_decay_of_its_own_holds_for_every_group() -> None:
    module = Module(lambda module: torch.optim.SGD(module.parameters(), lr=0.1))

    assert decays_of(fit(module, GammaDecay(weight_decay=0.3, overrides={"*.bn_down.*": 0.5})), module) == {
        **{name: 3 * decay for name, decay in EXPECTED.items()},
        "net.bn_down.weight": 0.15,
        "net.bn_down.bias": 0.15,
    } | dict.fromkeys(DECAYED, 0.3)


def test_no_configure_optimizers_and_an_optimizer_without_decay_are_left_alone() -> None:
    module = Module(lambda module: torch.optim.LBFGS(module.parameters()))
    with pytest.warns(NormkitWarning, match="GammaDecay changes nothing.*LBFGS has no weight decay"):
        trainer = fit(module, GammaDecay(), steps=1)
    assert len(trainer.optimizers[0].param_groups) == 1

    nothing = Module(lambda module: None, manual=True)
    nothing.training_step = lambda batch, batch_idx: None  # type: ignore[method-assign,assignment,return-value]
    with (
        pytest.warns(UserWarning, match="returned `None`"),
        pytest.warns(NormkitWarning, match="GammaDecay changes nothing.*There is no optimizer"),
    ):
        trainer = fit(nothing, GammaDecay(), max_epochs=1)
    assert decays_of(trainer, nothing) == {}


@pytest.mark.parametrize("reason", ["it has stepped", "its scheduler Own may keep a value per group"])
def test_an_optimizer_built_too_early_is_refused(reason: str) -> None:
    class Own(schedulers.StepLR):
        pass

    module = Module()
    early = adamw(module)
    if reason == "it has stepped":
        module(torch.zeros(2, 3, 8, 8)).sum().backward()
        early.step()
    module.configure = lambda _: ([early], [] if early.state else [Own(early, 1)])

    with pytest.raises(EditError, match=f"AdamW exists already, and {reason}"):
        fit(module, GammaDecay())
    assert [len(group["params"]) for group in early.param_groups] == [14]


def test_a_callback_that_was_never_set_up_is_refused() -> None:
    class Late(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.callbacks.append(GammaDecay())  # type: ignore[attr-defined]

    with pytest.raises(EditError, match="came too late"):
        fit(Module(), Late())


def test_an_optimizer_of_an_earlier_fit_is_left_as_it_is() -> None:
    module = Module()
    kept = adamw(module)
    module.configure = lambda _: [kept]
    fit(module, GammaDecay())
    before = [(len(group["params"]), group["weight_decay"]) for group in kept.param_groups]
    with pytest.warns(NormkitWarning, match="Every parameter has the decay already"):
        fit(module, GammaDecay())
    assert [(len(group["params"]), group["weight_decay"]) for group in kept.param_groups] == before
