"""Layer norms whose input can be given zero mean without changing anything else: the streams they read, and what writes to these."""

from __future__ import annotations

__all__ = ["Stream", "Writer", "find_streams"]

from collections.abc import Iterator
from dataclasses import dataclass, field

from pl_normkit.graph import Kind, ModelGraph, Node
from pl_normkit.methods.norm_operators.last_dim import (
    Layer,
    averages_rows,
    factor_of,
    keeps_rows,
    layer_of,
    readers_by_parameter,
    scales_rows,
    sums_rows,
)


@dataclass(frozen=True)
class Writer:
    """A layer that writes rows to a stream, and the name of the LayerScale behind it ("" without one)."""

    layer: Layer
    factor: str


@dataclass
class Stream:
    """Values that become centred together.

    Attributes:
        norms: the layer norms that read them.
        values: the operations whose results become centred.
        writers: what writes to them, by the operation that makes the written value.
        bases: values that no layer of the model can centre; they are recentred once where they enter.
        reason: why it must be left alone, "" where it can be converted.
    """

    norms: list[Node]
    values: set[Node] = field(default_factory=set)
    writers: dict[Node, Writer] = field(default_factory=dict)
    bases: list[Node] = field(default_factory=list)
    reason: str = ""


def find_streams(graph: ModelGraph) -> list[Stream]:
    """The streams of all layer norms over the last dimension, in execution order; those with a common value are one."""
    writers = {node: writer for node in graph.nodes if (writer := _writer_at(node)) is not None}
    is_written: dict[Node, bool] = {}
    for node in graph.nodes:
        is_written[node] = node in writers or any(is_written[source] for source in _rows_from(node))
    streams: list[Stream] = []
    for norm in graph.norms:
        if norm.kind == "layer" and norm.node.op in ("layer_norm", "native_layer_norm") and len(norm.node.inputs) == 1:
            streams = _merged(streams, _stream_of(norm.node, writers, is_written))
    readers = readers_by_parameter(graph)
    for stream in streams:
        stream.reason = (
            _dropped_writer(stream, is_written) or _reader_without_norm(stream) or _shared_writer(stream, readers) or _no_gain(stream)
        )
    return streams


def _rows_from(node: Node) -> tuple[Node, ...]:
    """The inputs whose centring centres `node`."""
    is_linear = keeps_rows(node) or averages_rows(node) or scales_rows(node) or sums_rows(node)
    return node.inputs if is_linear else ()


def _writer_at(node: Node) -> Writer | None:
    """The layer that makes the value of `node`, at once or through a LayerScale."""
    layer = layer_of(node)
    if layer is not None:
        return Writer(layer, "")
    factor = factor_of(node)
    source = node.inputs[0] if factor else None
    while source is not None and len(source.users) == 1 and len(source.target.users) == 1:
        layer = layer_of(source)
        if layer is not None:
            return Writer(layer, factor)
        source = source.inputs[0] if keeps_rows(source) else None
    return None


def _stream_of(norm: Node, writers: dict[Node, Writer], is_written: dict[Node, bool]) -> Stream:
    stream = Stream([norm])
    waiting = [norm.inputs[0]]
    while waiting:
        node = waiting.pop()
        if node in stream.values or node in stream.bases:
            continue
        if not is_written[node]:
            stream.bases.append(node)
            continue
        stream.values.add(node)
        if node in writers:
            stream.writers[node] = writers[node]
        else:
            waiting += _rows_from(node)
    return stream


def _merged(streams: list[Stream], new: Stream) -> list[Stream]:
    apart = []
    for stream in streams:
        if stream.values & new.values or set(stream.bases) & set(new.bases):
            bases = dict.fromkeys([*stream.bases, *new.bases])
            new = Stream(stream.norms + new.norms, stream.values | new.values, stream.writers | new.writers, list(bases))
        else:
            apart.append(stream)
    return [*apart, new]


def _dropped_writer(stream: Stream, is_written: dict[Node, bool]) -> str:
    """A dropout behind what a layer writes, which would take the zero mean away."""
    waiting, seen = list(stream.bases), set(stream.bases)
    while waiting:
        node = waiting.pop()
        if node.kind is Kind.DROPOUT and any(is_written[source] for source in node.inputs):
            return f"dropout of {node.module or 'the model'} takes the zero mean away in training mode"
        if node.kind is Kind.DROPOUT or sums_rows(node):
            new = [source for source in node.inputs if source not in seen]
            seen.update(new)
            waiting += new
    return ""


def _reader_without_norm(stream: Stream) -> str:
    """What would see centred values where it saw others."""
    known = {*stream.norms, *(stream.values - set(stream.writers))}
    for value in sorted({*stream.values, *stream.bases}, key=lambda node: node.index):
        if any(user.op == "output" for user in value.target.users):
            return "the model returns the values that the norm reads"
        for user in value.users:
            if user not in known:
                return _named(user)
    return ""


def _named(reader: Node) -> str:
    while _rows_from(reader) and reader.users:  # the stream goes on: name what reads its end
        reader = reader.users[0]
    if _rows_from(reader):
        return "the model returns the values that the norm reads"
    if reader.op in ("layer_norm", "native_layer_norm"):
        return f"the stream goes on to {reader.module or 'the model'}, whose input cannot be given zero mean"
    return f"{reader.op} of {reader.module or 'the model'} reads the same values without a norm"


def _shared_writer(stream: Stream, readers: dict[str, set[Node]]) -> str:
    factors: dict[str, set[str]] = {}
    own: dict[str, set[Node]] = {}
    for node, writer in stream.writers.items():
        factors.setdefault(writer.layer.weight, set()).add(writer.factor)
        for name in _names(writer):
            own.setdefault(name, set()).update((node, writer.layer.node))
    for name, nodes in own.items():
        others = sorted(readers[name] - nodes, key=lambda node: node.index)
        if others:
            return f"{name}, which writes what the norm reads, is tied: {others[0].module or 'the model'} reads it too"
        if len(factors.get(name, ())) > 1:
            return f"{name} is read with several scales"
    return ""


def _names(writer: Writer) -> Iterator[str]:
    yield from filter(None, (writer.layer.weight, writer.layer.bias, writer.factor))


def _no_gain(stream: Stream) -> str:
    if not stream.bases or 2 * len(stream.bases) <= len(stream.norms):
        return ""
    return f"nothing would be saved: values to recentre {len(stream.bases)}, norms {len(stream.norms)}"
