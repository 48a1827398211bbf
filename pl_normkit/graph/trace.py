"""From a module to a list of nodes: one `torch.export` trace, read once, changing nothing."""

from __future__ import annotations

__all__ = ["call_arguments", "trace", "trace_call"]

from collections.abc import Hashable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from pl_normkit.errors import TraceError
from pl_normkit.graph.export import Arguments, call_arguments, export_model, is_from_root, place_arguments, without_root
from pl_normkit.graph.masks import MASKING, Draw, Mask, draw_of, mask_on
from pl_normkit.graph.nodes import LIKE_ANOTHER, SHAPE_ONLY, Kind, Node, Read, Step, kind_of, shape_of
from pl_normkit.graph.products import split_products
from pl_normkit.graph.repeated import Call, find_rows, stand_ins


def trace(model: nn.Module, example_inputs: Any, *, training: bool = True) -> list[Node]:
    """Operations of one forward pass in training (or eval) mode, in execution order.

    Raises TraceError, with the user's line, when the model cannot be exported.
    """
    return trace_call(model, call_arguments(example_inputs), training=training)


def trace_call(model: nn.Module, arguments: Arguments, *, training: bool, as_in_training: bool = False) -> list[Node]:
    """`trace` by positional and keyword arguments; `as_in_training` gives the dropouts of an eval graph the probabilities of training."""
    placed = place_arguments(model, arguments)
    rows = find_rows(model)
    if rows:
        with suppress(TraceError, BlocksDifferError), stand_ins(rows) as calls:
            program = export_model(model, placed, training)
            return _Reader(model, as_in_training, calls=tuple(calls)).read(program)
    return _Reader(model, as_in_training).read(export_model(model, placed, training))


class BlocksDifferError(Exception):
    """Blocks that were taken for alike are not."""


@dataclass
class _Value:
    """What a node of the exported graph stands for: an operation on the input's values, or parameters, or a random draw, or neither."""

    node: Node | None = None
    reads: tuple[Read, ...] = ()
    draw: Draw | None = None


@dataclass
class _Block:
    """A block that was traced: the values it was given, its operations, the values it returned."""

    path: str
    given: list[_Value]
    first: int
    nodes: list[Node] = field(default_factory=list)
    returned: list[_Value] = field(default_factory=list)


