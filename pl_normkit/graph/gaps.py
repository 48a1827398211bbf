"""A model of which a few modules cannot be exported, read whole: one operation stands for each call of such a module.

Which modules these are the errors of the exporter say, one kind of module after the other. What they return is known from a forward pass.
"""

from __future__ import annotations

__all__ = ["read_with_gaps"]

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pl_normkit.errors import TraceError
from pl_normkit.graph.export import Arguments, place_arguments
from pl_normkit.graph.nodes import Node
from pl_normkit.graph.trace import trace_call
from pl_normkit.preserve import preserved

_MOST_KINDS = 4
_PLAIN = (int, float, bool, str, type(None))
Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]


@dataclass(frozen=True)
class _Result:
    """What a module returned: the structure, and for each leaf a tensor's form or a plain value."""

    spec: TreeSpec
    leaves: tuple[Any, ...]

    @property
    def forms(self) -> list[Form]:
        return [leaf.form for leaf in self.leaves if isinstance(leaf, _TensorForm)]


@dataclass(frozen=True)
class _TensorForm:
    form: Form


Results = dict[str, dict[Any, _Result]]
"""Of each module's calls in one forward pass, by its path and by the shapes it was called with."""

_calls: list[_Result] = []
"""What the operations of the trace that runs return; they know it by its index."""


def read_with_gaps(model: nn.Module, arguments: Arguments, error: TraceError) -> tuple[list[Node], list[str]] | None:
    """Operations, with dropouts as in training, and the paths of the modules of which one operation each is all that was read.

    Args:
        model: any module that could not be exported, not in eval mode either.
        arguments: of its call.
        error: why not in eval mode, where fewer modules are in the way: training alone skips layers at random.

    Returns:
        None where the model itself is in the way, or where it cannot be run.
    """
    results: Results | None = None
    gaps: dict[str, nn.Module] = {}
    failure: TraceError | None = error
    for _ in range(_MOST_KINDS):
        more = _in_the_way(model, failure)
        if not more or more.keys() <= gaps.keys():
            return None
        gaps |= more
        results = results if results is not None else _results(model, arguments)
        if not results.keys() >= gaps.keys():
            return None
        try:
            with _stand_ins(gaps, results):
                return trace_call(model, arguments, training=False, as_in_training=True), _outermost(gaps)
        except TraceError as again:
            failure = again
    return None


def _in_the_way(model: nn.Module, failure: TraceError | None) -> dict[str, nn.Module]:
    """The innermost module whose code met the error, and all of its kind; none where that is the model itself."""
    paths = {id(module): path for path, module in model.named_modules()}
    culprit = next((module for module in _modules_of(failure.__cause__ if failure else None) if id(module) in paths), None)
    if culprit is None or culprit is model:
        return {}
    if type(culprit).__module__.startswith("torch.nn."):
        return {paths[id(culprit)]: culprit}
    return {path: module for path, module in model.named_modules() if type(module) is type(culprit) and module is not model}


def _modules_of(error: BaseException | None) -> Iterator[nn.Module]:
    """The modules whose forward ran when `error` was raised, innermost first."""
    frames = []
    traceback: TracebackType | None = error.__traceback__ if error is not None else None
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    for frame in reversed(frames):
        owner = frame.f_locals.get("self")
        if frame.f_code.co_name == "forward" and isinstance(owner, nn.Module):
            yield owner


def _outermost(gaps: Mapping[str, nn.Module]) -> list[str]:
    return [path for path in gaps if not any(path.startswith(f"{other}.") for other in gaps)]


def _results(model: nn.Module, arguments: Arguments) -> Results:
    """What each module returns in a forward pass in eval mode, as far as the model runs."""
    results: Results = defaultdict(dict)
    args, kwargs = place_arguments(model, arguments)

    def recorder(path: str) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            leaves, spec = tree_flatten(output)
            if all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves) and any(isinstance(leaf, Tensor) for leaf in leaves):
                result = _Result(spec, tuple(_TensorForm(_form_of(leaf)) if isinstance(leaf, Tensor) else leaf for leaf in leaves))
                results[path].setdefault(_shapes((args, kwargs)), result)

        return keep

    with preserved(model, buffers=True), ExitStack() as hooks, torch.no_grad(), suppress(Exception):
        for path, module in model.named_modules():
            hooks.callback(module.register_forward_hook(recorder(path), with_kwargs=True).remove)
        model.eval()
        model(*args, **kwargs)
    return results


def _form_of(tensor: Tensor) -> Form:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device


def _shapes(called_with: Any) -> Any:
    return tuple(tuple(map(int, leaf.shape)) for leaf in tree_flatten(called_with)[0] if isinstance(leaf, Tensor))


@contextmanager
def _stand_ins(gaps: Mapping[str, nn.Module], results: Results) -> Iterator[None]:
    """Let one operation stand for each call of a module of `gaps` within the block."""
    _calls.clear()
    before: dict[str, Any] = {path: vars(module).get("forward") for path, module in gaps.items()}
    try:
        for path, module in gaps.items():
            module.forward = _Gap(results[path])
        yield
    finally:
        for path, module in gaps.items():
            if before[path] is None:
                del module.forward
            else:
                module.forward = before[path]


class _Gap:
    """The forward of a module that is not read."""

    def __init__(self, results: Mapping[Any, _Result]) -> None:
        self.results = results

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        result = self._result(given)
        _calls.append(result)
        made = iter(_gap_operator()(given, len(_calls) - 1))
        return tree_unflatten([next(made) if isinstance(leaf, _TensorForm) else leaf for leaf in result.leaves], result.spec)

    def _result(self, given: Sequence[Tensor]) -> _Result:
        if len(self.results) == 1:  # sizes that depend on values are no integers in an export
            return next(iter(self.results.values()))
        return self.results[_shapes(given)]


@cache
def _gap_operator() -> Any:
    torch.library.define("pl_normkit::gap", "(Tensor[] values, int call) -> Tensor[]")
    torch.library.register_fake("pl_normkit::gap", _made)
    return torch.ops.pl_normkit.gap


def _made(values: Sequence[Tensor], call: int) -> list[Tensor]:
    return [torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride, dtype, device in _calls[call].forms]
