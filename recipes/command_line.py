"""`pl-normkit run RECIPE`: what every recipe's LightningCLI shares."""

from __future__ import annotations

__all__ = ["SUBCOMMANDS", "LastCheckpoint", "RecipeCLI", "name_configs", "run_recipe", "silence_lightning"]

import inspect
import re
import signal
import traceback
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import lightning as L
import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

from pl_normkit.errors import ConfigError, NormkitError, nearest
from pl_normkit.importing import import_object, summary_of
from pl_normkit.recipes.callback_words import parse_callbacks
from pl_normkit.recipes.editing import add_callbacks
from pl_normkit.recipes.field import FieldRecorder
from pl_normkit.recipes.history import FitHistory
from pl_normkit.recipes.recipe import Recipe

_Callback = TypeVar("_Callback", bound=Callback)
SUBCOMMANDS = ("fit", "validate", "test", "predict")


class LastCheckpoint(ModelCheckpoint):
    """`last.ckpt` after every validation, and after epochs that have none.

    ModelCheckpoint's own `save_last` leaves it at the best state from Lightning 2.6 on.

    Args:
        every_n_epochs: write it at the end of each so many epochs; 0 switches it off.
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        super().__init__(filename="last", every_n_epochs=every_n_epochs, save_on_train_epoch_end=False, enable_version_counter=False)
        self.is_on = every_n_epochs > 0
        self.saved_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.saved_step = trainer.global_step

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self.saved_step = trainer.global_step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        is_new = trainer.global_step != self.saved_step  # this epoch had no validation, or max_steps ended it before
        if self.is_on and is_new and not getattr(trainer, "fast_dev_run", False) and self.dirpath is not None:
            trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt", weights_only=False)


class RecipeCLI(LightningCLI):
    """LightningCLI with a checkpoint callback and clear words about the checkpoint to start from."""

    trainer: L.Trainer

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_core_arguments_to_parser(parser)
        about = (
            "callbacks that act before all others, such as 'A,B' or 'A(option=1),package.module.C'; names are those of pl_normkit.callbacks"
        )
        parser.add_argument("--with", type=str | None, default=None, help=about)

    def add_checkpoint_arguments(self, parser: LightningArgumentParser, monitor: str, mode: Literal["min", "max"] = "max") -> None:
        """Options `--checkpoint.*` of the best state by `monitor`, `mode` being better, and `--last.*` of the last one."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        # At the end of validation only: a resumed run first closes the epoch it was saved in, without a metric to go by.
        checkpoint = {"monitor": monitor, "mode": mode, "save_on_train_epoch_end": False}
        parser.set_defaults({f"checkpoint.{option}": value for option, value in checkpoint.items()})
        parser.add_lightning_class_args(LastCheckpoint, "last")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # LightningCLI itself warns when sys.argv is not empty, which it never is under `pl-normkit run`.
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        options = self.config_init[self.subcommand].trainer
        if options.enable_progress_bar is False and isinstance(options.callbacks, list):
            # The bar of the default callbacks: Lightning refuses a bar in the list of a run that wants none.
            options.callbacks = [callback for callback in options.callbacks if not isinstance(callback, ProgressBar)]
        trainer: L.Trainer = super().instantiate_trainer(**kwargs)
        return trainer

    def build_bare_trainer(self, **changes: Any) -> L.Trainer:
        """The Trainer of the options with `changes`, without the recipe's own callbacks: it writes neither checkpoints nor masks."""
        options = {**vars(self.config_init[self.subcommand].trainer), "enable_checkpointing": False, **changes}
        callbacks = options.pop("callbacks") or []
        return self.trainer_class(**options, callbacks=callbacks if isinstance(callbacks, list) else [callbacks])

    def before_fit(self) -> None:
        self._require_checkpoint_file()
        self._add_callbacks()
        self.trainer.callbacks.append(FitHistory())  # type: ignore[attr-defined]

    def before_validate(self) -> None:
        self._require_checkpoint_file(needed=True)
        self._add_callbacks()

    def before_test(self) -> None:
        self._require_checkpoint_file(needed=True)
        self._add_callbacks()

    def before_predict(self) -> None:
        self._require_checkpoint_file(needed=True)
        self._add_callbacks()
        # Predictions go to files; kept in memory as well, those of a large folder would not fit.
        self.config_init[self.subcommand].return_predictions = False

    def after_fit(self) -> None:
        self.summarize(Console())

    def after_validate(self) -> None:
        self._print_scores("validation")

    def after_test(self) -> None:
        self._print_scores("test")

    def after_predict(self) -> None:
        what, place = self.find_predictions()  # on every rank: the folder is broadcast
        if self.trainer.is_global_zero:
            Console().print(f"{what + ': ':<12}{place}", soft_wrap=True, highlight=False)

    @abstractmethod
    def summarize(self, console: Console) -> None:
        """Print the result of a fit."""

    @abstractmethod
    def print_scores(self, console: Console, title: str) -> None:
        """Print the scores of an evaluation."""

    @abstractmethod
    def find_predictions(self) -> tuple[str, Path]:
        """What was predicted, in a word, and where it went."""

    def callback_of(self, kind: type[_Callback]) -> _Callback:
        """The Trainer's callback of that class."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return next(callback for callback in callbacks if isinstance(callback, kind))

    def _print_scores(self, title: str) -> None:
        if self.trainer.is_global_zero:
            self.print_scores(Console(), title)

    def _add_callbacks(self) -> None:
        """Those of `--with`; a recorder of the receptive field comes first of all, to see the network from before their edits."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        text = self.config[self.subcommand]["with"]
        if text is not None:
            add_callbacks(self.trainer, [word.build for word in parse_callbacks(text)])
        callbacks.sort(key=lambda callback: not isinstance(callback, FieldRecorder))

    def _require_checkpoint_file(self, needed: bool = False) -> None:
        path = self.config[self.subcommand].ckpt_path
        if path is None and needed:
            raise ConfigError(f"{self.subcommand} needs a trained model", fix="give its checkpoint with --ckpt_path PATH")
        if path is not None and not Path(path).is_file():
            raise ConfigError("the checkpoint is not there", where=str(path), fix="give the path of a .ckpt file that `fit` wrote")


