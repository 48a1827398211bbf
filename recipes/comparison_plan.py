"""What the words after `pl-normkit compare RECIPE` or `compare package.module:function` ask for."""

from __future__ import annotations

__all__ = ["Plan", "read_plan"]

import argparse
import ast
import contextlib
import hashlib
import importlib
import inspect
import io
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pl_normkit.errors import ConfigError
from pl_normkit.importing import import_object
from pl_normkit.jobs import PLACES
from pl_normkit.recipes.arms import WITHOUT, Arm, parse_arms
from pl_normkit.recipes.built_runs import check_arguments, describe_arm, train_built, versions
from pl_normkit.recipes.command_line import RecipeCLI, name_configs, run_recipe
from pl_normkit.recipes.paired_runs import digest_settings
from pl_normkit.recipes.recipe import Recipe
from pl_normkit.recipes.run_probes import PROBES
from pl_normkit.recipes.trial import Trial

_QUIET = (
    "--trainer.logger=false",
    "--trainer.callbacks=null",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.num_sanity_val_steps=0",
)
"""Before the user's options, which may take any of it back. The audit of the default callbacks would speak in every run."""


@dataclass(frozen=True)
class Plan:
    """A comparison, read but not begun.

    Attributes:
        arms: by name, the one without anything first.
        seeds: one run of each arm for each.
        metrics: the first decides.
        settings: all that tells this comparison from another.
        folder: of its results.
        train: trains one run; an exit code other than 0 where a signal ended it.
        on: where runs are trained: "here", or one of `PLACES`.
        jobs: how many at a time; None for as many as fit.
    """

    arms: Mapping[str, Arm]
    seeds: Sequence[int]
    metrics: Sequence[str]
    settings: dict[str, Any]
    folder: Path
    train: Callable[[Trial], int | None]
    on: str
    jobs: int | None


def read_plan(target: str, args: Sequence[str]) -> Plan:
    """From the name of a recipe, or `package.module:function`, and the words behind it.

    Raises ConfigError for bad words; SystemExit for --help and options of ours that argparse refuses.
    """
    return _plan_built(target, args) if ":" in target else _plan_recipe(_recipe(target), args)


def _recipe(name: str) -> Recipe:
    recipe: Recipe = importlib.import_module(f"pl_normkit.recipes.{name}.main").RECIPE
    return recipe


def _plan_recipe(recipe: Recipe, args: Sequence[str]) -> Plan:
    options, rest = _parse(recipe.name, f"Every other option goes to the recipe: see pl-normkit run {recipe.name} fit --help.", args)
    rest = name_configs(recipe, rest)
    arms = {name: replace(arm, options=name_configs(recipe, arm.options)) for name, arm in parse_arms(options.words, options.arms).items()}

    def train(trial: Trial) -> int:
        return run_recipe(replace(recipe, cli=_trial_cli(recipe.cli, trial)), _command(rest, trial.arm, trial.seed, options))

    is_asked = bool({"--help", "-h", "--print_config"} & {word.partition("=")[0] for word in rest})
    if is_asked:  # the first run answers, and trains nothing
        options.on, options.jobs = "here", None
    else:
        for arm in arms.values():
            _check_options(recipe, arm, _command(rest, arm, 0, options))
    every = [word for arm in arms.values() for word in arm.options]
    settings = {"recipe": recipe.name, "options": rest, "configs": _digest_configs([*rest, *every])}
    return _plan(recipe.name, arms, options, options.metrics or [recipe.metric], settings, train)


def _plan_built(spec: str, args: Sequence[str]) -> Plan:
    """Options `--trainer.NAME` go to the Trainer, all others to the function, which builds a module and its data."""
    about = f"Options --trainer.NAME=VALUE go to the Trainer, every other --NAME=VALUE to {spec}, which returns a module and its data."
    options, rest = _parse(spec, about, args)
    function = import_object(spec)
    if not options.metrics:
        raise ConfigError("name the metric that decides", where="--metric", fix="the name of what your module logs, such as val_loss")
    shared, trainer = _read_options(rest)
    arms = {}
    for name, arm in parse_arms(options.words, options.arms).items():
        own, of_trainer = _read_options(arm.options)
        if of_trainer:
            raise ConfigError("the arms share one Trainer", where=f"--arm {name}", fix="give --trainer options to all of them")
        check_arguments(function, {**shared, **own, **({"seed": 0} if options.split_per_seed else {})}, name)
        arms[name] = Arm(arm.callbacks, module=own)

    def build(arm: Arm, seed: int) -> Any:
        return function(**{**shared, **arm.module, **({"seed": seed} if options.split_per_seed else {})})

    source = inspect.getsourcefile(function)
    code = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ""
    train = train_built(build, trainer)

    def train_unless_stopped(trial: Trial) -> int:
        try:
            train(trial)
        except SIGTERMException:
            return 128 + signal.SIGTERM
        except SystemExit as stop:  # so Lightning ends an interrupted training
            return int(stop.code or 0)
        return 0

    settings = {"build": spec, "code": code, "options": rest}
    return _plan(spec.partition(":")[2], arms, options, options.metrics, settings, train_unless_stopped)


