"""What `pl-normkit run boxes export` writes: an smp network with a cosine classifier."""

from __future__ import annotations

__all__ = ["COSINE_FORM"]

from typing import TYPE_CHECKING

from pl_normkit.recipes.boxes.model import CosineSegmenter
from pl_normkit.recipes.recipe import Bare, ExportForm
from pl_normkit.recipes.segmentation.samples import STRIDE

if TYPE_CHECKING:
    from pl_normkit.recipes.boxes.main import BoxesCLI


def _build(cli: BoxesCLI) -> Bare:
    chosen, count = cli.config["test"].model, len(cli.model.class_names)
    options = {"embedding": chosen.embedding, "tau": chosen.tau, **(chosen.model_options or {})}
    words = ", ".join(f"{name}={value!r}" for name, value in options.items())
    call = f"pl_normkit.recipes.boxes.CosineSegmenter({chosen.architecture!r}, {chosen.encoder_name!r}, None, {count}, {words})"
    return Bare(CosineSegmenter(chosen.architecture, chosen.encoder_name, None, count, **options), call)


COSINE_FORM = ExportForm("pl_normkit.recipes.boxes.CosineSegmenter", _build, stride=STRIDE)