def run_recipe(recipe: Recipe, args: Sequence[str]) -> int:
    """Run `recipe` with command line arguments: `[fit|validate|test|predict] [options]`, "fit" being the default.

    Options left out come from the recipe's YAML files. Returns 0, or another code where a signal ended the run. Raises NormkitError for
    bad input.
    """
    command = name_configs(recipe, _choose_subcommand(args, recipe.name))
    defaults = [str(recipe.default_config)]
    if not _names_data(command):
        # Given as a default beside another class, its settings would carry over to that class.
        defaults.append(str(recipe.default_data))
    about = {
        "description": "Train the recipe's network, test it, predict with it. Without a command: fit.",
        "epilog": f"Another command writes the trained network to a file: pl-normkit run {recipe.name} export --help",
    }
    parser_kwargs: dict[str, Any] = {"prog": f"pl-normkit run {recipe.name}", "exit_on_error": False, **about}
    for subcommand in SUBCOMMANDS:
        parser_kwargs[subcommand] = {"default_config_files": defaults, "exit_on_error": False}
    with warnings.catch_warnings():
        silence_lightning()
        try:
            recipe.cli(
                recipe.model,
                recipe.data,
                subclass_mode_data=True,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                parser_kwargs=parser_kwargs,
                args=command,
            )
        except NormkitError:
            raise
        except SIGTERMException:
            return 128 + signal.SIGTERM
        except SystemExit as stop:
            if _origin(stop) not in ("argparse", "jsonargparse", "lightning"):
                raise
            return int(stop.code or 0)  # --help and --print_config end that way, and an interrupted training with code 1
        except Exception as error:
            raise _explained(error, f"pl-normkit run {recipe.name} {command[0]}") from error
    return 0


def name_configs(recipe: Recipe, args: Sequence[str]) -> list[str]:
    """`args` with the names of the recipe's own configurations, as in `--config NAME`, turned into paths.

    Raises ConfigError for a bare word that is neither such a name nor a file.
    """
    known = {path.stem: str(path) for path in sorted(recipe.default_config.with_name("configs").glob("*.yaml"))}
    words = list(args)
    for index, word in enumerate(words):
        before = words[index - 1] if index else ""
        flag, equals, value = ("--config", "=", word.partition("=")[2]) if word.startswith("--config=") else ("", "", word)
        if not (flag or before in ("--config", "-c")) or Path(value).suffix or Path(value).name != value or Path(value).exists():
            continue
        if value not in known:
            hint = nearest(value, known)
            fix = f"{hint} its own are {', '.join(known)}" if known else "give the path of a YAML file"
            raise ConfigError(f"the {recipe.name} recipe has no configuration {value!r}", where="--config", fix=fix.strip())
        words[index] = f"{flag}{equals}{known[value]}"
    return words