def _plan(
    name: str,
    arms: Mapping[str, Arm],
    options: argparse.Namespace,
    metrics: Sequence[str],
    settings: dict[str, Any],
    train: Callable[[Trial], int | None],
) -> Plan:
    described = {each: describe_arm(arm) for each, arm in arms.items() if each != WITHOUT}
    settings |= {"arms": described, "metrics": list(metrics), "split per seed": options.split_per_seed, "versions": versions()}
    label = re.sub(r"[^\w.+-]", "_", "-".join(described))[:60]
    folder = options.out or Path("runs") / "compare" / f"{name}-{label}-{digest_settings(settings)}"
    on = "processes" if options.on == "here" and options.jobs is not None and options.jobs > 1 else options.on
    return Plan(arms, range(options.seeds), metrics, settings, folder, train, on, options.jobs)


def _parse(name: str, epilog: str, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog=f"pl-normkit compare {name}",
        allow_abbrev=False,
        description="Train runs without and with callbacks or other options, that share seed, initial weights and the order of the data.",
        epilog=epilog,
    )
    words = 'an arm: "A,B", "A(option=1),package.module.C", or "name=A"; may be repeated'
    parser.add_argument("--with", dest="words", action="append", default=[], metavar="CALLBACKS", help=words)
    arm = 'an arm of other options: "name:--model.lr=0.01 --with=A"; may be repeated'
    parser.add_argument("--arm", dest="arms", action="append", default=[], metavar="NAME:OPTIONS", help=arm)
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of each arm: seeds 0 to N - 1 (default: 5)")
    probes = "; ".join(f"{name} ({about})" for name, about in PROBES.items())
    metric = (
        "the logged metric that decides, named before the runs are seen; more after commas are shown beside it. Measured after training "
        f"where the module does not log them: {probes}"
    )
    parser.add_argument("--metric", metavar="NAMES", default="", help=metric)
    parser.add_argument("--split-per-seed", action="store_true", help="draw the data's split anew for each seed (its option `seed`)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the CSV files and the picture (default: in runs/compare)")
    places = "where runs are trained: here, one after the other; in processes of this machine; on its gpus, one run each; on a ray cluster"
    parser.add_argument("--on", choices=("here", *PLACES), default="here", help=f"{places} (default: here)")
    at_once = "how many runs at a time; more than one means --on processes (default: what the place has room for)"
    parser.add_argument("--jobs", type=int, metavar="N", help=at_once)
    options, rest = parser.parse_known_args(args)
    options.metrics = [name.strip() for name in options.metric.split(",") if name.strip()]
    if options.seeds < 1:
        raise ConfigError("a comparison needs at least one pair", where="--seeds", evidence=str(options.seeds), fix="take 5")
    if options.jobs is not None and options.jobs < 1:
        raise ConfigError("there is a run at a time at least", where="--jobs", evidence=str(options.jobs), fix="take 2")
    if any(word.partition("=")[0] == "--seed_everything" for word in rest):
        raise ConfigError("a comparison chooses its seeds itself", where="--seed_everything", fix="give their number with --seeds")
    return options, rest


def _command(rest: Sequence[str], arm: Arm, seed: int, options: argparse.Namespace) -> list[str]:
    split = [f"--data.seed={seed}"] if options.split_per_seed else []
    return ["fit", *_QUIET, *rest, *arm.options, *split, f"--seed_everything={seed}"]


def _check_options(recipe: Recipe, arm: Arm, command: Sequence[str]) -> None:
    """Raise ConfigError for options that the recipe refuses, before the other arms are trained for nothing."""
    if arm.options:
        with contextlib.redirect_stdout(io.StringIO()):
            run_recipe(recipe, [*command, "--print_config"])


def _digest_configs(words: Sequence[str]) -> dict[str, str]:
    files = [value for flag, value in pairwise(words) if flag in ("--config", "-c")]
    files += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    return {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if Path(file).is_file()}


def _read_options(words: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the function that builds, and those of the Trainer, from `--name=value` and `--name value`."""
    own: dict[str, Any] = {}
    trainer: dict[str, Any] = {}
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not (equals or waiting):
            raise ConfigError("the options cannot be used", evidence=word, fix="write --name=value")
        kind, name = (trainer, name.removeprefix("trainer.")) if name.startswith("trainer.") else (own, name)
        kind[name] = _read_value(value if equals else waiting.pop(0))
    return own, trainer


def _read_value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "null": None}.get(text, text)


def _trial_cli(base: type[RecipeCLI], trial: Trial) -> type[RecipeCLI]:
    """The recipe's command line, which runs `trial` instead of a fit with checkpoints and a summary."""

    class TrialCLI(base):  # type: ignore[misc,valid-type]
        def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
            trainer: L.Trainer = self.build_bare_trainer(**kwargs)
            return trainer

        def before_fit(self) -> None:
            super().before_fit()
            trial.begin(self.trainer, self.model, self.datamodule)

        def after_fit(self) -> None:
            trial.end(self.trainer, self.model, self.datamodule)

    return TrialCLI
