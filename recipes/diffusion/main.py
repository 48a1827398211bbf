"""`pl-normkit run diffusion`: LightningCLI over the recipe, with defaults that train on scikit-learn's digits."""

from __future__ import annotations

__all__ = ["RECIPE", "DiffusionCLI"]

from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from pl_normkit.recipes.command_line import RecipeCLI
from pl_normkit.recipes.diffusion.data import DigitImages
from pl_normkit.recipes.diffusion.export import UNET_FORM
from pl_normkit.recipes.diffusion.model import DiffusionModule
from pl_normkit.recipes.diffusion.summary import print_scores, summarize_fit
from pl_normkit.recipes.diffusion.writer import SampleWriter
from pl_normkit.recipes.recipe import Recipe


class DiffusionCLI(RecipeCLI):
    """LightningCLI with the data's classes and sizes linked into the model, and a summary at the end."""

    datamodule: DigitImages
    model: DiffusionModule

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in ("class_names", "image_size", "in_chans"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        self.add_checkpoint_arguments(parser, RECIPE.metric, mode="min")
        parser.add_lightning_class_args(SampleWriter, "samples")

    def summarize(self, console: Console) -> None:
        summarize_fit(self.trainer, self.model, self.datamodule, console)

    def print_scores(self, console: Console, title: str) -> None:
        print_scores(console, self.model, self.datamodule, title)

    def find_predictions(self) -> tuple[str, Path]:
        return "samples", self.callback_of(SampleWriter).find_file(self.trainer)


RECIPE = Recipe(
    "diffusion",
    DiffusionCLI,
    DiffusionModule,
    DigitImages,
    default_config=Path(__file__).with_name("default.yaml"),
    default_data=Path(__file__).with_name("digits.yaml"),
    form=UNET_FORM,
    metric="val_frechet",
)
