"""`ScaleEqualization`: calibrates scale equalizers on the training data before the first step, once."""

from __future__ import annotations

__all__ = ["ScaleEqualization"]

import copy
import itertools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from pl_normkit.callbacks._first_batch import first_samples
from pl_normkit.callbacks._network import after_configure_model
from pl_normkit.errors import ConfigError, EditError, NormkitWarning
from pl_normkit.methods.fusion_scale.calibrate import Granularity, calibrate_scales, equalizers_of
from pl_normkit.methods.fusion_scale.find import Site
from pl_normkit.methods.fusion_scale.fix import Mode, check_options, has_statistics, insert_at, plan_sites, split_trained
from pl_normkit.methods.fusion_scale.fold import Border, fold, why_not_foldable
from pl_normkit.methods.fusion_scale.running import InputsOf, Progress, inputs_of
from pl_normkit.surgery import Changes
from pl_normkit.wrappers import unwrapped

_GIVE_INPUTS = "pass example_inputs=, or set example_input_array on the LightningModule"


class ScaleEqualization(Callback):
    """`equalize_scales` in a training run: the modules go in when any stage is set up, so that checkpoints find their keys; their
    statistics are taken before the first training step, on batches of the training loader.

    The loader is read through a copy, without moving its sampler's or anyone's RNG, so the run sees the batches it would have seen.
    Statistics are those of all ranks together. A resumed run takes them from the checkpoint.

    Args:
        mode: "explicit" or "init", see `equalize_scales`.
        max_batches: batches of each pass on each rank; None for the whole epoch. Nested fusions take one pass for each level.
        granularity: one mean and std per "branch" or per "channel".
        example_inputs: what the network is traced with: a tensor, a tuple of positional or a dict of keyword arguments. None takes the
            module's `example_input_array`, or two training samples.
        inputs: from a batch, on its device, to the network's inputs; by default as for `calibrate_scales`. The network is the
            LightningModule where it has a forward, else its only child with parameters.
        sums: also equalize the operands of sums.
        border: for "init", see `fold`.
        allow_trained: calibrate although batch norms behind the fusions have been trained.

    Attributes:
        changes: what was inserted, calibrated and folded in this run; its `undo()` gives the model back.

    Raises:
        ConfigError: for an unknown option, and where no inputs for the trace are known.
        NothingMatchedError, EditError, TraceError, DataError: as `equalize_scales`.
    """

    def __init__(
        self,
        mode: Mode = "explicit",
        max_batches: int | None = 32,
        granularity: Granularity = "branch",
        example_inputs: Any = None,
        inputs: InputsOf | None = None,
        sums: bool = False,
        border: Border = "keep",
        allow_trained: bool = False,
    ) -> None:
        check_options(mode, granularity, border)
        if max_batches is not None and max_batches < 1:
            raise ConfigError("max_batches is a positive number of batches, or None for all", evidence=repr(max_batches))
        self.mode: Mode = mode
        self.max_batches = max_batches
        self.granularity: Granularity = granularity
        self.example_inputs = example_inputs
        self.inputs = inputs
        self.sums = sums
        self.border: Border = border
        self.allow_trained = allow_trained
        self.changes = Changes()
        self._sites: list[Site] | None = None
        self._is_calibrated = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        after_configure_model(pl_module, lambda: self._insert(trainer, pl_module, stage))

    def _insert(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The structure, whose keys a checkpoint may hold: everything for "explicit", for "init" what cannot be folded."""
        if self._sites is not None:
            return
        network = _network(pl_module)
        example_inputs = self._example_inputs(trainer, pl_module)
        if example_inputs is None:
            if stage == "fit":
                raise ConfigError("it is not known what the network is called with, so it cannot be traced", mend=_GIVE_INPUTS)
            message = f"ScaleEqualization leaves the network alone: it is not known what it is called with; {_GIVE_INPUTS}"
            warnings.warn(message, NormkitWarning, stacklevel=2)
            return
        sites, skipped = plan_sites(network, example_inputs, sums=self.sums)
        self._sites = sites
        self.changes.add(insert_at(network, [site for site in sites if self._stands_alone(network, site)], skipped))

    def _stands_alone(self, network: nn.Module, site: Site) -> bool:
        return self.mode == "explicit" or bool(why_not_foldable(network, site.host, site.folds_into, site.obstacle, self.border))

    def _example_inputs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        known = self.example_inputs if self.example_inputs is not None else pl_module.example_input_array
        if known is not None:
            return known
        batch = first_samples(trainer, pl_module)
        if batch is None:
            return None
        return self.inputs(batch) if self.inputs is not None else inputs_of(_network(pl_module), batch)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_calibrated or self._sites is None:
            return
        network = _network(pl_module)
        waiting = [site for site in self._sites if not has_statistics(network, site)]
        if waiting and not self.allow_trained:
            waiting, trained = split_trained(network, waiting)
            self.changes.skipped += trained
        if waiting:
            self.changes.add(self._calibrate(trainer, pl_module, network, waiting))
        self._is_calibrated = True

    def _calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module, sites: list[Site]) -> Changes:
        changes = insert_at(network, sites)
        try:
            with _progress(trainer, self.max_batches) as progress, _rewound(trainer) as loader:
                batches = _Transferred(trainer, pl_module, loader)
                options: dict[str, Any] = {"granularity": self.granularity, "max_batches": self.max_batches, "inputs": self.inputs}
                changes.add(calibrate_scales(network, batches, hosts=[site.host for site in sites], progress=progress, **options))
            if self.mode == "init":
                changes.add(fold(network, border=self.border))
                self._check_keys(network)
        except BaseException:
            changes.undo()
            raise
        return changes

    def _check_keys(self, network: nn.Module) -> None:
        """What should have been folded and was not would add keys that a checkpoint's reader does not expect."""
        hosts = {path.rpartition(".")[0] for path in equalizers_of(network)}
        left = [site.host for site in self._sites or () if site.host in hosts and not self._stands_alone(network, site)]
        if left:
            raise EditError(
                'mode="init" cannot write to these weights', where=", ".join(left), evidence="sharded", mend='use mode="explicit"'
            )

    def state_dict(self) -> dict[str, Any]:
        return {"is_calibrated": self._is_calibrated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._is_calibrated = state_dict["is_calibrated"]


def _network(pl_module: pl.LightningModule) -> nn.Module:
    """What is called with a batch: the LightningModule, or the only child with parameters where it has no forward of its own."""
    if is_overridden("forward", pl_module):
        return pl_module
    children = [child for child in pl_module.children() if any(True for _ in child.parameters())]
    if len(children) == 1:
        return unwrapped(children[0])
    raise ConfigError(
        "the network of this LightningModule is not known",
        evidence=f"it has no forward and {len(children)} children with parameters",
        mend="give it a forward that calls the network",
    )


@contextmanager
def _progress(trainer: pl.Trainer, max_batches: int | None) -> Iterator[Progress | None]:
    """A bar on rank zero where the trainer shows bars; it starts anew with each pass."""
    if trainer.progress_bar_callback is None or not trainer.is_global_zero:
        yield None
        return
    known = [count for count in (max_batches, trainer.num_training_batches) if count is not None and not math.isinf(count)]
    with Tqdm(desc="Scale statistics", total=min(known, default=None), leave=False) as bar:

        def show(done: int, turn: int) -> None:
            bar.set_description(f"Scale statistics, pass {turn + 1}")
            bar.n = done
            bar.refresh()

        yield show


@contextmanager
def _rewound(trainer: pl.Trainer) -> Iterator[CombinedLoader]:
    """A copy of the training loader; generators that it and the run's own loader share are as before afterwards."""
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    generators = [generator for loader in combined.flattened for generator in _generators(loader)]
    states = [generator.get_state() for generator in generators]
    try:
        yield CombinedLoader(tree_map(_without_iterator, combined.iterables), combined._mode)
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _without_iterator(loader: Any) -> Any:
    """A copy whose workers are its own: one loader with persistent workers has one iterator, which the run holds."""
    if not isinstance(loader, DataLoader):
        return loader
    copied = copy.copy(loader)
    copied._iterator = None
    return copied


def _generators(loader: Any) -> Iterator[torch.Generator]:
    samplers = (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    for holder in (loader, *samplers, getattr(samplers[1], "sampler", None)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator


class _Transferred:
    """Batches as the training step gets them: converted, passed through the transfer hooks, on their device."""

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loader: CombinedLoader) -> None:
        self._trainer = trainer
        self._pl_module = pl_module
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        limit = self._trainer.num_training_batches
        for batch, *_ in itertools.islice(self._loader, None if math.isinf(limit) else int(limit)):
            batch = self._trainer.precision_plugin.convert_input(batch)
            batch = self._pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
            yield self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)
