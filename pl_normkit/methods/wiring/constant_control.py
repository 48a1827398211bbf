"""Whether everything that decides over the use of an attribute in a function is constant, told from the function's syntax tree."""

from __future__ import annotations

__all__ = ["Uses"]

import ast
from collections.abc import Iterator, Mapping
from typing import Any

_PASSING = frozenset(("enumerate", "zip", "reversed", "list", "tuple", "iter"))
_COUNTING = frozenset(("len", "range", "min", "max", "int", "abs", "bool", "isinstance"))
_VIEWS = frozenset(("values", "items", "keys"))
_CHOOSING = frozenset(("get", "pop", "__getitem__"))
_OPAQUE = (ast.While, ast.Try, ast.Match, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.NamedExpr, ast.Starred, ast.Yield)
_COMPUTED = (ast.BoolOp, ast.Compare, ast.UnaryOp, ast.BinOp, ast.IfExp, ast.Tuple, ast.List, ast.Slice)


class Uses:
    """The uses of `self.<attribute>`, and of what is taken out of it, in one function.

    Args:
        tree: the function.
        attribute: the name.
        constants: the attributes of self that stay as they are, and their values.

    Attributes:
        are_constant: no use hangs on anything that may change between two calls.
        found: for each use what decides over it ("slice", "condition", "loop", "index"), with its line.
    """

    def __init__(self, tree: ast.FunctionDef, attribute: str, constants: Mapping[str, Any]) -> None:
        self._tree, self._attribute, self._constants = tree, attribute, constants
        self._self = tree.args.args[0].arg if tree.args.args else ""
        self._parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self._fixed: frozenset[str] = frozenset()
        self._find_fixed()
        self._parts: frozenset[str] = frozenset()
        self._find_parts()
        self.found: list[tuple[str, int]] = []
        self.are_constant = all(self._is_decided(node) for node in ast.walk(tree) if self._is_use(node))
        self.found.sort(key=lambda use: use[0] == "")
        self.found = [use for use in self.found if use[0]]

    # Names.

    def _assigned(self) -> Iterator[tuple[ast.expr, ast.expr, ast.AST]]:
        """Targets, what they are taken from, and where."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Assign):
                yield from ((target, node.value, node) for target in node.targets)
            elif isinstance(node, (ast.AugAssign, ast.AnnAssign)) and node.value is not None:
                yield node.target, node.value, node
            elif isinstance(node, (ast.For, ast.comprehension)):
                yield node.target, node.iter, node
            elif isinstance(node, ast.NamedExpr):
                yield node.target, node.value, node

    def _find_fixed(self) -> None:
        """Local names that always take the same values: taken from constants alone, under constant conditions."""
        assigned = list(self._assigned())
        arguments = {argument.arg for argument in ast.walk(self._tree.args) if isinstance(argument, ast.arg)}
        self._fixed = frozenset(name for target, _, _ in assigned for name in _names(target)) - arguments
        while True:
            moving = {
                name
                for target, value, node in assigned
                if not (self._is_constant(value) and self._is_always_reached(node))
                for name in _names(target)
            }
            if not moving & self._fixed:
                return
            self._fixed -= moving

    def _is_always_reached(self, node: ast.AST) -> bool:
        return all(self._is_constant(test) for above in self._above(node) for test in self._tests(above, node))

    def _find_parts(self) -> None:
        """Local names that stand for the attribute or for something in it."""
        while True:
            more = {name for target, value, _ in self._assigned() if self._is_part(value) for name in _names(target)}
            if more <= self._parts:
                return
            self._parts |= more

    # Expressions.

    def _is_attribute(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self._self

    def _is_use(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute):
            return self._is_attribute(node) and node.attr == self._attribute
        return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in self._parts

    def _is_part(self, node: ast.AST) -> bool:
        if self._is_use(node):
            return True
        if isinstance(node, ast.Subscript):
            return self._is_part(node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _VIEWS:
            return self._is_part(node.func.value)
        if isinstance(node, ast.Call):
            return isinstance(node.func, ast.Name) and node.func.id in _PASSING and any(map(self._is_part, node.args))
        return isinstance(node, (ast.IfExp, ast.BoolOp, ast.Tuple, ast.List)) and any(map(self._is_part, ast.iter_child_nodes(node)))

    def _is_constant(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Constant):
            return True
        if isinstance(node, ast.Name):
            return node.id in self._fixed
        if isinstance(node, ast.Attribute):
            return self._is_attribute(node) and node.attr in self._constants
        if isinstance(node, ast.Subscript):
            return self._is_constant(node.value) and self._is_constant(node.slice)
        if isinstance(node, ast.Call):
            return self._is_constant_call(node)
        parts = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
        return isinstance(node, _COMPUTED) and all(map(self._is_constant, parts))

    def _is_constant_call(self, node: ast.Call) -> bool:
        if isinstance(node.func, ast.Attribute) and node.func.attr in _VIEWS:
            return self._is_constant(node.func.value)
        is_known = isinstance(node.func, ast.Name) and node.func.id in _PASSING | _COUNTING
        return is_known and all(map(self._is_constant, [*node.args, *(keyword.value for keyword in node.keywords)]))

    # What decides over a use.

    def _above(self, node: ast.AST) -> Iterator[ast.AST]:
        while node is not self._tree:
            node = self._parents[node]
            yield node

    def _tests(self, above: ast.AST, node: ast.AST) -> list[ast.expr]:
        """The expressions in `above` that decide whether `node`, somewhere in it, is evaluated."""
        if isinstance(above, (ast.If, ast.IfExp)):
            return [] if self._is_within(node, above.test) else [above.test]
        if isinstance(above, ast.For):
            return [] if self._is_within(node, above.iter) else [above.iter]
        if isinstance(above, (ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp)):
            return [test for part in above.generators for test in (part.iter, *part.ifs) if not self._is_within(node, test)]
        if isinstance(above, ast.BoolOp):
            return [test for test in above.values if not self._is_within(node, test)]
        if isinstance(above, ast.Assert):
            return []
        return [ast.Name("?", ast.Load())] if isinstance(above, _OPAQUE) and above is not self._tree else []

    def _is_within(self, node: ast.AST, outer: ast.AST) -> bool:
        return node is outer or any(above is outer for above in self._above(node))

    def _is_decided(self, use: ast.AST) -> bool:
        kind, line = "", getattr(use, "lineno", 0)
        for above in self._above(use):
            tests = self._tests(above, use)
            if not all(map(self._is_constant, tests)) or self._is_choice(above):
                return False
            if tests and not kind:
                line = getattr(above, "lineno", line)
                kind = "loop" if isinstance(above, ast.For) else "condition"
        if not self._leads_nowhere_else(use) or not all(map(self._is_constant_exit, self._exits_before(use))):
            return False
        self.found.append(self._subscript(use) or (kind, line))
        return True

    def _is_choice(self, above: ast.AST) -> bool:
        """An attribute that chooses between two branches may be set by a loop that takes turns; a number of the code's own is not."""
        has_both = isinstance(above, ast.IfExp) or (isinstance(above, ast.If) and bool(above.orelse))
        return has_both and any(map(self._is_attribute, ast.walk(above.test)))  # type: ignore[attr-defined]

    def _subscript(self, use: ast.AST) -> tuple[str, int] | None:
        above = self._parents[use]
        if not isinstance(above, ast.Subscript) or above.value is not use:
            return None
        return "slice" if isinstance(above.slice, ast.Slice) else "index", above.lineno

    def _leads_nowhere_else(self, use: ast.AST) -> bool:
        """Whether what is taken is called, iterated or given a name here, and not handed to code that may do anything."""
        node = use
        while True:
            above = self._parents[node]
            if isinstance(above, ast.Subscript) and above.value is node:
                if not self._is_constant(above.slice) or self._is_attribute(above.slice):
                    return False
                node = above
            elif isinstance(above, ast.Attribute) and above.attr in _VIEWS:
                node = self._parents[above]
            elif isinstance(above, ast.Attribute) and above.attr in _CHOOSING:
                return False
            elif isinstance(above, ast.Call) and above.func is not node:
                name = above.func.id if isinstance(above.func, ast.Name) else getattr(above.func, "attr", "")
                if name in _COUNTING or name == "checkpoint":
                    return True
                if name not in _PASSING:
                    return False
                node = above
            elif isinstance(above, (ast.IfExp, ast.BoolOp, ast.Tuple, ast.List)):
                node = above
            else:
                return not isinstance(above, (ast.Return, ast.keyword, *_OPAQUE)) and not _is_stored_elsewhere(above)

    def _exits_before(self, use: ast.AST) -> Iterator[ast.AST]:
        """Statements that may end the function, or a loop around the use, before it is reached."""
        loops = [above for above in self._above(use) if isinstance(above, ast.For)]
        for node in ast.walk(self._tree):
            is_return = isinstance(node, ast.Return) and (node.lineno < getattr(use, "lineno", 0) or bool(loops))
            is_jump = isinstance(node, (ast.Break, ast.Continue)) and any(self._is_within(node, loop) for loop in loops)
            if (is_return or is_jump) and not self._is_within(use, node):
                yield node

    def _is_constant_exit(self, node: ast.AST) -> bool:
        if not self._is_always_reached(node):
            return False
        first = next((above for above in self._above(node) if isinstance(above, ast.If)), None)
        if first is not None:
            self.found.append(("condition", first.lineno))
        return True


def _names(target: ast.AST) -> list[str]:
    return [node.id for node in ast.walk(target) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def _is_stored_elsewhere(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and not all(isinstance(target, (ast.Name, ast.Tuple)) for target in node.targets)
