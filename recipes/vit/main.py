"""`pl-normkit run vit`: LightningCLI over the recipe, with defaults that train on scikit-learn's digits."""

from __future__ import annotations

__all__ = ["RECIPE", "VitCLI"]

from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from pl_normkit.recipes.command_line import RecipeCLI
from pl_normkit.recipes.field import FieldRecorder
from pl_normkit.recipes.recipe import Recipe
from pl_normkit.recipes.vit.checks import require_size, warn_cut_patches, warn_normalization
from pl_normkit.recipes.vit.data import ClassificationData
from pl_normkit.recipes.vit.export import TIMM_FORM
from pl_normkit.recipes.vit.model import ClassifierModule
from pl_normkit.recipes.vit.summary import print_accuracy, summarize_fit
from pl_normkit.recipes.vit.writer import PredictionWriter


class VitCLI(RecipeCLI):
    """LightningCLI with the data's classes and sizes linked into the model, and a summary at the end."""

    datamodule: ClassificationData
    model: ClassifierModule

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in ("class_names", "image_size", "in_chans"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        self.add_checkpoint_arguments(parser, RECIPE.metric)
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(FieldRecorder, "field")

    def before_fit(self) -> None:
        super().before_fit()
        require_size(self.model.network, self.model.example_input_array)
        warn_cut_patches(self.model.network, self.datamodule.image_size)
        if self.model.pretrained:
            warn_normalization(self.model.network, self.datamodule.normalization)

    def summarize(self, console: Console) -> None:
        summarize_fit(self.trainer, self.model, self.datamodule, console)

    def print_scores(self, console: Console, title: str) -> None:
        print_accuracy(console, self.model.accuracy, title)

    def find_predictions(self) -> tuple[str, Path]:
        return "predictions", self.callback_of(PredictionWriter).find_file(self.trainer)


RECIPE = Recipe(
    "vit",
    VitCLI,
    ClassifierModule,
    ClassificationData,
    default_config=Path(__file__).with_name("default.yaml"),
    default_data=Path(__file__).with_name("digits.yaml"),
    form=TIMM_FORM,
    metric="val_acc",
)
