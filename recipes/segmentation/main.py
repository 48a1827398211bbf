"""`pl-normkit run segmentation`: LightningCLI over the recipe, with defaults that train on TextureMosaic."""

from __future__ import annotations

__all__ = ["DEFAULT_CONFIG", "SegmentationCLI", "run"]

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from rich.console import Console

from pl_normkit.errors import ConfigError, nearest
from pl_normkit.recipes.segmentation.data import SegmentationData
from pl_normkit.recipes.segmentation.model import SegmentationModule
from pl_normkit.recipes.segmentation.summary import print_iou, summarize_fit
from pl_normkit.recipes.segmentation.writer import MaskWriter

DEFAULT_CONFIG = Path(__file__).with_name("default.yaml")

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
        parser.set_defaults({"checkpoint.monitor": "val_miou", "checkpoint.mode": "max", "checkpoint.save_last": True})
        parser.add_lightning_class_args(MaskWriter, "masks")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # LightningCLI itself warns when sys.argv is not empty, which it never is under `pl-normkit run`.
        self.config = parser.parse_args(args)

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


def run(args: list[str]) -> int:
    """Run the recipe with command line arguments: `[fit|validate|test|predict] [options]`, "fit" being the default.

    Options left out come from `default.yaml` beside this file. Returns 0. Raises NormkitError for bad input.
    """
    parser_kwargs: dict[str, Any] = {"prog": "pl-normkit run segmentation", "exit_on_error": False}
    for subcommand in _SUBCOMMANDS:
        parser_kwargs[subcommand] = {"default_config_files": [str(DEFAULT_CONFIG)], "exit_on_error": False}
    command = _choose_subcommand(args)
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
        except ArgumentError as error:
            raise ConfigError(
                "the options cannot be used",
                where=f"pl-normkit run segmentation {command[0]}",
                evidence=str(error),
                mend=f"see pl-normkit run segmentation {command[0]} --help",
            ) from error
        except SystemExit as stop:  # --help and --print_config end that way
            return int(stop.code or 0)
    return 0


def _silence_lightning() -> None:
    # Reading a sample takes a few milliseconds; more workers would take the cores from the training.
    warnings.filterwarnings("ignore", message=r"The '\w+_dataloader' does not have many workers")
    # Lightning's own calls to names that jsonargparse and torch have since renamed.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.pytorch\.utilities\._pytree")
