"""`pl-normkit run language`: LightningCLI over the recipe, with defaults that train on the standard library's source."""

from __future__ import annotations

__all__ = ["RECIPE", "LanguageCLI"]

from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from pl_normkit.recipes.command_line import RecipeCLI
from pl_normkit.recipes.language.data import TextData
from pl_normkit.recipes.language.export import DECODER_FORM
from pl_normkit.recipes.language.model import LanguageModule
from pl_normkit.recipes.language.summary import print_scores, summarize_fit
from pl_normkit.recipes.language.writer import TextWriter
from pl_normkit.recipes.recipe import Recipe


class LanguageCLI(RecipeCLI):
    """LightningCLI with the data's vocabulary and window linked into the model, and a summary at the end."""

    datamodule: TextData
    model: LanguageModule

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in ("class_names", "vocab_size", "length"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        self.add_checkpoint_arguments(parser, RECIPE.metric, mode="min")
        parser.add_lightning_class_args(TextWriter, "samples")

    def summarize(self, console: Console) -> None:
        summarize_fit(self.trainer, self.model, self.datamodule, console)

    def print_scores(self, console: Console, title: str) -> None:
        print_scores(console, self.model, title)

    def find_predictions(self) -> tuple[str, Path]:
        return "samples", self.callback_of(TextWriter).find_file(self.trainer)


RECIPE = Recipe(
    "language",
    LanguageCLI,
    LanguageModule,
    TextData,
    default_config=Path(__file__).with_name("default.yaml"),
    default_data=Path(__file__).with_name("stdlib.yaml"),
    form=DECODER_FORM,
    metric="val_bpb",
)
