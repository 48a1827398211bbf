"""Placements as plain data, which a checkpoint can hold, and the edits they stand for."""

from __future__ import annotations

__all__ = ["Piece", "PlacedMark", "child_of", "edits_of", "placed_in"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pl_normkit.errors import EditError
from pl_normkit.methods.norm_placement.modules import (
    ConstantGain,
    HandsOn,
    HeadGain,
    HeadNorm,
    NormAheadOfBranch,
    NormBehindAddition,
    NormOnShortcut,
    OutputNorm,
    PassesOn,
    RemembersBoth,
    RemembersInput,
    RemembersOutput,
    ShortcutGain,
)
from pl_normkit.surgery import Change, Edit, Insert, MixIn, SetAttributes, Undo, get_module
from pl_normkit.values import SetTrainable

Piece = dict[str, Any]
"""`piece`: what is inserted, see `_made`; `at`: path of the module it acts at; `side`; then its own options."""

_MARK = "norm_placement"
_REMEMBERING: dict[str, tuple[type[nn.Module], str]] = {
    "behind": (HandsOn, "hands the stream on; it now stands behind the addition"),
    "shortcut": (RemembersInput, "keeps the stream for the shortcut's gain"),
    "on_shortcut": (RemembersBoth, "keeps what it makes for the shortcut too"),
    "ahead": (RemembersBoth, "keeps the stream, which goes around it; it now stands before the branch"),
}
"""What the norm of a piece becomes."""


def child_of(piece: Piece) -> str:
    """The name of the child module that a piece becomes."""
    return f"placed_{piece['piece']}"


def edits_of(model: nn.Module, pieces: Sequence[Piece]) -> list[Edit]:
    """Raises EditError where the model has no such module."""
    edits = _without_nested_tensors(model, pieces)
    for piece in pieces:
        host = get_module(model, piece["at"])
        if piece["piece"] == "idle":
            edits += _idle_edits(host, piece["at"])
            continue
        like = next(host.parameters(), None)
        like = next(model.parameters(), None) if like is None else like
        place = {"device": like.device, "dtype": like.dtype} if like is not None else {}
        if "norm" in piece:
            mixin, told = _REMEMBERING[piece["piece"]]
            edits.append(MixIn(piece["norm"], mixin, told))
        if piece.get("dropout"):
            edits.append(MixIn(piece["dropout"], RemembersOutput, "keeps what it makes for the end of the branch"))
        new, what = _made(model, piece, place)
        edits.append(Insert(piece["at"], child_of(piece), new, what, piece["side"]))
    return edits


def _idle_edits(norm: nn.Module, path: str) -> list[Edit]:
    """The norm keeps its keys; parameters that get no gradient would stop DDP."""
    names = {f"{path}.{name}": False for name, _ in norm.named_parameters()}
    return [MixIn(path, PassesOn, "hands its input on"), SetTrainable(path, names, "does nothing, and is not trained")]


def _without_nested_tensors(model: nn.Module, pieces: Sequence[Piece]) -> list[Edit]:
    """Torch's encoder packs padded batches for a fast path that modules with hooks do not have."""
    return [
        SetAttributes(path, {"use_nested_tensor": False}, "no nested tensors, which only its fast path takes")
        for path, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoder)
        and getattr(module, "use_nested_tensor", False)
        and any(not path or piece["at"].startswith(f"{path}.") for piece in pieces)
    ]


def _made(model: nn.Module, piece: Piece, place: Mapping[str, Any]) -> tuple[nn.Module, str]:
    match piece["piece"]:
        case "gain":
            return ConstantGain(piece["value"], piece["side"]), f"times {piece['value']:.4g}"
        case "norm":
            options = {name: piece[name] for name in ("kind", "width", "eps", "axis", "bias")}
            return OutputNorm(**options, scale=piece.get("scale", 1.0), **place), f"{piece['kind']} norm {piece['side']} it"
        case "heads":
            return HeadGain(piece["heads"], **place), f"a gain for each of {piece['heads']} heads"
        case "head_norm":
            return HeadNorm(piece["width"], piece["eps"], **place), f"RMS norm of heads of width {piece['width']}"
        case "on_shortcut":
            return NormOnShortcut(get_module(model, piece["norm"])), f"{piece['norm']} acts on the shortcut too"
        case "ahead":
            dropout = get_module(model, piece["dropout"]) if piece["dropout"] else None
            return NormAheadOfBranch(get_module(model, piece["norm"]), dropout), f"the stream goes around {piece['norm']}"
        case "behind":
            return NormBehindAddition(get_module(model, piece["norm"])), f"{piece['norm']} acts on the sum behind it"
        case "shortcut":
            norm = get_module(model, piece["norm"])
            return ShortcutGain(norm, piece["width"], piece["axis"], **place), "a gain for each channel of the shortcut"
    raise EditError(f"there is no piece {piece['piece']!r}")


@dataclass(frozen=True)
class PlacedMark:
    """Keeps on the model what was placed, as a plain attribute that copies and pickles take along: a second call changes nothing."""

    kind: str
    pieces: tuple[Piece, ...]
    what: str

    def check(self, model: nn.Module) -> None:
        if _MARK not in vars(model) and hasattr(model, _MARK):
            raise EditError(f"{_MARK!r} is taken in {type(model).__name__}", fix="rename it")

    def is_done(self, model: nn.Module) -> bool:
        return any(placed["kind"] == self.kind for placed in placed_in(model))

    def apply(self, model: nn.Module) -> tuple[Change, Undo]:
        before = list(vars(model).get(_MARK, ()))

        def undo() -> None:
            if before:
                setattr(model, _MARK, before)
            else:
                delattr(model, _MARK)

        setattr(model, _MARK, [*before, {"kind": self.kind, "pieces": list(self.pieces)}])
        return Change("", self.what), undo


def placed_in(model: nn.Module) -> list[dict[str, Any]]:
    """What was placed in the model or in a part of it: kind and pieces."""
    return [placed for module in model.modules() for placed in vars(module).get(_MARK, ())]