@dataclass
class _Reader:
    """Walks the exported graph in order and keeps what depends on the input's values."""

    model: nn.Module
    as_in_training: bool = False
    calls: tuple[Call, ...] = ()
    nodes: list[Node] = field(default_factory=list)
    _values: dict[torch.fx.Node, _Value] = field(default_factory=dict)
    _results: dict[torch.fx.Node, list[_Value]] = field(default_factory=dict)
    _blocks: dict[int, _Block] = field(default_factory=dict)
    _joined: dict[Hashable, Node] = field(default_factory=dict)

    def read(self, program: ExportedProgram) -> list[Node]:
        if self.calls:
            _unmark(program)
        split_products(program.graph_module)
        first_name = self._first_name_of
        specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
        for target in program.graph.nodes:
            if target.op == "placeholder":
                spec = specs.get(target.name)
                if spec is not None and spec.kind is InputKind.PARAMETER and spec.target is not None:
                    name = without_root(spec.target)
                    self._values[target] = _Value(reads=(Read(first_name.get(name, name), ()),))
                elif spec is not None and spec.kind is InputKind.CONSTANT_TENSOR:
                    self._values[target] = _Value(draw=_constant(program.constants.get(str(spec.target))))
                elif spec is None or spec.kind is InputKind.USER_INPUT:
                    self._values[target] = _Value(self._append(target, "input", Kind.INPUT, {}, ()))
        self._read_body(program.graph_module)
        return self.nodes

    def _read_block(self, target: torch.fx.Node, name: str) -> _Value:
        """One of `block_operators`: a block begins, ends, or is one that was traced before."""
        number = int(str(target.args[1]))
        call, values = self.calls[number], [self._values.get(leaf, _Value()) for leaf in tree_leaves(target.args[0])]
        if name == "enter":
            self._blocks[number] = _Block(call.path, values, len(self.nodes))
        elif name == "leave":
            block = self._blocks[number]
            block.nodes, block.returned = self.nodes[block.first :], values
            template = self._template(call)
            if template is not block:
                self._compare(template, block)
        else:
            values = self._repeat(self._template(call), call.path, values)
        self._results[target] = values
        return _Value()

    def _template(self, call: Call) -> _Block:
        return next(block for number, block in self._blocks.items() if self.calls[number].key == call.key and block.returned)

    def _repeat(self, block: _Block, path: str, given: list[_Value]) -> list[_Value]:
        """The operations of `block` once more, as those of the block at `path`; its results."""
        mapped: dict[Node, Node] = self._match(block, given)
        names = self._renamed(block.path, path)
        for node in block.nodes:
            copy = replace(
                node,
                index=len(self.nodes),
                inputs=tuple(mapped.get(source, source) for source in node.inputs),
                reads=tuple(replace(read, parameter=names.get(read.parameter, read.parameter)) for read in node.reads),
                module=self._first_path(_moved(node.module, block.path, path)),
                users=[],
            )
            for source in copy.inputs:
                source.users.append(copy)
            self.nodes.append(copy)
            mapped[node] = copy
        reads = [tuple(replace(read, parameter=names.get(read.parameter, read.parameter)) for read in v.reads) for v in block.returned]
        return [
            replace(value, node=mapped.get(value.node, value.node) if value.node else None, reads=read)
            for value, read in zip(block.returned, reads, strict=True)
        ]

    def _match(self, block: _Block, given: list[_Value]) -> dict[Node, Node]:
        mapped: dict[Node, Node] = {}
        for old, new in zip(block.given, given, strict=True):
            if old.node is None or new.node is None:
                if (old.node, old.reads, old.draw) != (new.node, new.reads, new.draw):
                    raise BlocksDifferError
            elif mapped.setdefault(old.node, new.node) is not new.node:
                raise BlocksDifferError
        return mapped

    def _compare(self, template: _Block, block: _Block) -> None:
        """Raises unless both are the same operations on the same shapes, in the same order and from the same places."""
        mapped = self._match(template, block.given)
        names = self._renamed(template.path, block.path)
        for old, new in zip(template.nodes, block.nodes, strict=False):
            mapped[old] = new
            is_like = (old.op, old.shape, old.arguments, old.mask) == (new.op, new.shape, new.arguments, new.mask)
            joins = tuple(mapped.get(source, source) for source in old.inputs) == new.inputs
            reads = [names.get(name, name) for name in old.parameters] == list(new.parameters)
            if not (is_like and joins and reads and _constants(old) == _constants(new)):
                raise BlocksDifferError
        if len(template.nodes) != len(block.nodes):
            raise BlocksDifferError

    def _renamed(self, old: str, new: str) -> dict[str, str]:
        first = self._first_name_of
        inside = self.model.get_submodule(old).named_parameters(remove_duplicate=False)
        names = [(f"{old}.{name}", f"{new}.{name}") for name, _ in inside]
        if not all(name in first for _, name in names):
            raise BlocksDifferError
        return {first[before]: first[after] for before, after in names}

    @cached_property
    def _first_name_of(self) -> dict[str, str]:
        return self._first_names()

    def _first_names(self) -> dict[str, str]:
        """Tied parameters have several names; everything speaks of the first."""
        first: dict[int, str] = {}
        return {name: first.setdefault(id(p), name) for name, p in self.model.named_parameters(remove_duplicate=False)}

    @cached_property
    def _aliases(self) -> dict[str, str]:
        """Other paths of modules that are reached by several, each with the first, which `named_modules` gives."""
        first: dict[int, str] = {}
        paths = ((path, first.setdefault(id(module), path)) for path, module in self.model.named_modules(remove_duplicate=False))
        return {path: name for path, name in paths if path != name}

    def _first_path(self, path: str) -> str:
        return self._aliases.get(path, path)

    def _read_body(self, body: torch.fx.GraphModule) -> list[_Value]:
        for target in body.graph.nodes:
            if target.op == "call_function":
                self._values[target] = self._read_call(target, body)
            elif target.op == "output":
                return [self._values.get(leaf, _Value()) for leaf in tree_leaves(target.args) if isinstance(leaf, torch.fx.Node)]
        return []

    def _read_call(self, target: torch.fx.Node, body: torch.fx.GraphModule) -> _Value:
        inner = self._inner_body(target, body)
        if inner is not None:
            return self._read_inner(target, inner)
        name = _name_of(target)
        if self.calls and name in ("enter", "leave", "repeat") and _is_block_operator(target):
            return self._read_block(target, name)
        results = self._results.get(target.all_input_nodes[0]) if name == "getitem" else None
        if results is not None:
            return results[int(str(target.args[1]))]
        if _returns_nothing(target):
            return _Value()
        if name in SHAPE_ONLY:
            return _Value(draw=draw_of(name, target, {}, shape_of(target)))
        if name in _CASTS and _returns_its_input(target):
            return self._values.get(target.all_input_nodes[0], _Value())
        op = name.rstrip("_") if name.endswith("_") and not name.startswith("__") else name
        op = "mul" if op == "einsum" and _sums_nothing(str(target.args[0])) else op
        inputs, reads = self._gather(target, op)
        if inputs:
            value = _Value(self._made(target, op, inputs, reads))
        else:
            value = _Value(reads=reads, draw=draw_of(name, target, self._draws(target), shape_of(target)))
        if name.endswith("_") and not name.startswith("__"):
            self._overwrite(target, value)
        return value

    def _draws(self, target: torch.fx.Node) -> dict[str, Draw]:
        values = ((argument, self._values.get(operand)) for argument, operand in _operands(target))
        return {argument: value.draw for argument, value in values if value is not None and value.draw is not None}

    def _inner_body(self, target: torch.fx.Node, body: torch.fx.GraphModule) -> torch.fx.GraphModule | None:
        """The graph that a higher-order call runs (autocast, no_grad and checkpoint regions, the true branch of a cond)."""
        for argument in target.args:
            if isinstance(argument, torch.fx.Node) and argument.op == "get_attr":
                found = getattr(body, str(argument.target), None)
                if isinstance(found, torch.fx.GraphModule):
                    return found
        return None

    def _read_inner(self, target: torch.fx.Node, inner: torch.fx.GraphModule) -> _Value:
        operands = [leaf for leaf in tree_leaves((target.args, target.kwargs)) if isinstance(leaf, torch.fx.Node) and leaf.op != "get_attr"]
        entries = [node for node in inner.graph.nodes if node.op == "placeholder"]
        for entry, operand in zip(entries, operands[len(operands) - len(entries) :], strict=True):
            self._values[entry] = self._values.get(operand, _Value())
        results = self._read_body(inner)
        if len(results) == 1:
            return results[0]
        self._results[target] = results
        return _Value()

    def _gather(self, target: torch.fx.Node, op: str) -> tuple[dict[Node, str], tuple[Read, ...]]:
        """What the call consumes: operations on activations, and parameters with the step into this call added to their path."""
        inputs: dict[Node, str] = {}
        reads: dict[tuple[str, Step], Read] = {}
        for argument, operand in _operands(target):
            if argument == "other" and op in LIKE_ANOTHER:
                continue
            value = self._values.get(operand, _Value())
            if value.node is not None:
                inputs.setdefault(value.node, argument)
            step = Step(op, argument, shape_of(operand))
            for read in value.reads:
                path = (*read.path, step)
                reads.setdefault((read.parameter, path[0]), Read(read.parameter, path))
        if not inputs and kind_of(op, ()) is Kind.VIEW:
            return {}, tuple(Read(read.parameter, read.path[:-1]) for read in reads.values())
        return inputs, tuple(reads.values())

    def _made(self, target: torch.fx.Node, op: str, inputs: dict[Node, str], reads: tuple[Read, ...]) -> Node:
        """A new operation, unless it concatenates what was concatenated before: both are one value."""
        kind = kind_of(op, [read.parameter for read in reads])
        if kind is not Kind.CAT or reads:
            return self._append(target, op, kind, inputs, reads)
        key = (op, tuple(inputs), tuple(self._order_of(target)), tuple(map(repr, target.args[1:])), repr(target.kwargs))
        if key not in self._joined:
            self._joined[key] = self._append(target, op, kind, inputs, reads)
        return self._joined[key]

    def _order_of(self, target: torch.fx.Node) -> Iterator[Node | torch.fx.Node]:
        for leaf in tree_leaves(target.args[0]):
            value = self._values.get(leaf)
            yield leaf if value is None or value.node is None else value.node

    def _append(self, target: torch.fx.Node, op: str, kind: Kind, inputs: dict[Node, str], reads: tuple[Read, ...]) -> Node:
        mask = mask_on(op, self._draws(target), shape_of(target)) if op in MASKING else None
        node = Node(
            index=len(self.nodes),
            op=op,
            kind=Kind.DROPOUT if mask is not None else kind,
            inputs=tuple(inputs),
            arguments=tuple(inputs.values()),
            reads=reads,
            module=self._first_path(_module_of(target)),
            shape=shape_of(target),
            target=target,
            mask=mask,
        )
        if self.as_in_training and node.kind is Kind.DROPOUT and mask is None:
            node.mask = Mask(float(node.argument("p", 1, 0.5) or 0.0), node.drops_channels)
        for source in inputs:
            source.users.append(node)
        self.nodes.append(node)
        return node

    def _overwrite(self, target: torch.fx.Node, value: _Value) -> None:
        """After an in-place operation its first argument, and what that is a view of, holds the new value."""
        changed = target.args[0] if target.args else None
        while isinstance(changed, torch.fx.Node):
            if changed in self._results:  # a block changes what it was given in place
                raise BlocksDifferError
            self._values[changed] = value
            is_view = changed.op == "call_function" and kind_of(_name_of(changed), ()) is Kind.VIEW
            changed = changed.args[0] if is_view and changed.args else None


