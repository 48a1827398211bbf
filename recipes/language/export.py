"""What `pl-normkit run language export` writes: the network from tokens to logits."""

from __future__ import annotations

__all__ = ["DECODER_FORM"]

from typing import TYPE_CHECKING

from pl_normkit.recipes.language.network import REFERENCE, build_network
from pl_normkit.recipes.recipe import Bare, ExportForm

if TYPE_CHECKING:
    from pl_normkit.recipes.language.main import LanguageCLI


def _build(cli: LanguageCLI) -> Bare:
    chosen, data = cli.config["test"].model, cli.datamodule
    options = dict(chosen.options or {})
    network = build_network(chosen.name, data.vocab_size, data.length, **options)
    words = ", ".join(f"{option}={value!r}" for option, value in options.items())
    kind = "" if chosen.name == REFERENCE else "; its part `model` is that of transformers"
    call = f"pl_normkit.recipes.language.build_network({chosen.name!r}, {data.vocab_size}, {data.length}"
    return Bare(network, f"{call}{', ' if words else ''}{words}){kind}")


def _notes(cli: LanguageCLI) -> list[str]:
    data = cli.datamodule
    return [f"tokens:     (N, {data.length}) int64 below {data.vocab_size}, of {data.vocabulary.name}"]


DECODER_FORM = ExportForm("language recipe's", _build, notes=_notes, inputs=("tokens",))
