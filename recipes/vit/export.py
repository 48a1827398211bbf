"""What `pl-normkit run vit export` writes: networks of timm."""

from __future__ import annotations

__all__ = ["TIMM_FORM"]

from typing import TYPE_CHECKING

from pl_normkit.recipes.recipe import Bare, ExportForm
from pl_normkit.recipes.vit.network import build_with_settings

if TYPE_CHECKING:
    from pl_normkit.recipes.vit.main import VitCLI


def _build(cli: VitCLI) -> Bare:
    chosen, module, data = cli.config["test"].model, cli.model, cli.datamodule
    network, taken = build_with_settings(
        chosen.name, len(module.class_names), image_size=data.image_size, in_chans=data.in_chans, drop_path=0.0, **(chosen.options or {})
    )
    words = ", ".join(f"{option}={value!r}" for option, value in taken.items())
    return Bare(network, f"timm.create_model({chosen.name!r}, {words})")


def _notes(cli: VitCLI) -> list[str]:
    data = cli.datamodule
    mean, std = ([round(value, 4) for value in values] for values in (data.normalization.mean, data.normalization.std))
    return [
        f"images:     {data.in_chans} x {data.image_size} x {data.image_size} in [0, 1], minus {mean}, over {std}",
        f"classes:    {', '.join(cli.model.class_names)}",
    ]


TIMM_FORM = ExportForm("timm", _build, notes=_notes)
