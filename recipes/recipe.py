"""What a recipe is to the command line: plain data, held as `RECIPE` in its main.py."""

from __future__ import annotations

__all__ = ["Bare", "ExportForm", "Recipe"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from torch import nn

if TYPE_CHECKING:
    from pl_normkit.recipes.command_line import RecipeCLI


@dataclass(frozen=True)
class Bare:
    """The architecture without edits.

    Attributes:
        network: with weights of any kind.
        call: Python that builds it without this library.
    """

    network: nn.Module
    call: str


@dataclass(frozen=True)
class ExportForm:
    """What `export` needs to know of a recipe.

    Attributes:
        library: whose network it trains, as people call it.
        build: gives the bare architecture of a run's options.
        stride: what the sides of `--size` are multiples of; None where the size of the network is that of the data.
        notes: lines to print after the file, such as how images are normalized.
        inputs: names of what the network is called with, images first.
        output: name of what it gives.
    """

    library: str
    build: Callable[[Any], Bare]
    stride: int | None = None
    notes: Callable[[Any], Sequence[str]] = lambda cli: ()
    inputs: tuple[str, ...] = ("images",)
    output: str = "logits"

    @property
    def formats(self) -> dict[str, str]:
        """What there is to write, by suffix."""
        return {".onnx": "ONNX", ".pt2": "a program of torch.export", ".pt": f"a plain state_dict of the {self.library} network"}


@dataclass(frozen=True)
class Recipe:
    """What `run`, `export` and `compare` need to know of a recipe.

    Attributes:
        name: as in `pl-normkit run NAME`.
        cli: its command line.
        model: its LightningModule.
        data: base class of its DataModules.
        default_config: YAML with the defaults of every run; `configs/` beside it holds those that `--config NAME` finds.
        default_data: YAML with the data of a run that names none.
        form: of what `export` writes.
        metric: name under which the model logs its main validation metric, by which `pl-normkit compare` judges.
    """

    name: str
    cli: type[RecipeCLI]
    model: type[L.LightningModule]
    data: type[L.LightningDataModule]
    default_config: Path
    default_data: Path
    form: ExportForm
    metric: str
