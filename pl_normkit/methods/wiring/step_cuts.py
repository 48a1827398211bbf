"""Cuts of the gradient in a `training_step` itself, outside every module's forward, told from its source."""

from __future__ import annotations

__all__ = ["StepCut", "cuts_in_step"]

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from pl_normkit.graph.nodes import shorten

_METHODS = frozenset(("detach", "item", "tolist", "numpy", "argmax"))
_FUNCTIONS = frozenset(("tensor", "as_tensor", "argmax"))
_CONDITIONAL = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.BoolOp, ast.Match, ast.Lambda, ast.comprehension)


@dataclass(frozen=True)
class StepCut:
    """What cuts ("detach()", ".data"), its line, and the modules whose results it takes and that nothing uses under a condition."""

    how: str
    source: str
    modules: frozenset[str]


def cuts_in_step(root: nn.Module | None) -> list[StepCut]:
    """The cuts that every run of `root.training_step` makes, in the order they stand; none where its source cannot be had."""
    function = inspect.unwrap(getattr(type(root), "training_step", None) or cuts_in_step)
    if root is None or function is cuts_in_step or not getattr(root, "automatic_optimization", True):
        return []
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return []
    code = getattr(function, "__code__", None)
    if not isinstance(tree, ast.FunctionDef) or code is None or not tree.args.args:
        return []
    flow = _Flow(root, ast.increment_lineno(tree, code.co_firstlineno - 1))
    return [StepCut(how, f"{shorten(code.co_filename)}:{line}", modules) for how, line, modules in flow.cuts()]


class _Flow:
    """Which modules' results an expression of the step is made of."""

    def __init__(self, root: nn.Module, tree: ast.FunctionDef) -> None:
        self._tree, self._self = tree, tree.args.args[0].arg
        self._modules = {name for name, _ in root.named_modules() if name}
        self._parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self._names: dict[str, frozenset[str]] = {}
        assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
        for _ in assigned:  # until names of names are known
            for node in assigned:
                for target in ast.walk(node):
                    if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                        self._names[target.id] = self._names.get(target.id, frozenset()) | self.made_of(node.value)

    def made_of(self, expression: ast.AST) -> frozenset[str]:
        found: frozenset[str] = frozenset()
        for node in ast.walk(expression):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                found |= self._names.get(node.id, frozenset())
            elif isinstance(node, ast.Call) and (path := self._called(node.func)):
                found |= {path}
        return found

    def _called(self, function: ast.AST) -> str:
        """The module that a call runs, by path, or whose method it calls."""
        parts: list[str] = []
        while isinstance(function, ast.Attribute):
            parts.append(function.attr)
            function = function.value
        if not isinstance(function, ast.Name) or function.id != self._self:
            return ""
        paths = [".".join(reversed(parts)), ".".join(reversed(parts[1:]))]
        return next((path for path in paths if path in self._modules), "")

    def cuts(self) -> Iterator[tuple[str, int, frozenset[str]]]:
        doubtful = {
            path
            for node in ast.walk(self._tree)
            if isinstance(node, (ast.Call, ast.Name)) and self._is_conditional(node)
            for path in self.made_of(node)
        }
        for node in ast.walk(self._tree):
            seen = _cut(node)
            if seen is not None and not self._is_conditional(node):
                how, value = seen
                yield how, getattr(node, "end_lineno", 0), self.made_of(value) - doubtful

    def _is_conditional(self, node: ast.AST) -> bool:
        while node is not self._tree:
            node = self._parents[node]
            if isinstance(node, _CONDITIONAL):
                return True
        return False


def _cut(node: Any) -> tuple[str, ast.AST] | None:
    """How it reads, and what it cuts."""
    if isinstance(node, ast.Attribute) and node.attr == "data":
        return ".data", node.value
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
        is_cut = node.func.attr in _FUNCTIONS and bool(node.args)
        return (f"torch.{node.func.attr}()", node.args[0]) if is_cut else None
    return (f"{node.func.attr}()", node.func.value) if node.func.attr in _METHODS else None
