"""`pl-normkit compare RECIPE --with CALLBACKS`: what a callback changes, from pairs of runs that share everything else."""

from __future__ import annotations

__all__ = ["compare"]

import argparse
import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from pl_normkit import __version__
from pl_normkit.errors import ConfigError
from pl_normkit.recipes.callback_words import CallbackWord, parse_callbacks
from pl_normkit.recipes.command_line import Recipe, RecipeCLI, name_configs, run_recipe
from pl_normkit.recipes.comparison_report import draw_comparison, print_comparison
from pl_normkit.recipes.editing import add_callbacks
from pl_normkit.recipes.own_randomness import isolate_train_data
from pl_normkit.recipes.paired_runs import ARMS, Arm, PairedRun, RunStore, digest_settings

_QUIET = (
    "--trainer.logger=false",
    "--trainer.callbacks=null",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.num_sanity_val_steps=0",
)
"""Before the user's options, which may take any of it back. The audit of the default callbacks would speak in every run."""


@dataclass
class Trial:
    """One training of a pair, while it happens."""

    seed: int
    arm: Arm
    metric: str
    words: Sequence[CallbackWord]
    progress: Progress
    started: float = 0.0
    weights: str = ""
    curve: list[tuple[int, float]] = field(default_factory=list)
    result: PairedRun | None = None

    def begin(self, cli: RecipeCLI) -> None:
        """The last moment before the fit: both arms go on from here with the same weights, data and random numbers."""
        if cli.trainer.world_size > 1:
            evidence = f"{cli.trainer.world_size} processes"
            raise ConfigError("a comparison trains on one device", where="--trainer.devices", evidence=evidence, mend="set it to 1")
        if self.arm == "with":
            add_callbacks(cli.trainer, self.words)
        cli.trainer.callbacks.append(_Watch(self))  # type: ignore[attr-defined]
        isolate_train_data(cli.datamodule, cli.trainer, self.seed)
        self.weights = _digest_weights(cli.model)
        L.seed_everything(self.seed, verbose=False)
        self.started = time.perf_counter()

    def end(self, cli: RecipeCLI) -> None:
        """After the fit."""
        seconds = time.perf_counter() - self.started
        value = cli.trainer.callback_metrics.get(self.metric)
        if value is None:
            known = sorted(cli.trainer.callback_metrics)
            mend = "let the run end on a validation: whole epochs (--trainer.max_epochs), with --trainer.limit_val_batches above 0"
            raise ConfigError(f"the run logged no {self.metric}", evidence=f"it logged {', '.join(known) or 'nothing'}", mend=mend)
        self.result = PairedRun(self.seed, self.arm, float(value), seconds, self.weights, tuple(self.curve))


class _Watch(L.Callback):
    """Shows the steps of a run and keeps its validation curve."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.task: TaskID | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        name = f"seed {self.trial.seed} {self.trial.arm}"
        self.task = self.trial.progress.add_task(name, total=None if total == float("inf") else total)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.task is not None:
            self.trial.progress.update(self.task, completed=trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        value = trainer.callback_metrics.get(self.trial.metric)
        if value is not None and not trainer.sanity_checking:
            self.trial.curve.append((trainer.global_step, float(value)))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.task is not None:
            self.trial.progress.remove_task(self.task)
            self.task = None


def _trial_cli(base: type[RecipeCLI], trial: Trial) -> type[RecipeCLI]:
    """The recipe's command line, which runs `trial` instead of a fit with checkpoints and a summary."""

    class TrialCLI(base):  # type: ignore[misc,valid-type]
        def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
            trainer: L.Trainer = self.build_bare_trainer(**kwargs)
            return trainer

        def before_fit(self) -> None:
            super().before_fit()
            trial.begin(self)

        def after_fit(self) -> None:
            trial.end(self)

    return TrialCLI


def _digest_weights(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _parse(recipe: str, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog=f"pl-normkit compare {recipe}",
        allow_abbrev=False,
        description="Train pairs of runs, with callbacks and without, that share seed, initial weights and the order of the data.",
        epilog=f"Every other option goes to the recipe: see pl-normkit run {recipe} fit --help.",
    )
    parser.add_argument("--with", dest="words", required=True, metavar="CALLBACKS", help='such as A,B or "A(option=1),package.module.C"')
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="number of pairs: seeds 0 to N - 1 (default: 5)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the CSV files and the picture (default: in runs/compare)")
    options, rest = parser.parse_known_args(args)
    if options.seeds < 1:
        raise ConfigError("a comparison needs at least one pair", where="--seeds", evidence=str(options.seeds), mend="take 5")
    if any(word == "--seed_everything" or word.startswith("--seed_everything=") for word in rest):
        raise ConfigError("a comparison chooses its seeds itself", where="--seed_everything", mend="give their number with --seeds")
    return options, rest