_CASTS = frozenset(("to", "type_as", "float", "half", "bfloat16", "contiguous"))


def _returns_its_input(target: torch.fx.Node) -> bool:
    """Whether there was nothing to convert: the code goes on with the very tensor, on whatever name."""
    given, made = target.all_input_nodes[0].meta.get("val"), target.meta.get("val")
    if not isinstance(given, Tensor) or not isinstance(made, Tensor):
        return False
    return (given.dtype, given.device, given.shape, given.stride()) == (made.dtype, made.device, made.shape, made.stride())


def _sums_nothing(equation: str) -> bool:
    """Whether an einsum of two operands scales the one by the other, element by element."""
    given, _, made = equation.replace(" ", "").partition("->")
    operands = given.split(",")
    return len(operands) == 2 and any(set(operand) == set(made) for operand in operands) and set(given) - {","} == set(made)


def _constant(value: object) -> Draw | None:
    """A number that was written in the code."""
    is_known = isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point() and value.device.type == "cpu"
    return Draw("constant", float(value), tuple(value.shape)) if is_known and type(value) is Tensor else None


def _unmark(program: ExportedProgram) -> None:
    """Let operations in traced blocks speak of the values that were given to the block, not of their marks."""
    for body in program.graph_module.modules():
        for target in body.graph.nodes if isinstance(body, torch.fx.GraphModule) else ():
            if _is_block_operator(target) and _name_of(target) != "repeat":
                for item in list(target.users):
                    if not any(user.target.__class__ is torch._ops.OpOverload and _is_in_place(user) for user in item.users):
                        item.replace_all_uses_with(target.args[0][item.args[1]])


