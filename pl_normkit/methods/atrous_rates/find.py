"""ASPP by its structure: parallel dilated convolutions of one value, joined by a concatenation or a sum."""

from __future__ import annotations

__all__ = ["Aspp", "AsppBranch", "aspps_in", "find_aspps"]

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from pl_normkit.graph import Fusion, Kind, ModelGraph, Node
from pl_normkit.methods.atrous_rates.rates import output_stride

_POINTWISE = (Kind.NORM, Kind.ACTIVATION, Kind.DROPOUT, Kind.VIEW)
_PADS = ("pad", "constant_pad_nd")


@dataclass(frozen=True)
class AsppBranch:
    """One dilated convolution of an ASPP.

    Attributes:
        node: the convolution (the depthwise one of a separable branch).
        rate: its dilation.
        kernel: height and width of its kernel, in taps.
        pads_zeros: whether it pads with zeros, not by reflection or repetition.
    """

    node: Node
    rate: int
    kernel: tuple[int, int]
    pads_zeros: bool

    @property
    def module(self) -> str:
        return self.node.module


@dataclass(frozen=True)
class Aspp:
    """Parallel dilated convolutions of one feature map.

    Attributes:
        node: where the branches are joined.
        branches: by rising rate.
        feature_size: (height, width) of the map they read, in cells.
        input_size: (height, width) of the traced input, in pixels.
    """

    node: Node
    branches: tuple[AsppBranch, ...]
    feature_size: tuple[int, int]
    input_size: tuple[int, int]

    @property
    def rates(self) -> tuple[int, ...]:
        return tuple(branch.rate for branch in self.branches)

    @property
    def side(self) -> int:
        """Short side of the feature map, in cells."""
        return min(self.feature_size)

    @property
    def output_stride(self) -> int:
        """Input pixels per cell, from the traced sizes; on the long side, where rounding matters least."""
        return output_stride(max(self.input_size), max(self.feature_size))

    @property
    def dead(self) -> tuple[AsppBranch, ...]:
        """Branches whose outer taps read zero padding at every cell."""
        return tuple(branch for branch in self.branches if branch.pads_zeros and branch.rate >= max(self.feature_size))


def find_aspps(model: nn.Module, example_inputs: Any) -> list[Aspp]:
    """The ASPPs of a model, in execution order.

    Args:
        model: any module that `ModelGraph.from_model` can read, also on the meta device.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        TraceError: when the model cannot be read.

    >>> import segmentation_models_pytorch as smp
    >>> import torch
    >>> model = smp.DeepLabV3Plus("resnet18", encoder_weights=None)
    >>> [aspp.rates for aspp in find_aspps(model, torch.zeros(2, 3, 128, 128))]
    [(12, 24, 36)]
    """
    return aspps_in(ModelGraph.from_model(model, example_inputs))


def aspps_in(graph: ModelGraph) -> list[Aspp]:
    """The ASPPs of a traced model."""
    return [aspp for fusion in graph.fusions for aspp in _aspps_of(graph, fusion)]


def _aspps_of(graph: ModelGraph, fusion: Fusion) -> Iterator[Aspp]:
    """The groups of branches of one fusion that read the same value."""
    chains = [chain for source in fusion.inputs if (chain := _branch_chain(source.node))]
    by_split: dict[Node, list[Node]] = defaultdict(list)
    for chain in chains:
        split = next((node for node in chain[1:] if sum(node in other[1:] for other in chains) > 1), None)
        if split is not None:
            by_split[split].append(chain[0])
    for split, convolutions in by_split.items():
        branches = _dilated_branches(convolutions)
        image = _image_behind(graph, split)
        if branches and image is not None:
            yield Aspp(fusion.node, branches, _size(split), _size(image))


def _branch_chain(end: Node) -> list[Node]:
    """The last spatial convolution before `end`, and what leads to it without mixing cells; empty where there is none."""
    node = end
    while node.kind in _POINTWISE or _is_pointwise_convolution(node):
        if len(node.inputs) != 1:
            return []
        node = node.inputs[0]
    if not _is_spatial_convolution(node):
        return []
    chain = [node, node.inputs[0]]
    while len(chain[-1].inputs) == 1 and (chain[-1].kind in _POINTWISE or _is_pointwise_convolution(chain[-1])):
        chain.append(chain[-1].inputs[0])
    return chain


def _dilated_branches(convolutions: list[Node]) -> tuple[AsppBranch, ...]:
    """Branches by rising rate, () unless two of them are dilated, differently. One plain 3x3 beside three others is no atrous branch."""
    branches = sorted((_branch(node) for node in convolutions), key=lambda branch: branch.rate)
    if len({branch.rate for branch in branches if branch.rate > 1}) < 2:
        return ()
    if len(branches) > 3 and branches[0].rate == 1:
        branches = branches[1:]
    return tuple(branches)


def _branch(node: Node) -> AsppBranch:
    dilation = _pair(node.argument("dilation", 5, 1))
    kernel = _kernel(node)
    rate = max(d for d, k in zip(dilation, kernel, strict=True) if k > 1)
    source = node.inputs[0]
    return AsppBranch(node, rate, kernel, source.op not in _PADS or source.argument("mode", 2, "constant") == "constant")


def _is_spatial_convolution(node: Node) -> bool:
    """A 2-D convolution with an odd kernel that keeps the size of its map, padding included."""
    if node.op != "conv2d" or len(node.shape) != 4:
        return False
    source = node.inputs[0]
    before = source.inputs[0] if source.op in _PADS else source
    kernel = _kernel(node)
    return max(kernel) > 1 and all(k % 2 for k in kernel) and _size(node) == _size(before)


def _is_pointwise_convolution(node: Node) -> bool:
    return node.op == "conv2d" and len(node.shape) == 4 and _kernel(node) == (1, 1) and _size(node) == _size(node.inputs[0])


def _kernel(node: Node) -> tuple[int, int]:
    """Height and width of the kernel; of an operand, since a weight that is computed has no parameter of its shape."""
    weight = node.target.args[1]
    shape = tuple(weight.meta["val"].shape)  # type: ignore[union-attr]
    return int(shape[2]), int(shape[3])


def _pair(value: Any) -> tuple[int, int]:
    """One value or two, as two."""
    values = tree_leaves(value)
    return int(values[0]), int(values[-1])


def _size(node: Node) -> tuple[int, int]:
    return node.shape[-2], node.shape[-1]


def _image_behind(graph: ModelGraph, node: Node) -> Node | None:
    """The largest 4-D input that leads to `node`."""
    lead, pending = {node}, [node]
    while pending:
        pending = [source for found in pending for source in found.inputs if source not in lead]
        lead.update(pending)
    images = [found for found in graph.nodes if found in lead and found.kind is Kind.INPUT and len(found.shape) == 4]
    return max(images, key=lambda found: found.numel, default=None)