def _settings(recipe: Recipe, words: Sequence[CallbackWord], options: Sequence[str]) -> dict[str, Any]:
    """What decides the result of a run besides its seed."""
    files = [value for flag, value in pairwise(options) if flag in ("--config", "-c")]
    files += [word.partition("=")[2] for word in options if word.startswith("--config=")]
    contents = {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if Path(file).is_file()}
    versions = {"pl_normkit": __version__, "torch": torch.__version__, "lightning": L.__version__}
    with_words = [word.text for word in words]
    return {"recipe": recipe.name, "with": with_words, "options": list(options), "configs": contents, "versions": versions}


def compare(recipe: Recipe, args: Sequence[str]) -> int:
    """Run the command with the arguments after `compare RECIPE`. Returns 0, or another code where a signal ended a run.

    Runs that the output folder already holds, from the same command, are not trained again. Raises NormkitError for bad input.
    """
    try:
        options, rest = _parse(recipe.name, args)
    except SystemExit as stop:  # --help, or an option of ours that argparse has refused
        return int(stop.code or 0)
    words = parse_callbacks(options.words)
    for word in words:
        word.build()  # arguments it refuses are said before anything is trained
    rest = name_configs(recipe, rest)
    settings = _settings(recipe, words, rest)
    label = "+".join(word.kind.__name__ for word in words)
    store = RunStore(options.out or Path("runs") / "compare" / f"{recipe.name}-{label}-{digest_settings(settings)}", settings)
    seeds = range(options.seeds)
    console = Console()
    code = _train_pairs(recipe, words, rest, store, seeds, console)
    if code is not None:
        return code
    print_comparison(console, store.runs, seeds, recipe.metric, label)
    picture = store.folder / "comparison.png"
    console.print(f"runs:       {store.folder / 'runs.csv'}", soft_wrap=True, highlight=False)
    drawn = draw_comparison(store.runs, seeds, recipe.metric, label, picture)
    console.print(f"picture:    {picture if drawn else 'none, matplotlib is not installed'}", soft_wrap=True, highlight=False)
    return 0


def _train_pairs(
    recipe: Recipe, words: Sequence[CallbackWord], options: Sequence[str], store: RunStore, seeds: Sequence[int], console: Console
) -> int | None:
    """Train what `store` lacks. The exit code of a run that came to no end: the options asked for something else (--help,
    --print_config), or a signal ended it.
    """
    # The callbacks go first, so that one that does not fit the network says so at once. Each second pair the other way round:
    # what slows a machine as it goes hits both arms alike.
    order = [(seed, arm) for seed in seeds for arm in (ARMS[::-1] if seed % 2 == 0 else ARMS)]
    missing = [key for key in order if key not in store.runs]
    if len(missing) < len(order):
        console.print(f"{len(order) - len(missing)} of {len(order)} runs were found in {store.folder}", soft_wrap=True, highlight=False)
    with _quiet_lightning(), Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        overall = progress.add_task("runs", total=len(order), completed=len(order) - len(missing))
        for seed, arm in missing:
            trial = Trial(seed, arm, recipe.metric, words, progress)
            command = ["fit", *_QUIET, *options, f"--seed_everything={seed}"]
            code = run_recipe(replace(recipe, cli=_trial_cli(recipe.cli, trial)), command)
            if trial.result is None:
                return code
            _check_weights(trial.result, store)
            store.add(trial.result)
            progress.advance(overall)
            run = trial.result
            console.print(f"seed {seed} {arm}: {recipe.metric} {run.metric:.4f} in {run.seconds:.1f} s", highlight=False)
    return None


def _check_weights(run: PairedRun, store: RunStore) -> None:
    other = store.runs.get((run.seed, ARMS[1 - ARMS.index(run.arm)]))
    if other is not None and other.weights != run.weights:
        raise ConfigError(
            "the two runs of a pair start from different weights",
            where=f"seed {run.seed}",
            evidence=f"digests {other.weights} and {run.weights}",
            mend=f"delete {store.folder} if code or checkpoint changed since its first runs; else the network is built without the seed",
        )


@contextmanager
def _quiet_lightning() -> Iterator[None]:
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
