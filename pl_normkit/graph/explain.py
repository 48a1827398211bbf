"""Why a model cannot be read, in the user's words: which line, what stands on it, what helps."""

from __future__ import annotations

__all__ = ["explain"]

import sysconfig
import traceback
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pl_normkit.errors import TraceError
from pl_normkit.graph.nodes import shorten

_STANDARD_LIBRARY = f"{sysconfig.get_path('stdlib')}/"
_TORCH = f"{torch.__path__[0]}/"
_DEPENDS_ON_DATA = (
    "GuardOnDataDependentSymNode",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "UnsupportedOperatorException",
    "UserError",
)
_PART = "audit the part that holds the layers (audit(model.backbone, ...)), whose inputs a forward hook shows"


def explain(model: nn.Module, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TraceError:
    """The error to raise for one that `torch.export` met while it ran `model`."""
    frame = _line_of(error)
    shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    is_at_call = frame is None or "_call_impl" in frame.name
    return TraceError(
        f"{type(model).__name__} cannot be read by torch.export with inputs {shapes or 'given'}",
        where=f"{shorten(frame.filename)}:{frame.lineno}" if frame is not None else "",
        evidence=_seen(error, frame.line or "" if frame is not None else ""),
        fix=_advice(error, kwargs, is_at_call=is_at_call),
    )


def _line_of(error: Exception) -> traceback.FrameSummary | None:
    """The innermost line of the user's or a library's code."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
    inner = [frame for frame in frames if "pl_normkit/graph/" not in frame.filename and not _is_standard_library(frame.filename)]
    return inner[-1] if inner else None


def _depends_on_data(error: Exception) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    return bool(names & set(_DEPENDS_ON_DATA)) or "data-dependent" in text or "aten._local_scalar_dense" in text or "aten::item" in text


def _seen(error: Exception, line: str) -> str:
    if _depends_on_data(error):
        on_line = f"`{line.strip()}` there" if line.strip() else "it"
        return f"{on_line} depends on values computed from the inputs: a branch, a size or a number that is known only once the model runs"
    message = next((text for text in str(error).splitlines() if text.strip()), type(error).__name__)
    return f"{type(error).__name__}: {message[:300]}"


def _advice(error: Exception, kwargs: dict[str, Any], *, is_at_call: bool) -> str:
    if _depends_on_data(error):
        return f"take that line out of forward or skip it while torch.compiler.is_compiling(), give inputs that do not reach it, or {_PART}"
    takes_other_arguments = isinstance(error, TypeError) and "argument" in str(error)
    advice = f"check the inputs, or {_PART}"
    if kwargs and (takes_other_arguments or is_at_call):
        advice += "; a dict is passed as keyword arguments: write ({...},) for a forward that takes the dict itself"
    return advice


def _is_standard_library(file: str) -> bool:
    return file.startswith(_STANDARD_LIBRARY) and "-packages/" not in file
