"""What `pl-normkit run segmentation export` writes: networks of segmentation-models-pytorch."""

from __future__ import annotations

__all__ = ["SMP_FORM"]

import lightning as L

from pl_normkit.callbacks import AtrousRates
from pl_normkit.recipes.command_line import RecipeCLI
from pl_normkit.recipes.recipe import Bare, ExportForm
from pl_normkit.recipes.segmentation.model import build_network
from pl_normkit.recipes.segmentation.samples import STRIDE


def _build(cli: RecipeCLI) -> Bare:
    chosen = cli.config["test"].model
    options = {**(chosen.model_options or {}), **_rates_set(cli.trainer, chosen.architecture)}
    count = len(cli.model.class_names)
    words = ", ".join([f"classes={count}", *(f"{name}={value!r}" for name, value in options.items())])
    call = f"segmentation_models_pytorch.create_model({chosen.architecture!r}, {chosen.encoder_name!r}, None, {words})"
    return Bare(build_network(chosen.architecture, chosen.encoder_name, None, count, **options), call)


def _rates_set(trainer: L.Trainer, architecture: str) -> dict[str, list[int]]:
    """The rates that `AtrousRates` set, as the option of the architectures that take them."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    rates = {rate for callback in callbacks if isinstance(callback, AtrousRates) for rate in callback.rates_set.values()}
    takes_rates = architecture.lower() in ("deeplabv3", "deeplabv3plus")
    return {"decoder_atrous_rates": sorted(rates)} if rates and takes_rates else {}


SMP_FORM = ExportForm("smp", _build, stride=STRIDE)
