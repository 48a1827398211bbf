"""`GammaDecay`: weight decay by the role of each parameter, with nothing to change in `configure_optimizers`."""

from __future__ import annotations

__all__ = ["GammaDecay"]

import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from pl_normkit.callbacks._first_batch import guess_inputs
from pl_normkit.callbacks._network import after_configure_model, is_sharded
from pl_normkit.errors import EditError, NormkitWarning, TraceError
from pl_normkit.methods.weight_decay import (
    HISTORY_FILE,
    DecayPolicy,
    GroupSplitter,
    ModelRoles,
    OptimizerLayout,
    check_group_sizes,
    check_layouts,
    optimizer_layout,
    parameter_names,
    plot_gamma_norms,
    read_model,
    read_part,
    resolve_policy,
    split_prebuilt,
    splitting_optimizer_groups,
    squared_gamma_norms,
    write_history,
)

_SHARDED = "configure_model both builds and shards the network; build it in __init__, or pass overrides"


class GammaDecay(Callback):
    """Splits every parameter group by role while the optimizers are built, so that decay reaches only what it should.

    Groups exist before any scheduler reads them; learning rates and other options of a group are kept. Roles are read once, from
    `example_inputs`, the module's `example_input_array` or two training samples; without any of them only module types are
    read, and one warning says so. The group layout is stored in checkpoints, and resuming with another one is refused.

    Args:
        weight_decay: decay of the weights; None takes each group's own, so a group without decay stays without.
        policy: `"gamma_roles"`, `"gamma_roles_extended"`, `"no_norm"`, `"all"` or a `DecayPolicy`.
        overrides: parameter-name pattern (names as in the LightningModule) -> multiple of the weight decay.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for the LightningModule's forward.
        record_every: steps between two records of the gamma norms; 0 switches record and plot off.

    Attributes:
        known: the roles, None before the fit is set up.
        history: role -> (step, gamma norm) pairs.

    Raises:
        ConfigError: for an unknown policy or an override that matches nothing, and on resume with another layout.
        EditError: when an optimizer exists before this callback could act, and has stepped or is driven by a scheduler that torch
            did not make. One that is merely built early (LightningCLI does that) is split together with torch's schedulers.
    """

    def __init__(
        self,
        weight_decay: float | None = None,
        policy: str | DecayPolicy = "gamma_roles",
        overrides: Mapping[str, float] | None = None,
        example_inputs: Any = None,
        record_every: int = 100,
    ) -> None:
        self.weight_decay = weight_decay
        self.policy = resolve_policy(policy, overrides)
        self.example_inputs = example_inputs
        self.record_every = record_every
        self.known: ModelRoles | None = None
        self.history: dict[str, list[tuple[int, float]]] = {}
        self._layouts: list[OptimizerLayout] | None = None
        self._saved_layouts: list[OptimizerLayout] | None = None
        self._saved_sizes: list[list[int]] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._layouts = self.known = None
        if any(True for _ in pl_module.parameters()):
            self._read(trainer, pl_module)
        after_configure_model(pl_module, lambda: self._read(trainer, pl_module))
        self._wrap_configure_optimizers(trainer, pl_module)

    def _read(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, last_chance: bool = False) -> None:
        """Read the roles unless they are known; what cannot be traced is read from module types, with a warning."""
        names = {name for name, _ in pl_module.named_parameters()}
        if self.known is not None and (self.known.is_traced or last_chance) and names <= set(self.known.roles):
            return
        if any(isinstance(parameter, DTensor) for parameter in pl_module.parameters()):
            self.known = read_model(pl_module)
            warnings.warn(f"GammaDecay reads module types alone: {_SHARDED}", NormkitWarning, stacklevel=2)
            return
        inputs = next((known for known in (self.example_inputs, pl_module.example_input_array) if known is not None), None)
        inputs = guess_inputs(trainer, pl_module) if inputs is None else inputs
        if inputs is None and not last_chance:
            return
        try:
            self.known = _read_network(pl_module, inputs)
        except TraceError as error:
            self.known = read_model(pl_module)
            warnings.warn(f"GammaDecay reads module types alone: {error}", NormkitWarning, stacklevel=2)

    def _wrap_configure_optimizers(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        configure = pl_module.configure_optimizers
        was_attribute = "configure_optimizers" in vars(pl_module)

        @functools.wraps(configure)
        def configure_split() -> Any:
            if was_attribute:
                pl_module.configure_optimizers = configure  # type: ignore[method-assign]
            else:
                del pl_module.configure_optimizers
            return self._configure(trainer, pl_module, configure)

        pl_module.configure_optimizers = configure_split  # type: ignore[method-assign]

    def _configure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, configure: Any) -> Any:
        self._read(trainer, pl_module, last_chance=True)
        if self.known is None:
            raise AssertionError("the last reading always ends with roles")
        names = parameter_names(pl_module)
        splitter = GroupSplitter(self.known, self.policy, names, self.weight_decay)
        with splitting_optimizer_groups(splitter) as built:
            configured = configure()
        optimizers = [leaf for leaf in tree_leaves(configured) if isinstance(leaf, Optimizer)]
        for optimizer in optimizers:
            if not any(optimizer is known for known in built):
                split_prebuilt(optimizer, _schedulers_of(optimizer, configured), splitter)
        splitter.warn_unknown(parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"])
        self._layouts = [optimizer_layout(optimizer, names) for optimizer in optimizers]
        self._check_saved()
        return configured

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._layouts is None and trainer.optimizers:
            raise _too_late(type(trainer.optimizers[0]).__name__)

    def state_dict(self) -> dict[str, Any]:
        return {"policy": self.policy.to_json(), "layouts": self._layouts, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved_layouts = state_dict["layouts"]
        self.history = state_dict["history"]
        self._check_saved()

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.state_key not in checkpoint.get("callbacks", {}):
            states = checkpoint.get("optimizer_states", [])
            self._saved_sizes = [[len(group["params"]) for group in state["param_groups"]] for state in states]
            self._check_saved()

    def _check_saved(self) -> None:
        """Whichever comes last, the checkpoint or the optimizers, compares the two."""
        if self._layouts is None:
            return
        if self._saved_layouts is not None:
            check_layouts(self._saved_layouts, self._layouts)
        elif self._saved_sizes:
            check_group_sizes(self._saved_sizes, self._layouts)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.record_every and trainer.global_step % self.record_every == 0:
            self._record(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record(trainer, pl_module)
        folder = trainer.log_dir if trainer.loggers else None  # broadcast from rank zero, so every rank asks
        if trainer.is_global_zero and folder is not None and any(self.history.values()):
            self._draw(trainer, Path(folder))

    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.record_every or self.known is None:
            return
        for role, square in squared_gamma_norms(pl_module, self.known).items():
            total = trainer.strategy.reduce(square, reduce_op="sum") if is_sharded(trainer) else square
            points = self.history.setdefault(role.value, [])
            if not points or points[-1][0] != trainer.global_step:
                points.append((trainer.global_step, float(total) ** 0.5))

    def _draw(self, trainer: pl.Trainer, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_history(self.history, folder / HISTORY_FILE)
        try:
            figure = plot_gamma_norms(self.history, folder / "gamma_norms.png")
        except ImportError:
            return
        for logger in trainer.loggers:
            board = getattr(logger, "experiment", None)
            if board is not None and hasattr(board, "add_figure"):
                board.add_figure("normkit/gamma_norms", figure, trainer.global_step)
            elif hasattr(logger, "log_image"):
                logger.log_image("normkit/gamma_norms", [str(folder / "gamma_norms.png")])


def _schedulers_of(optimizer: Optimizer, configured: Any) -> list[Any]:
    """The schedulers in the value of configure_optimizers that drive `optimizer`."""
    return [leaf for leaf in tree_leaves(configured) if leaf is not optimizer and getattr(leaf, "optimizer", None) is optimizer]


def _read_network(pl_module: pl.LightningModule, inputs: Any) -> ModelRoles:
    """Roles of the whole module; where it has no `forward` of its own, its only network is traced and the rest stays unknown."""
    networks = [name for name, child in pl_module.named_children() if any(True for _ in child.parameters())]
    if is_overridden("forward", pl_module) or len(networks) != 1:
        return read_model(pl_module, inputs)
    return read_part(pl_module, networks[0], inputs)


def _too_late(kind: str) -> EditError:
    return EditError(
        f"GammaDecay came too late: {kind} exists already, and a group cannot be split under a scheduler that has read it",
        where="configure_optimizers",
        mend="build the optimizer inside configure_optimizers and give GammaDecay to the Trainer before fit; "
        "or build its groups with pl_normkit.methods.weight_decay.param_groups",
    )
