"""`measure_fusion_scales`: mean and standard deviation of every branch of every fusion, over the data."""

from __future__ import annotations

__all__ = ["BranchScale", "FusionScale", "measure_fusion_scales"]

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pl_normkit.errors import DataError
from pl_normkit.graph import ModelGraph, Node
from pl_normkit.methods.fusion_scale.joins import Join, describe_resize, read_joins
from pl_normkit.methods.fusion_scale.modules import TINY_STD
from pl_normkit.methods.fusion_scale.moments import Moments, agree_on_problem, merge_over_ranks
from pl_normkit.methods.fusion_scale.running import InputsOf, Progress, first_inputs, measuring, run_batches
from pl_normkit.wrappers import unwrapped


@dataclass(frozen=True)
class BranchScale:
    """One branch of a fusion, as the fusion gets it.

    Attributes:
        module: path of the module that made the operand.
        channels: its channels.
        mean: over (N, C, H, W) of all data.
        std: biased standard deviation over the same.
        share: its part of the variance that the consumer reads, from 0 to 1: its channels times its variance, over the sum of all.
        resize: the last resize on its way that the other branches do not share, with the line, "" without one.
    """

    module: str
    channels: int
    mean: float
    std: float
    share: float
    resize: str


@dataclass(frozen=True)
class FusionScale:
    """One fusion with its measured branches.

    Attributes:
        module: path of the module that joins.
        source: `file.py:line` of the join, "" where unknown.
        kind: concatenation along channels, or sum.
        consumer: path of the first weight layer that reads the result, "" without one.
        is_multi_level: whether a branch was resized on its own way.
        branches: in channel or operand order.
    """

    module: str
    source: str
    kind: Literal["concat", "sum"]
    consumer: str
    is_multi_level: bool
    branches: tuple[BranchScale, ...]

    @property
    def ratio(self) -> float:
        """Largest over smallest standard deviation; constant branches are left out, and 1 with fewer than two others."""
        stds = [branch.std for branch in self.branches if branch.std >= TINY_STD]
        return max(stds) / min(stds) if len(stds) > 1 else 1.0

    @property
    def log2_spread(self) -> float:
        return math.log2(self.ratio)

    def __str__(self) -> str:
        where = f" ({self.source})" if self.source else ""
        lines = [f"{self.kind} in {self.module or 'the model'}{where}, read by {self.consumer or 'no layer'}: std ratio {self.ratio:.2f}"]
        for branch in self.branches:
            resized = f", {branch.resize}" if branch.resize else ""
            numbers = f"std {branch.std:.3g}, mean {branch.mean:.3g}, share {100 * branch.share:.0f} %"
            lines.append(f"  {branch.channels} channels from {branch.module or 'the model'}: {numbers}{resized}")
        return "\n".join(lines)


def measure_fusion_scales(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    max_batches: int | None = None,
    example_inputs: Any = None,
    inputs: InputsOf | None = None,
    progress: Progress | None = None,
) -> list[FusionScale]:
    """Mean, standard deviation and share of every branch of every fusion, concatenations and sums, in execution order.

    As at the start of training: batch norms on batch statistics, dropout off, no autocast. Everything is restored: running
    statistics, modes, RNG. One pass; merged in float64 (never E[x^2] - E[x]^2), over all ranks under `torch.distributed`. A fusion
    in a layer that runs several times is listed once for each call.

    Args:
        model: any module that can be traced.
        loader: any iterable of batches.
        max_batches: how many of them; None for all.
        example_inputs: inputs for the trace; None takes the first batch.
        inputs: from a batch to the model's inputs; by default the tensor itself, the first item of a sequence, the entries of a
            dict that forward names.
        progress: called after each batch.

    Raises:
        TraceError: when the model cannot be traced.
        DataError: for an empty loader, values that are not finite, or a fusion that did not run on the data.

    Source: variance as the measure of scale is stated in a public review of arXiv 2402.01149; shares and the traced
    criterion are derived here.

    >>> import segmentation_models_pytorch as smp
    >>> import torch
    >>> model = smp.FPN("resnet18", encoder_weights=None, decoder_merge_policy="cat")
    >>> [len(fusion.branches) for fusion in measure_fusion_scales(model, [torch.rand(2, 3, 64, 64)])][-1]
    4
    """
    model = unwrapped(model)
    if example_inputs is None:
        example_inputs, loader = first_inputs(model, loader, inputs)
    graph = ModelGraph.from_model(model, example_inputs)
    return measure_joins(model, graph, read_joins(graph), loader, max_batches=max_batches, inputs=inputs, progress=progress)


def measure_joins(
    model: nn.Module,
    graph: ModelGraph,
    joins: Sequence[Join],
    loader: Iterable[Any],
    *,
    max_batches: int | None,
    inputs: InputsOf | None = None,
    progress: Progress | None = None,
) -> list[FusionScale]:
    """`measure_fusion_scales` for some joins of a graph that is known."""
    if not joins:
        return []
    recorder = _JoinRecorder(model, graph, joins)
    with measuring(model), recorder:
        run_batches(
            model,
            loader,
            max_batches=max_batches,
            inputs=inputs,
            has_bad_value=recorder.bad_value,
            after_batch=lambda done: progress(done, 0) if progress is not None else None,
        )
    found = []
    for join in joins:
        moments = [merge_over_ranks(recorder.moments[branch.node, join.node]) for branch in join.branches]
        found.append(_summary(join, moments))
    silent = [str(fusion.module) for fusion, join in zip(found, joins, strict=True) if math.isnan(fusion.branches[0].std)]
    if silent:
        agree_on_problem(
            DataError(
                "a fusion of the trace did not run on the loader's batches", where=", ".join(silent), fix="pass example_inputs like them"
            )
        )
    return found


