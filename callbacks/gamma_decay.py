"""`GammaDecay`: weight decay by the role of each parameter, with nothing to change in `configure_optimizers`."""

from __future__ import annotations

__all__ = ["GammaDecay"]

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from pl_normkit.callbacks._network import Callback, after_configure_model, current_fit, fit_of, is_sharded, networks_to_read
from pl_normkit.callbacks._wrapping import wrap_once
from pl_normkit.errors import EditError, NormkitWarning
from pl_normkit.methods.weight_decay import DecayPolicy, ModelRoles, OptimizerSplitter
from pl_normkit.methods.weight_decay.find import are_sharded, read_parts
from pl_normkit.methods.weight_decay.layout import SavedLayouts
from pl_normkit.methods.weight_decay.measure import NormHistory, add_gamma_norms, draw_history, squared_gamma_norms
from pl_normkit.methods.weight_decay.policy import DEFAULT, resolve_policy
from pl_normkit.surgery import Changes

_NOTHING = "GammaDecay changes nothing: it looked for parameter groups whose weight decay reaches what it should not"
_SHARDED = "configure_model both builds and shards the network; build it in __init__, or pass overrides"


class GammaDecay(Callback):
    """Splits every parameter group by role while optimizers are built, and those added later, so that decay reaches only what it should.

    Other options of a group are kept. Roles are read once, from `example_inputs`, the module's `example_input_array` or, for every
    network that a training step calls, from two training samples; without any of them module types alone are read. The layout of the
    groups is stored in checkpoints, and resuming with another one is refused. A run in which no group changes goes on, with one warning.

    Args:
        weight_decay: decay of the weights; None takes each group's own, so a group without decay stays without.
        policy: as for `param_groups`; by default no norm, bias or special parameter is decayed. `"gamma_roles"` decays scales in
            branches too: not shown to help, and shallow networks lost by it at strong decay.
        overrides: parameter-name pattern (names as in the LightningModule) -> multiple of the weight decay.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for the LightningModule's forward.
        record_every: steps between two records of the gamma norms; 0 switches record and plot off.

    Attributes:
        changes: what became of each group; `undo()` gives every parameter the decay of its group again.
        known, history: the roles, None before the fit is set up; role -> (step, gamma norm) pairs.

    Raises:
        ConfigError: for an unknown policy or an override that matches nothing, and on resume with another layout.
        EditError: when an optimizer that exists already has stepped, or has a scheduler that torch did not make.
    """

    _of_a_run = ("_splitter",)

    def __init__(
        self,
        weight_decay: float | None = None,
        policy: str | DecayPolicy = DEFAULT,
        overrides: Mapping[str, float] | None = None,
        example_inputs: Any = None,
        record_every: int = 100,
    ) -> None:
        self.weight_decay = weight_decay
        self.policy = resolve_policy(policy, overrides)
        self.example_inputs = example_inputs
        self.record_every = record_every
        self.changes = Changes()
        self.known: ModelRoles | None = None
        self.history: NormHistory = {}
        self._splitter: OptimizerSplitter | None = None
        self._saved = SavedLayouts()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        fit_of(self, trainer, pl_module)
        if stage != "fit":
            return
        self._splitter = self.known = None
        if any(True for _ in pl_module.parameters()):
            self._read(trainer, pl_module)
        after_configure_model(pl_module, lambda: self._read(trainer, pl_module))
        wrap_once(pl_module, "configure_optimizers", lambda configure: self._split(trainer, pl_module, configure))

    def _read(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, last_chance: bool = False) -> None:
        """Read the roles unless they are known; what cannot be traced is read from module types, with a warning."""
        names = {name for name, _ in pl_module.named_parameters()}
        if self.known is not None and names <= set(self.known.roles):
            return
        calls: list[Any] = []
        failure = _SHARDED if are_sharded(pl_module) else ""
        if self.policy.needs_roles and not failure:
            calls = networks_to_read(trainer, pl_module, self.example_inputs)
            if not calls and not last_chance:
                return
        with current_fit(trainer, pl_module).sharing():
            self.known, failures = read_parts(pl_module, calls)
        if (failures or failure) and self.policy.needs_roles:
            what = "; ".join(map(str, failures)) or failure
            warnings.warn(f"GammaDecay reads module types alone: {what}", NormkitWarning, stacklevel=2)

    def _split(self, trainer: pl.Trainer, pl_module: pl.LightningModule, configure: Callable[[], Any]) -> Any:
        self._read(trainer, pl_module, last_chance=True)
        assert self.known is not None  # the last reading always ends with roles
        self._splitter = OptimizerSplitter(pl_module, self.known, self.policy, self.weight_decay)
        with self._splitter.building():
            configured = configure()
        self._splitter.follow([leaf for leaf in tree_leaves(configured) if isinstance(leaf, Optimizer)], configured)
        self.changes = self._splitter.changes
        self._saved.check_on_load(self._splitter.optimizers, self._splitter.layouts)
        if self.changes:
            rank_zero_info(f"GammaDecay, policy {self.policy.name!r}: {self._splitter.summary()}")
        else:
            warnings.warn(f"{_NOTHING}. {self._splitter.summary()}", NormkitWarning, stacklevel=2)
        return configured

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._splitter is None and trainer.optimizers:
            what = f"GammaDecay came too late: {type(trainer.optimizers[0]).__name__} exists already"
            raise EditError(what, fix="give GammaDecay to the Trainer before fit, or build the groups with pl_normkit.param_groups")

    def state_dict(self) -> dict[str, Any]:
        return {"policy": self.policy.to_json(), "layouts": self._splitter and self._splitter.layouts(), "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved.take(checkpoint, self.state_key)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved.clear()
        self._record(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.record_every and trainer.global_step % self.record_every == 0:
            self._record(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record(trainer, pl_module)
        if self._splitter is not None:
            self._splitter.release()
        folder = trainer.log_dir if trainer.loggers else None  # broadcast from rank zero, so every rank asks
        if trainer.is_global_zero and folder is not None and any(self.history.values()):
            draw_history(self.history, folder, trainer.loggers, trainer.global_step)

    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.record_every and self.known is not None:
            total = partial(trainer.strategy.reduce, reduce_op="sum") if is_sharded(trainer) else float
            add_gamma_norms(self.history, squared_gamma_norms(pl_module, self.known), trainer.global_step, total)
