"""Modules that a forward leaves out in every step: by a slice, a loop or a condition that nothing changes, told from its source.

What is decided by constants alone (literals, numbers and flags that no code but the constructor sets, lengths of the model's own lists)
is decided the same way each time. A module that was not called in one step, and whose every use in the forward's source stands under
such decisions, is never called. Whatever else appears (an argument, a tensor, a random number, an unknown function) is doubt.
"""

from __future__ import annotations

__all__ = ["left_out"]

import ast
import dis
import inspect
import textwrap
import types
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from pl_normkit.graph.nodes import shorten
from pl_normkit.methods.wiring.code_names import ANY_NAME, CONTAINERS, codes_of, codes_that_run, is_of_torch, names_in
from pl_normkit.methods.wiring.constant_control import Uses

_PLAIN = (bool, int, float, type(None), nn.Module)


def left_out(
    model: nn.Module, parameters: Iterable[str], called: Collection[str], roots: tuple[nn.Module, ...] = ()
) -> dict[str, list[str]]:
    """What leaves the modules of some parameters out, as in "slice at net.py:12"; those that another step may call are not told.

    Args:
        model: the model.
        parameters: names as in `model.named_parameters()`, of parameters that the step's forward did not read.
        called: paths of the modules that the step called.
        roots: further modules whose code may reach into the model.
    """
    by_use: dict[tuple[nn.Module, str], list[str]] = defaultdict(list)
    for name in parameters:
        holder, attribute = _holder(model, name, called)
        if holder is not None:
            by_use[holder, attribute].append(name)
    if not by_use:
        return {}
    kinds = {type(module) for root in (model, *roots) for module in root.modules() if not is_of_torch(type(module))}
    running = codes_that_run(kinds, {type(root) for root in roots})
    found: dict[str, list[str]] = defaultdict(list)
    for (holder, attribute), names in by_use.items():
        cause = _cause(holder, attribute, kinds, running)
        if cause:
            found[cause] += names
    return found


def _cause(holder: nn.Module, attribute: str, kinds: set[type], running: Collection[types.CodeType]) -> str:
    functions = {name: code for name, code in codes_of(type(holder)) if code in running}
    readers = {name: code for name, code in functions.items() if attribute in names_in(code)}
    if readers.keys() != {"forward"} or any(ANY_NAME & set(names_in(code)) for code in functions.values()):
        return ""
    tree = _tree(type(holder).forward, readers["forward"])
    if tree is None or _is_reached_into(kinds - set(type(holder).__mro__), attribute):
        return ""
    uses = Uses(tree, attribute, _constants(holder, kinds))
    if not uses.are_constant or not uses.found:
        return ""
    what, line = uses.found[0]
    return f"{what} at {shorten(readers['forward'].co_filename)}:{line}"


def _holder(model: nn.Module, parameter: str, called: Collection[str]) -> tuple[nn.Module | None, str]:
    """The innermost module of the user's own that was called, and its attribute that leads to the parameter."""
    path = parameter.split(".")
    for depth in range(len(path) - 1, -1, -1):
        holder = model.get_submodule(".".join(path[:depth]))
        if ".".join(path[:depth]) in called:
            is_own = not isinstance(holder, CONTAINERS) and not is_of_torch(type(holder))
            return (holder, path[depth]) if is_own else (None, "")
        if isinstance(holder, CONTAINERS) and not is_of_torch(type(holder)):
            return None, ""  # a container with a forward of its own
    return None, ""


def _tree(function: Any, code: types.CodeType) -> ast.FunctionDef | None:
    """The method's source, its lines numbered as in the file; None where it cannot be had or is not what runs."""
    if not isinstance(function, types.FunctionType) or function.__code__ is not code:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError, IndexError):
        return None
    return ast.increment_lineno(tree, code.co_firstlineno - 1) if isinstance(tree, ast.FunctionDef) else None


def _is_reached_into(kinds: Collection[type], attribute: str) -> bool:
    """Whether other classes take this attribute of something else than themselves."""
    return any(_takes(code, attribute) for kind in kinds for _, code in codes_of(kind))


def _takes(code: types.CodeType, attribute: str) -> bool:
    if any(_takes(constant, attribute) for constant in code.co_consts if isinstance(constant, types.CodeType)):
        return True
    if attribute in code.co_consts:
        return True
    before = None
    for step in dis.get_instructions(code):
        if step.argval == attribute and step.opname in ("LOAD_ATTR", "LOAD_METHOD") and not _loads_self(before, code):
            return True
        before = step
    return False


def _loads_self(step: dis.Instruction | None, code: types.CodeType) -> bool:
    if step is None or not step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) or not code.co_varnames[:1]:
        return False
    last = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
    return bool(last == code.co_varnames[0])


def _constants(holder: nn.Module, kinds: Collection[type]) -> Mapping[str, Any]:
    """Attributes of the holder that no code but constructors sets, with plain values; strings choose between tasks and are left out."""
    stored = {name for kind in kinds for _, code in codes_of(kind) for name in _stores(code)}
    for file in {code.co_filename for kind in kinds for _, code in codes_of(kind)}:
        stored |= _stored_from_outside(file)
    attributes = {**vars(holder), **vars(holder)["_modules"]}
    return {name: value for name, value in attributes.items() if name not in stored and name != "training" and isinstance(value, _PLAIN)}


def _stores(code: types.CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _stores(constant)
    yield from (step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR")


@lru_cache(maxsize=64)
def _stored_from_outside(file: str) -> frozenset[str]:
    """Attributes that code in the file sets on something that is not `self`: `model.depth = 3` in a loop."""
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return frozenset()
    return frozenset(
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    )
