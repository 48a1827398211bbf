"""`pl-normkit run boxes`: LightningCLI over the three stages, with defaults that train on TextureObjects."""

from __future__ import annotations

__all__ = ["RECIPE", "BoxesCLI"]

from pathlib import Path

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from pl_normkit.errors import ConfigError
from pl_normkit.recipes.boxes.classifier import BoxClassifierModule
from pl_normkit.recipes.boxes.data import BoxesData
from pl_normkit.recipes.boxes.export import COSINE_FORM
from pl_normkit.recipes.boxes.model import BoxSegmentationModule
from pl_normkit.recipes.boxes.notes import BoxNotes
from pl_normkit.recipes.boxes.stages import Stages, run_stages
from pl_normkit.recipes.boxes.summary import summarize_boxes
from pl_normkit.recipes.command_line import RecipeCLI
from pl_normkit.recipes.recipe import Recipe
from pl_normkit.recipes.segmentation.summary import print_iou
from pl_normkit.recipes.segmentation.writer import MaskWriter


class BoxesCLI(RecipeCLI):
    """LightningCLI whose fit first trains the classifier and labels the training images."""

    datamodule: BoxesData
    model: BoxSegmentationModule

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(BoxClassifierModule, "classifier")
        parser.add_class_arguments(Stages, "stages")
        for part in ("model", "classifier"):
            parser.link_arguments("data.class_names", f"{part}.class_names", apply_on="instantiate")
        parser.link_arguments("data.ignore_index", "model.ignore_index", apply_on="instantiate")
        parser.link_arguments("data.crop_size", "model.example_size", apply_on="instantiate")
        self.add_checkpoint_arguments(parser, RECIPE.metric)
        parser.add_lightning_class_args(MaskWriter, "masks")

    def before_fit(self) -> None:
        super().before_fit()
        options = self.config_init[self.subcommand]
        getattr(self.trainer.logger, "experiment", None)  # a logger of files begins its folder now, while that is empty
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        self._find_labels(options.stages)
        if self.trainer.world_size > 1 and options.stages.labels is None:
            fix = "run once with --trainer.devices 1 --trainer.max_steps 1, then give its folder as --stages.labels"
            evidence = f"{self.trainer.world_size} processes"
            raise ConfigError("classifier and labels are made on one device", where="--trainer.devices", evidence=evidence, fix=fix)
        notes = run_stages(options.stages, options.classifier, self.datamodule, folder, self.build_bare_trainer, Console())
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        callbacks += [*notes, BoxNotes()]

    def _find_labels(self, stages: Stages) -> None:
        """A resumed fit goes on with the labels of the run its checkpoint is from."""
        path = self.config[self.subcommand].ckpt_path
        beside = Path(path).parent.parent / "labels" if path is not None else None
        if stages.labels is None and beside is not None and beside.is_dir():
            stages.labels = beside

    def summarize(self, console: Console) -> None:
        summarize_boxes(self.trainer, self.model, self.datamodule, console)

    def print_scores(self, console: Console, title: str) -> None:
        print_iou(console, self.model.class_iou, title)

    def find_predictions(self) -> tuple[str, Path]:
        return "masks", self.callback_of(MaskWriter).find_folder(self.trainer)


RECIPE = Recipe(
    "boxes",
    BoxesCLI,
    BoxSegmentationModule,
    BoxesData,
    default_config=Path(__file__).with_name("default.yaml"),
    default_data=Path(__file__).with_name("texture_objects.yaml"),
    form=COSINE_FORM,
    metric="val_miou",
)
