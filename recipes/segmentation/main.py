"""`pl-normkit run segmentation`: LightningCLI over the recipe, with defaults that train on TextureMosaic."""

from __future__ import annotations

__all__ = ["RECIPE", "SegmentationCLI"]

from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from pl_normkit.recipes.command_line import RecipeCLI
from pl_normkit.recipes.field import FieldRecorder
from pl_normkit.recipes.recipe import Recipe
from pl_normkit.recipes.segmentation.data import SegmentationData
from pl_normkit.recipes.segmentation.export import SMP_FORM
from pl_normkit.recipes.segmentation.model import SegmentationModule
from pl_normkit.recipes.segmentation.summary import print_iou, summarize_fit
from pl_normkit.recipes.segmentation.writer import MaskWriter


class SegmentationCLI(RecipeCLI):
    """LightningCLI with the data's classes linked into the model, and a summary at the end."""

    datamodule: SegmentationData
    model: SegmentationModule

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data", "model.class_names", compute_fn=lambda data: data.class_names, apply_on="instantiate")
        parser.link_arguments("data", "model.ignore_index", compute_fn=lambda data: data.ignore_index, apply_on="instantiate")
        parser.link_arguments("data", "model.example_size", compute_fn=lambda data: data.crop_size, apply_on="instantiate")
        self.add_checkpoint_arguments(parser, "val_miou")
        parser.add_lightning_class_args(MaskWriter, "masks")
        parser.add_lightning_class_args(FieldRecorder, "field")
        parser.set_defaults({"field.images": 8})

    def summarize(self, console: Console) -> None:
        summarize_fit(self.trainer, self.model, self.datamodule, console)

    def print_scores(self, console: Console, title: str) -> None:
        print_iou(console, self.model.class_iou, title)

    def find_predictions(self) -> tuple[str, Path]:
        return "masks", self.callback_of(MaskWriter).find_folder(self.trainer)


RECIPE = Recipe(
    "segmentation",
    SegmentationCLI,
    SegmentationModule,
    SegmentationData,
    default_config=Path(__file__).with_name("default.yaml"),
    default_data=Path(__file__).with_name("texture_mosaic.yaml"),
    form=SMP_FORM,
    metric="val_miou",
)
