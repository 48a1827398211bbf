"""What `pl-normkit run upsampling export` writes: deformable kernel networks."""

from __future__ import annotations

__all__ = ["DKN_FORM"]

from typing import TYPE_CHECKING

from pl_normkit.methods.guided_upsampling import DeformableKernelNetwork
from pl_normkit.recipes.recipe import Bare, ExportForm

if TYPE_CHECKING:
    from pl_normkit.recipes.upsampling.main import UpsamplingCLI


def _build(cli: UpsamplingCLI) -> Bare:
    chosen = cli.config["test"].model
    options = {name: chosen[name] for name in ("fast", "kernel_size", "filter_size", "residual")}
    words = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return Bare(DeformableKernelNetwork(**options), f"pl_normkit.nn.DeformableKernelNetwork({words})")


def _notes(cli: UpsamplingCLI) -> list[str]:
    factor = cli.model.task.factor
    return [
        "guidance:   RGB in [0, 1]",
        f"start:      the coarse map enlarged {factor} times (bicubic, antialias=True), minus its minimum, over its range"
        if not cli.model.classes
        else f"start:      shares of the classes, enlarged {factor} times (bicubic, antialias=True)",
    ]


DKN_FORM = ExportForm("pl_normkit.nn.DeformableKernelNetwork", _build, stride=4, notes=_notes, inputs=("guidance", "start"), output="map")