def _summary(join: Join, moments: Sequence[Moments]) -> FusionScale:
    stds = [float(found.std) if float(found.count) else math.nan for found in moments]
    sizes = [branch.width * std**2 for branch, std in zip(join.branches, stds, strict=True)]
    total = sum(sizes)
    branches = tuple(
        BranchScale(
            module=branch.node.module,
            channels=branch.width,
            mean=float(found.mean),
            std=std,
            share=size / total if total else 0.0,
            resize=describe_resize(branch.resize),
        )
        for branch, found, std, size in zip(join.branches, moments, stds, sizes, strict=True)
    )
    consumer = join.consumer.module if join.consumer is not None else ""
    return FusionScale(join.node.module, join.node.source, join.kind, consumer, join.is_multi_level, branches)


_OPS = {"cat": "cat", "concat": "cat", "add": "add", "add_": "add", "stack": "stack"}

_Signature = tuple[int, ...]


class _JoinRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every concatenation and addition as it runs, and takes the moments of the operands of the joins.

    A call is told by its module and its place among the calls of that operation there, which are the same in the trace; other calls
    (on parameters, say) are passed over by their channels.
    """

    def __init__(self, model: nn.Module, graph: ModelGraph, joins: Sequence[Join]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._operands = _operands_to_take(joins)
        self._expected = _calls_of(graph)
        self._position: dict[tuple[str, str], int] = defaultdict(int)
        self._path: list[str] = []
        self._hooks = ExitStack()
        self.moments: dict[tuple[Node, Node], Moments] = {
            (operand, join): Moments.empty(1) for taken in self._operands.values() for operand, join, _ in taken
        }

    def bad_value(self) -> str:
        return next((join.module or join.op for (_, join), found in self.moments.items() if not found.is_finite), "")

    def __enter__(self) -> Any:
        for path, module in self._model.named_modules():
            self._hooks.callback(module.register_forward_pre_hook(self._enter_module(path), prepend=True).remove)
            self._hooks.callback(module.register_forward_hook(self._leave_module, always_call=True).remove)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _enter_module(self, path: str) -> Any:
        def enter(_: nn.Module, __: tuple[Any, ...]) -> None:
            if path == "":
                self._position.clear()
                self._path.clear()
            self._path.append(path)

        return enter

    def _leave_module(self, _: nn.Module, __: tuple[Any, ...], ___: Any) -> None:
        self._path.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        op = _OPS.get(func._schema.name.rpartition("::")[2])
        if op is not None and self._path:
            self._take(op, [leaf for leaf in _flat(args) if isinstance(leaf, Tensor)])
        return func(*args, **(kwargs or {}))

    def _take(self, op: str, tensors: Sequence[Tensor]) -> None:
        key = (self._path[-1], op)
        expected = self._expected.get(key, ())
        position = self._position[key]
        if position < len(expected) and _signature(op, [tuple(tensor.shape) for tensor in tensors]) == expected[position][1]:
            self._position[key] += 1
            for operand, join, place in self._operands.get(expected[position][0], ()):
                found = Moments.of(tensors[place]).pooled([tensors[place].shape[1]])
                self.moments[operand, join] = self.moments[operand, join].merge(found)


def _flat(args: Any) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, (list, tuple)):
            yield from _flat(arg)
        else:
            yield arg


def _signature(op: str, shapes: Sequence[tuple[int, ...]]) -> _Signature:
    """Channels of each operand: the rest of the shape may differ from batch to batch."""
    return tuple(shape[1] if len(shape) > 1 else -1 for shape in shapes)


def _calls_of(graph: ModelGraph) -> dict[tuple[str, str], list[tuple[Node, _Signature]]]:
    """Concatenations, additions and stackings of activations by module and operation, in execution order."""
    calls: dict[tuple[str, str], list[tuple[Node, _Signature]]] = defaultdict(list)
    for node in graph.nodes:
        op = _OPS.get(node.op)
        if op is not None and len(node.inputs) > 1:
            calls[node.module, op].append((node, _signature(op, [source.shape for source in node.inputs])))
    return calls


def _operands_to_take(joins: Sequence[Join]) -> dict[Node, list[tuple[Node, Node, int]]]:
    """Operation -> (operand, its join, position among the operation's operands), nested joins opened."""
    taken: dict[Node, list[tuple[Node, Node, int]]] = defaultdict(list)
    for join in joins:
        leaves = {branch.node for branch in join.branches}
        pending = [join.node.inputs[0] if join.node.op == "sum" else join.node]
        while pending:
            node = pending.pop()
            for place, source in enumerate(node.inputs):
                if source in leaves:
                    taken[node].append((source, join.node, place))
                else:
                    pending.append(source)
    return taken