def _choose_subcommand(args: Sequence[str], recipe: str) -> list[str]:
    """`args` with "fit" in front, unless a subcommand or the overall help is asked for."""
    if args and (args[0] in SUBCOMMANDS or list(args) in (["--help"], ["-h"])):
        return list(args)
    if args and not args[0].startswith("-"):
        raise ConfigError(
            f"the {recipe} recipe has no such command",
            where=f"pl-normkit run {recipe}",
            evidence=repr(args[0]),
            fix=f"one of {', '.join(SUBCOMMANDS)}; {nearest(args[0], SUBCOMMANDS)}".rstrip("; "),
        )
    return ["fit", *args]


def _names_data(args: Sequence[str]) -> bool:
    """Whether an argument or a configuration file among `args` names the class of the data."""
    if any(arg in ("--data", "--data.class_path") or arg.startswith(("--data=", "--data.class_path=")) for arg in args):
        return True
    flags = ("--config", "-c")
    files = [value for flag, value in pairwise(args) if flag in flags]
    files += [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
    return any("data" in _read_keys(Path(file)) for file in files)


def _read_keys(path: Path) -> set[str]:
    """Top-level keys of a YAML file; none when it cannot be read, which the parser itself will report."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return set()
    return set(content) if isinstance(content, dict) else set()


_REFUSED_OPTION = r"class_path '(?P<kind>[\w.]+)'.*Option '(?P<option>\w+)' is not accepted"  # as jsonargparse says it


def _origin(error: BaseException) -> str:
    """The top-level package of the code that raised it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _explained(error: Exception, command: str) -> Exception:
    """Jsonargparse wraps what a constructor raises: give the NormkitError within, or one that quotes a parser's refusal.

    What goes wrong where Lightning reads a checkpoint is the checkpoint's fault; all else is the training's own and stays as it is.
    """
    cause: BaseException | None = error
    while isinstance(error, (ArgumentError, ValueError)) and cause is not None:
        if isinstance(cause, NormkitError):
            return cause
        cause = cause.__cause__
    if isinstance(error, ArgumentError) and (refused := re.search(_REFUSED_OPTION, str(error), re.DOTALL)):
        kind = import_object(":".join(refused["kind"].rsplit(".", 1)))
        names = [name for name in inspect.signature(kind).parameters if name != "self"]
        what = f"{kind.__name__} has no option {refused['option']!r}"
        return ConfigError(what, where=command, fix=nearest(refused["option"], names) or f"it has {', '.join(names)}")
    if isinstance(error, ArgumentError):
        return ConfigError("the options cannot be used", where=command, evidence=str(error), fix=f"see {command} --help")
    if any(_reads_checkpoint(frame) for frame, _ in traceback.walk_tb(error.__traceback__)):
        fix = "give a .ckpt file that `fit` of this recipe wrote, with the options of its training"
        return ConfigError("the checkpoint cannot be restored", where="--ckpt_path", evidence=summary_of(error), fix=fix)
    return error


def _reads_checkpoint(frame: FrameType) -> bool:
    return frame.f_code.co_name == "_parse_ckpt_path" or "checkpoint_connector" in str(frame.f_globals.get("__name__", ""))


def silence_lightning() -> None:
    """Filter warnings that say nothing about a run of ours; the caller restores the filters."""
    # Reading a sample takes a few milliseconds; more workers would take the cores from the training.
    warnings.filterwarnings("ignore", message=r"The '\w+_dataloader' does not have many workers")
    # A resumed run has a folder of its own, so its best checkpoint is the best of that run.
    warnings.filterwarnings("ignore", message=r"The dirpath has changed from")
    # A checkpoint of a moving average holds the average as its weights; evaluation needs no callback for it.
    warnings.filterwarnings("ignore", message=r"Be aware that when using `ckpt_path`.*: \['EMAWeightAveraging'\]")
    # Lightning's own calls to names that jsonargparse and torch have since renamed.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.pytorch\.utilities\._pytree")
