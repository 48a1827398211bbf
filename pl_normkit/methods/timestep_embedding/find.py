"""Where a time, class or noise level enters the traced model, and which norms it reaches before anything bends it."""

from __future__ import annotations

__all__ = ["TimeInjection", "TimeNorm", "find_time_injections"]

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pl_normkit.graph import Kind, ModelGraph, Node, Norm
from pl_normkit.graph.nodes import shape_of
from pl_normkit.graph.structure import PASSING

Layout = Literal["channels first", "channels last"]

_FILLS = frozenset("ones ones_like new_ones zeros zeros_like new_zeros full full_like new_full scalar_tensor".split())  # noqa: SIM905
_ELEMENTWISE_VIEWS = frozenset("expand expand_as broadcast_to repeat to _to_copy contiguous clone alias detach type_as float".split())  # noqa: SIM905
_RATIOS = frozenset(("div", "neg", "sub", "rsub"))
_CONVOLUTIONS = frozenset("conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d".split())  # noqa: SIM905
_AVERAGES = frozenset(["avg_pool1d", "avg_pool2d", "avg_pool3d"])


@dataclass(frozen=True)
class TimeNorm:
    """A norm that a time signal reaches through linear operations alone.

    Attributes:
        norm: the norm in the graph.
        channels: channels it normalizes.
        groups: its groups: `channels` for an instance norm, 1 for a layer or RMS norm, 0 for a batch norm.
        kept: share of the variance of the signal over channels that it leaves (derived): 0 where the norm takes all of it, 1 - G / C for
            a group norm, 1 where nothing is taken.
    """

    norm: Norm
    channels: int
    groups: int
    kept: float

    @property
    def module(self) -> str:
        return self.norm.module

    @property
    def channels_per_group(self) -> int:
        return self.channels // self.groups if self.groups else self.channels


@dataclass(frozen=True)
class TimeInjection:
    """One place where a value that is constant over positions meets features that are not.

    Attributes:
        node: the addition, concatenation or product.
        kind: "add", "concat" (constant planes) or "scale".
        signal: the operand that carries the time.
        carrier: the operand that carries the features.
        layout: where the channels are.
        is_shared: whether every sample of the batch gets the same time.
        sources: the inputs of the model that the signal depends on.
        behind: path of the norm whose output it acts on, "" where there is none: such a signal was not normalized away.
        norms: the norms that it reaches.
    """

    node: Node
    kind: Literal["add", "concat", "scale"]
    signal: Node
    carrier: Node
    layout: Layout
    is_shared: bool
    sources: frozenset[Node]
    behind: str
    norms: tuple[TimeNorm, ...]

    def __str__(self) -> str:
        where = f"{self.kind} in {self.node.module or '(the model)'} ({self.node.source})"
        reached = ", ".join(f"{norm.module} ({norm.norm.kind}, {norm.channels} channels, {norm.groups} groups)" for norm in self.norms)
        return f"{where} -> {reached or (f'behind {self.behind}' if self.behind else 'no norm')}"


def find_time_injections(graph: ModelGraph) -> list[TimeInjection]:
    """Additions, concatenations and products of features and a signal that does not vary over positions and comes from other inputs.

    A gate or context that is computed from the features themselves is none, nor is a learned offset: both are no input of the model.

    Args:
        graph: of a model that takes the time (or class, or noise level) as a tensor of its inputs.

    Returns:
        injections in execution order.

    >>> from torch import nn
    >>> from pl_normkit.graph import ModelGraph
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.conv, self.time, self.norm = nn.Conv2d(3, 8, 3), nn.Linear(4, 8), nn.GroupNorm(4, 8)
    ...     def forward(self, x, t):
    ...         return self.norm(self.conv(x) + self.time(t)[:, :, None, None])
    >>> inputs = torch.randn(2, 3, 8, 8), torch.randn(2, 4)
    >>> [(found.kind, [norm.kept for norm in found.norms]) for found in find_time_injections(ModelGraph.from_model(Block(), inputs))]
    [('add', [0.5])]
    """
    if sum(node.kind is Kind.INPUT for node in graph.nodes) < 2:  # features and time are different inputs
        return []
    finder = _Finder(graph)
    return [injection for node in graph.nodes if (injection := finder.injection(node)) is not None]


