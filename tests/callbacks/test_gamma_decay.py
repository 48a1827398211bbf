from __future__ import annotations

import copy
import inspect
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import GammaDecay
from pl_normkit.errors import ConfigError, EditError, NormkitWarning
from pl_normkit.methods.weight_decay import PRESETS, OptimizerSplitter, param_groups, read_model

DECAYED = {f"net.{layer}.weight" for layer in ("stem", "conv1", "conv2", "down", "head")}
SPARED = {f"net.{norm}.{leaf}" for norm in ("bn", "bn1", "bn2", "bn_down") for leaf in ("weight", "bias")} | {"net.head.bias"}
SCALES_IN_BRANCH = {"net.bn1.weight", "net.bn2.weight"}


class Residual(nn.Module):
    """Stem, one post-activation block with a projection shortcut, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.down = nn.Conv2d(4, 6, 1, bias=False)
        self.bn_down = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        branch = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        x = torch.relu(branch + self.bn_down(self.down(x)))
        return self.head(x.mean((2, 3)))


def adamw(module: pl.LightningModule) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)


class Module(pl.LightningModule):
    """`configure` is what the user wrote as configure_optimizers."""

    def __init__(self, configure: Callable[[pl.LightningModule], Any] = adamw, *, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = Residual()
        self.configure = configure
        self.automatic_optimization = not manual

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        if not self.automatic_optimization:
            optimizers = self.optimizers()
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(16, 3, 8, 8, generator=generator), torch.randint(3, (16,), generator=generator))
    return DataLoader(data, batch_size=4)


def trainer_with(*callbacks: pl.Callback | None, steps: int = 2, **options: Any) -> pl.Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lasting = {"max_steps": steps, "max_epochs": -1, "log_every_n_steps": 1, "enable_model_summary": False}
    return pl.Trainer(**{**quiet, **lasting, **options}, callbacks=[callback for callback in callbacks if callback is not None])


def fit(module: pl.LightningModule, *callbacks: pl.Callback | None, ckpt_path: Path | None = None, **options: Any) -> pl.Trainer:
    trainer = trainer_with(*callbacks, **options)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer


def decays_of(trainer: pl.Trainer, module: nn.Module) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        names[id(parameter)]: group["weight_decay"]
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def equality(expected: dict[Any, Tensor], actual: dict[Any, Tensor]) -> dict[Any, bool]:
    """Bit for bit, key by key."""
    return {key: key in actual and torch.equal(value, actual[key]) for key, value in expected.items()}


EXPECTED = {**dict.fromkeys(DECAYED, 0.1), **dict.fromkeys(SPARED, 0.0)}


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
