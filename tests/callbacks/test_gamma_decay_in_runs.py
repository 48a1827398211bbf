"""GammaDecay in runs: several fits, modules built late or compiled, the command line, schedulers, the record of the norms."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

from pl_normkit.callbacks import GammaDecay
from pl_normkit.errors import ConfigError, NormkitWarning
from pl_normkit.methods.weight_decay import PRESETS, OptimizerSplitter, read_model
from tests.callbacks.decaying import DECAYED, EXPECTED, Module, Residual, adamw, decays_of, fit, loader, trainer_with


def equality(expected: dict[Any, Tensor], actual: dict[Any, Tensor]) -> dict[Any, bool]:
    """Bit for bit, key by key."""
    return {key: key in actual and torch.equal(value, actual[key]) for key, value in expected.items()}


def test_the_patch_lasts_only_while_the_optimizers_are_built() -> None:
    before = torch.optim.Optimizer.add_param_group

    def failing(_: pl.LightningModule) -> None:
        raise RuntimeError("the user's own error")

    fit(Module(), GammaDecay())
    assert torch.optim.Optimizer.add_param_group is before
    with pytest.raises(RuntimeError, match="the user's own error"):
        fit(Module(failing), GammaDecay())
    assert torch.optim.Optimizer.add_param_group is before


def test_a_second_fit_splits_again_and_other_stages_nothing() -> None:
    module, callback = Module(), GammaDecay()
    for _ in range(2):
        assert decays_of(fit(module, callback), module) == EXPECTED

    module.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign,assignment]
    trainer_with(callback).validate(module, loader(), verbose=False)
    assert "configure_optimizers" not in vars(module)


class BuiltLate(Module):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = Residual()


class WithoutForward(Module):
    forward = pl.LightningModule.forward

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def compiled_module() -> Module:
    module = Module()
    module.compile(backend="eager")
    return module


def compiled_network() -> Module:
    module = Module()
    module.net = torch.compile(module.net, backend="eager")  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("build", [BuiltLate, WithoutForward, compiled_module, compiled_network])
def test_however_the_module_is_built(build: Callable[[], Module]) -> None:
    module = build()
    decays = decays_of(fit(module, GammaDecay()), module)

    assert {name.replace("_orig_mod.", ""): decay for name, decay in decays.items()} == EXPECTED


def test_what_cannot_be_traced_is_read_by_type_with_a_warning() -> None:
    class Jumpy(Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.sum().item() > -1e9 else x

    for policy, unknown in (("no_norm", 0), ("gamma_roles", 1)):  # no scale is decayed by the first, whatever its role
        module = Jumpy()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", NormkitWarning)
            decays = decays_of(fit(module, GammaDecay(policy=policy)), module)
        told = [str(warning.message) for warning in seen if issubclass(warning.category, NormkitWarning)]
        assert (["module types alone" in text for text in told], len(told)) == ([True] + [False] * unknown, 1 + unknown)
        assert all("4 parameters is unknown" in text and "net.bn.weight" in text for text in told[1:])
        assert decays == EXPECTED


def test_an_unmatched_override_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'\*.missing' matches no parameter"):
        fit(Module(), GammaDecay(overrides={"*.missing": 0.0}))


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_lightning_cli_with_an_injected_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])

    class Plain(Module):
        def __init__(self) -> None:
            super().__init__()

        configure_optimizers = pl.LightningModule.configure_optimizers

    options = {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callback = GammaDecay()
    cli = LightningCLI(
        Plain,
        save_config_callback=None,
        run=False,
        seed_everything_default=False,
        trainer_defaults={**options, "callbacks": [callback], "enable_model_summary": False},
        args=["--optimizer=AdamW", "--optimizer.weight_decay=0.1", "--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.5"],
    )
    cli.trainer.fit(cli.model, loader())

    assert decays_of(cli.trainer, cli.model) == EXPECTED


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.5, total_iters=5),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 10),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 1e-2, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 1e-2, total_steps=20),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: schedulers.SequentialLR(o, [schedulers.ConstantLR(o, 0.1), schedulers.ExponentialLR(o, 0.9)], [2]),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler([schedulers.ConstantLR(o, 0.1), schedulers.ExponentialLR(o, 0.9)]),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 1e-3, 3),
}


def test_every_scheduler_of_torch_is_tried() -> None:
    known = {name for name, found in vars(schedulers).items() if inspect.isclass(found) and issubclass(found, schedulers.LRScheduler)}

    assert known - {"LRScheduler", "_LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_optimizer_built_early_follows_the_schedule_of_one_built_late(name: str) -> None:
    """LightningCLI builds optimizer and scheduler before any callback runs."""
    module = Module()
    splitter = OptimizerSplitter(module, read_model(module), PRESETS["no_norm"])
    early = adamw(module)
    early_scheduler = SCHEDULERS[name](early)
    with splitter.building():
        late = adamw(module)
    splitter.follow([early, late], [early_scheduler])
    late_scheduler = SCHEDULERS[name](late)

    assert len(early.param_groups) == 2
    for _ in range(6):
        assert early.state_dict() == late.state_dict()
        for optimizer, scheduler in ((early, early_scheduler), (late, late_scheduler)):
            arguments = (1.0,) if name == "ReduceLROnPlateau" else ()
            optimizer.step()
            scheduler.step(*arguments)


class Board(CSVLogger):
    """A logger that takes figures as TensorBoard's does, or images as Weights & Biases' does."""

    def __init__(self, folder: Path, kind: str) -> None:
        super().__init__(folder)
        self.shown: list[tuple[str, Any]] = []
        if kind == "images":
            self.log_image = lambda key, images: self.shown.append((key, images))
        else:
            self.experiment.add_figure = lambda key, figure, step: self.shown.append((key, step))  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["figures", "images"])
def test_gamma_norms_are_recorded_and_drawn(kind: str, tmp_path: Path) -> None:
    module, callback, logger = Module(), GammaDecay(record_every=2), Board(tmp_path, kind)
    fit(module, callback, steps=5, logger=logger)

    assert {role: [step for step, _ in points] for role, points in callback.history.items()} == {
        role: [0, 2, 4, 5] for role in ("gamma_last", "gamma_shortcut", "gamma_branch", "gamma_trunk")
    }
    assert callback.history["gamma_last"][0] == (0, pytest.approx(6**0.5))
    last = module.get_parameter("net.bn2.weight").detach()
    assert callback.history["gamma_last"][-1] == (5, pytest.approx(last.norm().item()))
    image = Path(logger.log_dir) / "gamma_norms.png"
    assert image.read_bytes().startswith(b"\x89PNG")
    assert logger.shown == [("normkit/gamma_norms", {"figures": 5, "images": [str(image)]}[kind])]


def test_without_a_logger_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    callback = GammaDecay()
    fit(Module(), callback)

    assert list(callback.history) == ["gamma_last", "gamma_shortcut", "gamma_branch", "gamma_trunk"]
    assert list(tmp_path.rglob("*")) == []


def test_recording_can_be_switched_off(tmp_path: Path) -> None:
    callback = GammaDecay(record_every=0)
    fit(Module(), callback, logger=CSVLogger(tmp_path))

    assert callback.history == {}
    assert list(tmp_path.rglob("*.png")) == []


def test_the_run_itself_is_the_same_as_with_groups_built_by_hand() -> None:
    def by_hand(module: pl.LightningModule) -> torch.optim.Optimizer:
        parameters = dict(module.named_parameters())
        groups = [
            {"params": [parameter for name, parameter in parameters.items() if (name in DECAYED) is decayed], "weight_decay": 0.1 * decayed}
            for decayed in (True, False)
        ]
        return torch.optim.AdamW(groups, lr=1e-2)

    split, manual = Module(), Module(by_hand)
    torch.manual_seed(0)
    fit(split, GammaDecay(), steps=4)
    torch.manual_seed(0)
    fit(manual, None, steps=4)

    assert equality(manual.state_dict(), split.state_dict()) == dict.fromkeys(manual.state_dict(), True)


def test_the_callback_can_be_copied() -> None:
    callback = copy.deepcopy(GammaDecay(policy="no_norm", overrides={"*.stem.*": 0.0}))

    assert callback.policy.name == "no_norm"


def test_wrapping_keeps_the_signature_of_the_users_method() -> None:
    module = Module()
    GammaDecay().setup(trainer_with(None), module, "fit")

    assert inspect.signature(module.configure_optimizers) == inspect.signature(Module().configure_optimizers)
    assert module.configure_optimizers.__name__ == "configure_optimizers"
