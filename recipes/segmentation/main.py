"""`pl-normkit run segmentation`: LightningCLI over the recipe, with defaults that train on TextureMosaic."""

from __future__ import annotations

__all__ = ["DEFAULT_CONFIG", "DEFAULT_DATA", "SegmentationCLI", "run"]

import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from rich.console import Console

from pl_normkit.errors import ConfigError, NormkitError, nearest
from pl_normkit.recipes.segmentation.data import SegmentationData
from pl_normkit.recipes.segmentation.model import SegmentationModule
from pl_normkit.recipes.segmentation.summary import print_iou, summarize_fit
from pl_normkit.recipes.segmentation.writer import MaskWriter

DEFAULT_CONFIG = Path(__file__).with_name("default.yaml")
DEFAULT_DATA = Path(__file__).with_name("texture_mosaic.yaml")

_SUBCOMMANDS = ("fit", "validate", "test", "predict")


class SegmentationCLI(LightningCLI):
    """LightningCLI with the data's classes linked into the model, and a summary at the end."""

    datamodule: SegmentationData
    model: SegmentationModule
    trainer: L.Trainer

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data", "model.class_names", compute_fn=lambda data: data.class_names, apply_on="instantiate")
        parser.link_arguments("data", "model.ignore_index", compute_fn=lambda data: data.ignore_index, apply_on="instantiate")
        parser.link_arguments("data", "model.example_size", compute_fn=lambda data: data.crop_size, apply_on="instantiate")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        # At the end of validation only: a resumed run first closes the epoch it was saved in, without a metric to go by.
        checkpoint = {"monitor": "val_miou", "mode": "max", "save_last": True, "save_on_train_epoch_end": False}
        parser.set_defaults({f"checkpoint.{option}": value for option, value in checkpoint.items()})
        parser.add_lightning_class_args(MaskWriter, "masks")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # LightningCLI itself warns when sys.argv is not empty, which it never is under `pl-normkit run`.
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def before_fit(self) -> None:
        self._require_checkpoint_file()

    def before_validate(self) -> None:
        self._require_checkpoint_file(needed=True)

    def before_test(self) -> None:
        self._require_checkpoint_file(needed=True)

    def before_predict(self) -> None:
        self._require_checkpoint_file(needed=True)
        # The masks go to files; kept in memory as well, a large folder would not fit.
        self.config_init[self.subcommand].return_predictions = False

    def _require_checkpoint_file(self, needed: bool = False) -> None:
        path = self.config[self.subcommand].ckpt_path
        if path is None and needed:
            raise ConfigError(f"{self.subcommand} needs a trained model", mend="give its checkpoint with --ckpt_path PATH")
        if path is not None and not Path(path).is_file():
            raise ConfigError("the checkpoint is not there", where=str(path), mend="give the path of a .ckpt file that `fit` wrote")

    def after_fit(self) -> None:
        summarize_fit(self.trainer, self.model, self.datamodule, Console())

    def after_validate(self) -> None:
        self._print_evaluation("validation")

    def after_test(self) -> None:
        self._print_evaluation("test")

    def _print_evaluation(self, title: str) -> None:
        if self.trainer.is_global_zero:
            print_iou(Console(), self.model.class_iou, title)

    def after_predict(self) -> None:
        writer = next(callback for callback in self.trainer.callbacks if isinstance(callback, MaskWriter))  # type: ignore[attr-defined]
        if self.trainer.is_global_zero:
            Console().print(f"masks:      {writer.find_folder(self.trainer)}", soft_wrap=True, highlight=False)


def _choose_subcommand(args: Sequence[str]) -> list[str]:
    """`args` with "fit" in front, unless a subcommand or the overall help is asked for."""
    if args and (args[0] in _SUBCOMMANDS or list(args) in (["--help"], ["-h"])):
        return list(args)
    if args and not args[0].startswith("-"):
        raise ConfigError(
            "the segmentation recipe has no such command",
            where="pl-normkit run segmentation",
            evidence=repr(args[0]),
            mend=f"one of {', '.join(_SUBCOMMANDS)}; {nearest(args[0], _SUBCOMMANDS)}".rstrip("; "),
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


def run(args: list[str]) -> int:
    """Run the recipe with command line arguments: `[fit|validate|test|predict] [options]`, "fit" being the default.

    Options left out come from `default.yaml` beside this file. Returns 0. Raises NormkitError for bad input.
    """
    command = _choose_subcommand(args)
    defaults = [str(DEFAULT_CONFIG)]
    if not _names_data(command):
        # Given as a default beside another class, its settings would carry over to that class.
        defaults.append(str(DEFAULT_DATA))
    parser_kwargs: dict[str, Any] = {"prog": "pl-normkit run segmentation", "exit_on_error": False}
    for subcommand in _SUBCOMMANDS:
        parser_kwargs[subcommand] = {"default_config_files": defaults, "exit_on_error": False}
    with warnings.catch_warnings():
        _silence_lightning()
        try:
            SegmentationCLI(
                SegmentationModule,
                SegmentationData,
                subclass_mode_data=True,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                parser_kwargs=parser_kwargs,
                args=command,
            )
        except (ArgumentError, ValueError) as error:
            raise _explain_refusal(error, command[0]) from error
        except SystemExit as stop:  # --help and --print_config end that way
            return int(stop.code or 0)
    return 0


def _explain_refusal(error: Exception, subcommand: str) -> Exception:
    """Jsonargparse wraps what a constructor raises: give the NormkitError within, or one that quotes a parser's refusal."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NormkitError):
            return cause
        cause = cause.__cause__
    if not isinstance(error, ArgumentError):
        return error
    return ConfigError(
        "the options cannot be used",
        where=f"pl-normkit run segmentation {subcommand}",
        evidence=str(error),
        mend=f"see pl-normkit run segmentation {subcommand} --help",
    )


def _silence_lightning() -> None:
    # Reading a sample takes a few milliseconds; more workers would take the cores from the training.
    warnings.filterwarnings("ignore", message=r"The '\w+_dataloader' does not have many workers")
    # A resumed run has a folder of its own, so its best checkpoint is the best of that run.
    warnings.filterwarnings("ignore", message=r"The dirpath has changed from")
    # Lightning's own calls to names that jsonargparse and torch have since renamed.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.pytorch\.utilities\._pytree")
