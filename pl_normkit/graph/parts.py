"""What can be read of a model that `torch.export` refuses in training mode: the eval graph, all but some modules, or its parts."""

from __future__ import annotations

__all__ = ["read_partly"]

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from pl_normkit.errors import TraceError
from pl_normkit.graph.export import Arguments, call_arguments, place_arguments
from pl_normkit.graph.gaps import read_with_gaps
from pl_normkit.graph.nodes import Node
from pl_normkit.graph.trace import trace_call
from pl_normkit.preserve import preserved

_PLAIN = (Tensor, int, float, bool, str, type(None))
_NAMED = 6


def read_partly(model: nn.Module, example_inputs: Any) -> tuple[list[Node], str] | None:
    """Operations, and in words what they leave out; None where nothing could be read.

    The eval graph is read as in training: its dropouts have their probabilities. Where that cannot be had either, the modules that are
    in the way are one operation each (`gaps`), and their children are read by themselves. Failing that, parts are
    traced with the inputs that a forward pass in eval mode gives them, the outermost that can be; what joins them is not seen.
    """
    arguments = call_arguments(example_inputs)
    try:
        nodes = trace_call(model, arguments, training=False, as_in_training=True)
    except TraceError as error:
        read = read_with_gaps(model, arguments, error)
        return _read_parts(model, example_inputs) if read is None else _with_insides(model, example_inputs, *read)
    return nodes, "read in eval mode instead: what runs in training alone (stochastic depth, masking of inputs, targets) is not seen"


def _with_insides(model: nn.Module, example_inputs: Any, nodes: list[Node], gaps: list[str]) -> tuple[list[Node], str]:
    """The model with what can be read within its gaps behind it."""
    called = _record_calls(model, example_inputs)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for gap in gaps:
        for path, part in _trace_children(model.get_submodule(gap), gap, called):
            if part is not None:
                _append_part(nodes, part, path, model.get_submodule(path), names)
    return (
        nodes,
        f"read in eval mode instead, with one operation in place of each of these, whose parts are read by themselves: {_listed(gaps)}",
    )


def _read_parts(model: nn.Module, example_inputs: Any) -> tuple[list[Node], str] | None:
    called = _record_calls(model, example_inputs)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    nodes: list[Node] = []
    read, unread = [], []
    for path, part in _trace_children(model, "", called):
        if part is None:
            unread.append(path)
            continue
        read.append(path)
        _append_part(nodes, part, path, model.get_submodule(path), names)
    if not nodes:
        return None
    left_out = f"; not read: {_listed(unread)}" if unread else ""
    return nodes, f"read in parts instead, each by itself, so that what joins them is not seen: {_listed(read)}{left_out}"


def _listed(paths: list[str]) -> str:
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return ", ".join(paths[:_NAMED]) + more


def _record_calls(model: nn.Module, example_inputs: Any) -> dict[str, Arguments]:
    """The arguments of each submodule's first call, as far as the model runs."""
    calls: dict[str, Arguments] = {}
    args, kwargs = place_arguments(model, call_arguments(example_inputs))

    def recorder(path: str) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path not in calls and all(isinstance(leaf, _PLAIN) for leaf in tree_leaves((args, kwargs))):
                calls[path] = tree_map_only(Tensor, lambda tensor: tensor.detach(), (args, kwargs))

        return record

    with preserved(model, buffers=True), ExitStack() as hooks, torch.no_grad(), suppress(Exception):
        for path, module in model.named_modules():
            if path:
                hooks.callback(module.register_forward_pre_hook(recorder(path), with_kwargs=True).remove)
        model.eval()
        model(*args, **kwargs)
    return calls


def _trace_children(module: nn.Module, prefix: str, called: dict[str, Arguments]) -> Iterator[tuple[str, list[Node] | None]]:
    """Path and operations of the outermost parts that can be traced; None for what was called and cannot."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        part = _trace_part(child, called[path]) if path in called else None
        if part is not None:
            yield path, part
        elif any(child.children()):
            yield from _trace_children(child, path, called)
        elif path in called:
            yield path, None


def _trace_part(module: nn.Module, arguments: Arguments) -> list[Node] | None:
    for training in (True, False):
        with suppress(TraceError):
            return trace_call(module, arguments, training=training, as_in_training=True)
    return None


def _append_part(nodes: list[Node], part: list[Node], path: str, module: nn.Module, names: dict[int, str]) -> None:
    """The operations of a part behind those before, named as in the whole model."""
    renamed = {name: names[id(parameter)] for name, parameter in module.named_parameters(remove_duplicate=False)}
    for node in part:
        node.index = len(nodes)
        node.module = f"{path}.{node.module}" if node.module else path
        node.reads = tuple(replace(read, parameter=renamed.get(read.parameter, read.parameter)) for read in node.reads)
        nodes.append(node)