def _is_in_place(target: torch.fx.Node) -> bool:
    return _name_of(target).endswith("_")


def _is_block_operator(target: torch.fx.Node) -> bool:
    called = target.target
    return (
        isinstance(called, torch._ops.OpOverload) and called.namespace == "pl_normkit" and _name_of(target) in ("enter", "leave", "repeat")
    )


def _moved(path: str, old: str, new: str) -> str:
    return new + path[len(old) :] if path == old or path.startswith(f"{old}.") else path


def _constants(node: Node) -> list[Any]:
    leaves = tree_leaves((node.target.args, node.target.kwargs))
    return [leaf for leaf in leaves if not isinstance(leaf, torch.fx.Node)]


def _operands(target: torch.fx.Node) -> Iterator[tuple[str, torch.fx.Node]]:
    """The nodes a call reads, each with the name of its argument in the operation's schema (the position where there is none)."""
    schema = target.target._schema.arguments if isinstance(target.target, torch._ops.OpOverload) else ()
    for position, argument in enumerate(target.args):
        name = schema[position].name if position < len(schema) else str(position)
        yield from ((name, leaf) for leaf in tree_leaves(argument) if isinstance(leaf, torch.fx.Node))
    for name, argument in target.kwargs.items():
        yield from ((name, leaf) for leaf in tree_leaves(argument) if isinstance(leaf, torch.fx.Node))


def _returns_nothing(target: torch.fx.Node) -> bool:
    """Assertions on metadata and the like, which stand beside the flow of values."""
    return isinstance(target.target, torch._ops.OpOverload) and not target.target._schema.returns


def _name_of(target: torch.fx.Node) -> str:
    called = target.target
    if isinstance(called, torch._ops.OpOverload):
        return called._schema.name.rpartition("::")[2]
    return getattr(called, "__name__", str(called))


def _module_of(target: torch.fx.Node) -> str:
    """Path of the innermost module that ran the call.

    In a model that shares modules, an export names those inside a block whose forward was replaced from the block on (`repeated`).
    """
    stack = [path.partition("@")[0] for path, _ in (target.meta.get("nn_module_stack") or {}).values()]
    if not stack:
        return ""
    whole = [path for path in stack if is_from_root(path)]
    return without_root(stack[-1] if stack[-1] in whole else f"{whole[-1]}.{stack[-1]}")