class _Finder:
    """Reads the graph once: the inputs behind each node, and whether its value is constant over positions in either layout."""

    def __init__(self, graph: ModelGraph) -> None:
        self._norm_at = {norm.node: norm for norm in graph.norms}
        self._sources: dict[Node, frozenset[Node]] = {}
        self._constant: dict[tuple[Node, Layout], bool] = {}
        for node in graph.nodes:
            own = [frozenset([node])] if node.kind is Kind.INPUT else [self._sources[source] for source in node.inputs]
            self._sources[node] = frozenset[Node]().union(*own)
            for layout in ("channels first", "channels last"):
                self._constant[node, layout] = self._is_constant(node, layout)

    def _is_constant(self, node: Node, layout: Layout) -> bool:
        """Whether the value is the same at every position, by its shape or because it is made element by element from such values."""
        if all(size == 1 for size in _positions(node.shape, layout)):
            return True
        if node.kind not in (Kind.ADD, Kind.MUL, Kind.ACTIVATION, Kind.RESIZE) and node.op not in _ELEMENTWISE_VIEWS | _RATIOS:
            return False
        return all(self._fits(source, node, layout) for source in node.inputs) and all(
            _is_flat(other, node, layout) for other in _other_operands(node)
        )

    def _fits(self, source: Node, node: Node, layout: Layout) -> bool:
        """Whether `source`, broadcast to the shape of `node`, is constant over positions."""
        if len(source.shape) == len(node.shape):
            return self._constant[source, layout]
        return all(size == 1 for size in _positions(_padded(source.shape, len(node.shape)), layout))

    def injection(self, node: Node) -> TimeInjection | None:
        kind = _injection_kind(node)
        if kind is None or len(node.inputs) < 2 or len(node.shape) < 2 or any(user.kind is Kind.SOFTMAX for user in node.users):
            return None
        for layout in ("channels first", "channels last"):
            if kind == "concat" and (layout == "channels last" or int(node.argument("dim", 1, 0)) % len(node.shape) != 1):
                continue
            signals = [source for source in node.inputs if self._fits(source, node, layout) and self._sources[source]]
            carriers = [source for source in node.inputs if source not in signals]
            if len(node.shape) == 2:  # vectors have no positions: only a time that the whole batch shares can vanish there
                signals = [source for source in node.inputs if _is_shared(self._sources[source], node.shape[0])]
                carriers = [source for source in node.inputs if source not in signals]
            if signals and carriers:
                return self._injection(node, kind, signals[0], carriers[0], layout)
        return None

    def _injection(
        self, node: Node, kind: Literal["add", "concat", "scale"], signal: Node, carrier: Node, layout: Layout
    ) -> TimeInjection | None:
        sources = self._sources[signal]
        if not self._sources[carrier] - sources:
            return None
        shared = _is_shared(sources, node.shape[0])
        reached = [] if kind == "scale" else list(self._norms_after(node, sources, layout))
        norms = tuple(_time_norm(norm, shared) for norm in reached)
        return TimeInjection(node, kind, signal, carrier, layout, shared, sources, self._norm_before(carrier), norms)

    def _norms_after(self, start: Node, sources: frozenset[Node], layout: Layout) -> Iterator[Norm]:
        """The first norms on every way that keeps a constant offset a constant offset and where the signal does not come in once more,
        varying over positions."""
        pending, seen = [start], {start}
        while pending:
            for user in pending.pop(0).users:
                if user in seen:
                    continue
                seen.add(user)
                if user in self._norm_at:
                    yield self._norm_at[user]
                elif _keeps_offsets(user, layout) and not any(
                    self._sources[other] <= sources and not self._fits(other, user, layout) for other in user.inputs
                ):
                    pending.append(user)

    def _norm_before(self, node: Node) -> str:
        """The norm that made `node`, looked for through views, scales and shifts."""
        while node not in self._norm_at:
            wide = [source for source in node.inputs if source.numel == node.numel]
            if node.kind not in (*PASSING, Kind.ADD, Kind.MUL) or len(wide) != 1:
                return ""
            node = wide[0]
        return self._norm_at[node].module


