"""What `pl-normkit run diffusion export` writes: the network that predicts noise."""

from __future__ import annotations

__all__ = ["UNET_FORM"]

from typing import TYPE_CHECKING

from pl_normkit.recipes.diffusion.network import UNet
from pl_normkit.recipes.recipe import Bare, ExportForm

if TYPE_CHECKING:
    from pl_normkit.recipes.diffusion.main import DiffusionCLI


def _build(cli: DiffusionCLI) -> Bare:
    chosen = cli.config["test"].model
    options = {"in_chans": cli.model.shape[0], **{name: chosen[name] for name in ("channels", "norm", "groups", "injection")}}
    words = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return Bare(UNet(**options), f"pl_normkit.recipes.diffusion.UNet({words})")


def _notes(cli: DiffusionCLI) -> list[str]:
    steps = len(cli.model.schedule.kept)
    return [
        f"images:     {' x '.join(map(str, cli.model.shape))} in [-1, 1], with the noise of their time",
        f"times:      0 (cleanest) to {steps - 1}, of pl_normkit.recipes.diffusion.NoiseSchedule({steps})",
    ]


UNET_FORM = ExportForm("diffusion recipe's", _build, notes=_notes, inputs=("images", "times"), output="noise")
