"""What `pl-normkit run segmentation export` writes: networks of segmentation-models-pytorch."""

from __future__ import annotations

__all__ = ["SMP_FORM"]

from pl_normkit.recipes.command_line import RecipeCLI
from pl_normkit.recipes.export import Bare, ExportForm
from pl_normkit.recipes.segmentation.model import build_network
from pl_normkit.recipes.segmentation.samples import STRIDE


def _build(cli: RecipeCLI) -> Bare:
    chosen = cli.config["test"].model
    options = chosen.model_options or {}
    count = len(cli.model.class_names)
    words = ", ".join([f"classes={count}", *(f"{name}={value!r}" for name, value in options.items())])
    call = f"segmentation_models_pytorch.create_model({chosen.architecture!r}, {chosen.encoder_name!r}, None, {words})"
    return Bare(build_network(chosen.architecture, chosen.encoder_name, None, count, **options), call)


SMP_FORM = ExportForm("smp", _build, stride=STRIDE, edits="say the edit in --model.model_options (atrous rates)")