def _injection_kind(node: Node) -> Literal["add", "concat", "scale"] | None:
    if node.kind is Kind.ADD or node.op == "sub":
        return "add"
    if node.op in ("cat", "concat"):
        return "concat"
    return "scale" if node.kind is Kind.MUL else None


def _is_shared(sources: frozenset[Node], batch: int) -> bool:
    """Whether the inputs hold one value for the whole batch; a batch of one sample is no evidence, unless the input has no batch at all."""
    return bool(sources) and all(source.shape == () or (source.shape[0] == 1 and batch > 1) for source in sources)


def _time_norm(norm: Norm, shared: bool) -> TimeNorm:
    shape = norm.node.inputs[0].shape
    channels = shape[1] if norm.kind in ("batch", "instance", "group") else shape[-1]
    if norm.kind == "batch":
        return TimeNorm(norm, channels, 0, 0.0 if shared else 1.0)
    if norm.kind == "group":
        groups = int(norm.node.argument("num_groups", 1, 1))
        return TimeNorm(norm, channels, groups, 1.0 if groups == 1 else 1 - groups / channels)
    return TimeNorm(norm, channels, channels if norm.kind == "instance" else 1, 0.0 if norm.kind == "instance" else 1.0)


def _keeps_offsets(node: Node, layout: Layout) -> bool:
    """Linear operations: what is constant over positions comes out constant, but for what zero padding does at the border."""
    if node.kind in (*PASSING, Kind.ADD) or node.op in _CONVOLUTIONS:
        return True
    if node.op == "linear":  # it reads the last axis
        return layout == "channels last" or len(node.shape) == 2
    if node.kind is Kind.RESIZE:
        return "grid" not in node.op and "shuffle" not in node.op
    if (node.kind is Kind.MUL or node.op in _RATIOS) and len(node.inputs) == 1:
        return all(_is_flat(other, node, layout) for other in _other_operands(node))
    return node.op in _AVERAGES


def _is_flat(other: torch.fx.Node, node: Node, layout: Layout) -> bool:
    """Whether a constant or parameter that `node` reads does not vary over positions."""
    return _is_filled(other) or all(size == 1 for size in _positions(_padded(shape_of(other), len(node.shape)), layout))


def _positions(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    return shape[2:] if layout == "channels first" else shape[1:-1]


def _padded(shape: tuple[int, ...], length: int) -> tuple[int, ...]:
    return (1,) * (length - len(shape)) + shape


def _other_operands(node: Node) -> Iterable[torch.fx.Node]:
    """What the operation reads beside activations: parameters, buffers, constants."""
    own = {source.target for source in node.inputs}
    return [other for other in node.target.all_input_nodes if other not in own and isinstance(other.meta.get("val"), Tensor)]


def _is_filled(other: torch.fx.Node) -> bool:
    """Whether a constant is one value everywhere."""
    while other.op == "call_function" and _name(other) in _ELEMENTWISE_VIEWS and other.all_input_nodes:
        if math.prod(shape_of(other.all_input_nodes[0])) == 1:
            return True
        other = other.all_input_nodes[0]
    return other.op == "call_function" and _name(other) in _FILLS


def _name(node: torch.fx.Node) -> str:
    return node.target._schema.name.rpartition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else ""
