"""One training of a comparison, and the order in which all of them are trained."""

from __future__ import annotations

__all__ = ["Key", "Probe", "Training", "Trial", "quiet_lightning", "train_arms", "train_here"]

import hashlib
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import Progress, TaskID

from pl_normkit.errors import ConfigError
from pl_normkit.recipes.arms import WITHOUT, Arm
from pl_normkit.recipes.editing import add_callbacks, editing_callbacks
from pl_normkit.recipes.own_randomness import isolate_train_data
from pl_normkit.recipes.paired_runs import PairedRun, RunStore
from pl_normkit.recipes.run_probes import PROBES, measure_by_name
from pl_normkit.recipes.step_costs import PeakMemory, StepClock

Probe = Callable[[L.LightningModule, L.LightningDataModule], float]
Key = tuple[int, str]
"""Seed and arm."""
Training = Callable[[Iterable[Key], Progress], Generator[tuple[Key, PairedRun | int], None, None]]
"""Trains runs: from their keys, taken one by one, to each with its result, as they come in."""


_COUNTED_STEP = 3
"""Whose memory is counted: the optimizer's state is there, and audits of the first step are over."""


@dataclass
class Trial:
    """One training, while it happens: whoever trains calls `begin` just before the fit and `end` after it."""

    seed: int
    name: str
    arm: Arm
    metrics: Sequence[str]
    progress: Progress
    probes: Mapping[str, Probe] = field(default_factory=dict)
    started: float = 0.0
    weights: str = ""
    added: list[Callback] = field(default_factory=list)
    clock: StepClock = field(default_factory=StepClock)
    step_bytes: float = float("nan")
    curve: list[tuple[int, Mapping[str, float]]] = field(default_factory=list)
    result: PairedRun | None = None

    def begin(self, trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> None:
        """The last moment before the fit: all arms go on from here with the same data and random numbers."""
        if trainer.world_size > 1:
            evidence = f"{trainer.world_size} processes"
            raise ConfigError("a comparison trains on one device", where="--trainer.devices", evidence=evidence, fix="set it to 1")
        self.added = add_callbacks(trainer, self.arm.callbacks)
        trainer.callbacks.append(_Watch(self))  # type: ignore[attr-defined]
        isolate_train_data(data, trainer, self.seed)
        self.weights = _digest_weights(module)
        L.seed_everything(self.seed, verbose=False)
        self.started = time.perf_counter()

    def end(self, trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> None:
        """After the fit."""
        seconds = time.perf_counter() - self.started
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name in self.metrics}
        trained = _digest_weights(module)
        known, edits, curve = sorted(trainer.callback_metrics), self._count_edits(trainer), tuple(self.curve)
        logged |= {name: float(probe(module, data)) for name, probe in self.probes.items()}
        named = [name for name in self.metrics if name not in logged and name in PROBES]
        logged |= {name: measure_by_name(name, module, data, self.metrics) for name in named}
        missing = [name for name in self.metrics if name not in logged]
        if missing:
            fix = "let the run end on a validation: whole epochs (--trainer.max_epochs), with --trainer.limit_val_batches above 0"
            raise ConfigError(f"the run logged no {missing[0]}", evidence=f"it logged {', '.join(known) or 'nothing'}", fix=fix)
        values = {name: logged[name] for name in self.metrics}
        self.result = PairedRun(
            self.seed, self.name, values, seconds, self.clock.seconds, self.step_bytes, self.weights, trained, edits, curve
        )

    def _count_edits(self, trainer: L.Trainer) -> int | None:
        own = {id(callback) for callback in self.added}
        editing = [callback for callback in editing_callbacks(trainer) if id(callback) in own]
        return sum(len(callback.changes.made) for callback in editing) if own and len(editing) == len(own) else None


class _Watch(L.Callback):
    """Shows the steps of a run, times them, and keeps its validation curve."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.task: TaskID | None = None
        self.steps = 0
        self.counting = ExitStack()
        self.peak: PeakMemory | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        name = f"seed {self.trial.seed} {self.trial.name}"
        self.task = self.trial.progress.add_task(name, total=None if total == float("inf") else total)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trial.clock.pause()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.steps == _COUNTED_STEP:
            self.peak = self.counting.enter_context(PeakMemory(pl_module.device))
        self.steps += 1

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.peak is not None:
            self.counting.close()
            self.trial.step_bytes, self.peak = float(self.peak.bytes), None
            self.trial.clock.pause()
        self.trial.clock.tick()
        if self.task is not None:
            self.trial.progress.update(self.task, completed=trainer.global_step)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.counting.close()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trial.clock.pause()
        logged = trainer.callback_metrics
        values = {name: float(logged[name]) for name in self.trial.metrics if name in logged}
        if values and not trainer.sanity_checking:
            self.trial.curve.append((trainer.global_step, values))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.counting.close()  # a batch that another callback refused has no end
        if self.task is not None:
            self.trial.progress.remove_task(self.task)
            self.task = None


def train_here(
    train: Callable[[Trial], int | None], arms: Mapping[str, Arm], metrics: Sequence[str], probes: Mapping[str, Probe] | None = None
) -> Training:
    """In this process, one after the other; an exit code in place of a run that came to no end: the options asked for something else
    (--help, --print_config), or a signal ended it.
    """

    def train_all(keys: Iterable[Key], progress: Progress) -> Generator[tuple[Key, PairedRun | int], None, None]:
        for seed, name in keys:
            trial = Trial(seed, name, arms[name], metrics, progress, probes or {})
            code = train(trial)
            yield (seed, name), trial.result if trial.result is not None else code or 0

    return train_all


def train_arms(
    train: Training, arms: Mapping[str, Arm], seeds: Sequence[int], metrics: Sequence[str], store: RunStore, console: Console
) -> int | None:
    """Train what `store` lacks. The exit code of a run that came to no end."""
    # Callbacks go first, so that one that does not fit the network says so at once. Each second seed the other way round: what slows a
    # machine as it goes hits all arms alike.
    order = [(seed, name) for seed in seeds for name in (list(arms)[::-1] if seed % 2 == 0 else arms)]
    missing = [key for key in order if key not in store.runs]
    if len(missing) < len(order):
        console.print(f"{len(order) - len(missing)} of {len(order)} runs were found in {store.folder}", soft_wrap=True, highlight=False)
    with quiet_lightning(), Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        overall = progress.add_task("runs", total=len(order), completed=len(order) - len(missing))
        wanted = (key for key in missing if not _is_idle(key[1], store))  # asked for one by one, as others end
        with closing(train(wanted, progress)) as results:
            for (seed, name), run in results:
                if isinstance(run, int):
                    return run
                _check_weights(run, arms, store)
                store.add(run)
                console.print(f"seed {seed} {name}: {metrics[0]} {run.metrics[metrics[0]]:.4f} in {run.seconds:.1f} s", highlight=False)
                progress.advance(overall)
    return None


def _is_idle(name: str, store: RunStore) -> bool:
    """Whether a finished pair has shown that the arm's callbacks find nothing to edit: more seeds would train the same runs twice."""
    pairs = [(run, store.runs.get((run.seed, WITHOUT))) for run in store.runs.values() if run.arm == name and run.edits == 0]
    return any(without is not None and run.ends_as(without) for run, without in pairs)


def _check_weights(run: PairedRun, arms: Mapping[str, Arm], store: RunStore) -> None:
    alike = [name for name, arm in arms.items() if arm.starts_alike and name != run.arm]
    others = [store.runs[run.seed, name] for name in alike if (run.seed, name) in store.runs] if arms[run.arm].starts_alike else []
    for other in others:
        if other.weights != run.weights:
            place = f"delete {store.folder} if code or checkpoint changed since its first runs; else " if store.folder else ""
            raise ConfigError(
                "the two runs of a pair start from different weights",
                where=f"seed {run.seed}",
                evidence=f"digests {other.weights} and {run.weights}",
                fix=f"{place}the network is built without the seed",
            )


def _digest_weights(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        if isinstance(tensor, torch.Tensor):  # what get_extra_state returns need be none
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without the lines on devices and seeds that every Trainer logs."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
