"""`pl-normkit run upsampling`: LightningCLI over the recipe, with defaults that train on StereoAndPlanes."""

from __future__ import annotations

__all__ = ["RECIPE", "UpsamplingCLI"]

from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from pl_normkit.recipes.command_line import RecipeCLI
from pl_normkit.recipes.recipe import Recipe
from pl_normkit.recipes.upsampling.data import UpsamplingData
from pl_normkit.recipes.upsampling.export import DKN_FORM
from pl_normkit.recipes.upsampling.model import UpsamplingModule
from pl_normkit.recipes.upsampling.summary import print_scores, summarize_fit
from pl_normkit.recipes.upsampling.writer import MapWriter


class UpsamplingCLI(RecipeCLI):
    """LightningCLI with the data's task linked into the model, and a table of methods at the end."""

    datamodule: UpsamplingData
    model: UpsamplingModule

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in ("task", "classes"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        self.add_checkpoint_arguments(parser, RECIPE.metric, "min")
        parser.add_lightning_class_args(MapWriter, "maps")

    def summarize(self, console: Console) -> None:
        summarize_fit(self.trainer, self.model, self.datamodule, console)

    def print_scores(self, console: Console, title: str) -> None:
        print_scores(console, self.model, title)

    def find_predictions(self) -> tuple[str, Path]:
        return "maps", self.callback_of(MapWriter).find_folder(self.trainer)


RECIPE = Recipe(
    "upsampling",
    UpsamplingCLI,
    UpsamplingModule,
    UpsamplingData,
    default_config=Path(__file__).with_name("default.yaml"),
    default_data=Path(__file__).with_name("stereo_and_planes.yaml"),
    form=DKN_FORM,
    metric="val_rmse",
)
