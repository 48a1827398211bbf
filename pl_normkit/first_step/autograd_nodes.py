"""Nodes of the autograd graph: their names, what they keep, and what lies behind them."""

from __future__ import annotations

__all__ = ["GraphView", "output_shape", "saved_tensor", "through_reshapes"]

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from pl_normkit.graph.autograd import base, behind, saved


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ACCUMULATE = "AccumulateGrad"
WEIGHT_OPS = _words("""Addmm Mm Bmm Baddbmm Mv Linear Convolution ConvolutionOverrideable MkldnnLinear SlowConv2D ThnnConv2D ConvDepthwise2D
    NativeBatchNorm CudnnBatchNorm MiopenBatchNorm NativeLayerNorm NativeGroupNorm FusedRmsNorm Embedding EmbeddingBag CudnnRnn
    MkldnnRnnLayer MiopenRnn Lstm LstmMps""")
"""Nodes that, where they read a parameter, are a layer of the network rather than a part of its loss."""
RESHAPES = _words("""View UnsafeView ReshapeAlias Permute Transpose T Squeeze Unsqueeze Slice Select Index Clone ToCopy Alias
    Flatten Unflatten Split SplitWithSizes Unbind Movedim Swapaxes Narrow IndexSelect MaskedSelect ViewAs Detach""")


def saved_tensor(node: Node, name: str) -> Tensor | None:
    """As `saved`, for tensors with values alone."""
    value = saved(node, name)
    return value.detach() if isinstance(value, Tensor) and value.numel() and not value.is_meta else None


def output_shape(node: Node, index: int = 0) -> tuple[int, ...] | None:
    metadata = node._input_metadata
    return tuple(int(size) for size in metadata[index].shape) if index < len(metadata) else None


def through_reshapes(node: Node | None) -> Node | None:
    """The first node at or behind `node` that computes something."""
    while node is not None and base(node) in RESHAPES:
        node = next(iter(behind(node)), None)
    return node


@dataclass(frozen=True)
class GraphView:
    """The graph behind some tensors, with the names of the parameters it ends in."""

    roots: tuple[Node, ...]
    names: dict[int, str]

    @classmethod
    def of(cls, tensors: Iterable[Tensor], names: dict[int, str]) -> GraphView:
        """The graph behind `tensors`; `names` are those of parameters by id."""
        return cls(tuple(tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None), names)

    @cached_property
    def nodes(self) -> list[Node]:
        return list(_reachable(self.roots, behind))

    @cached_property
    def users(self) -> dict[Node, list[tuple[Node, int]]]:
        """Who consumes a node's output, and as which input."""
        found: dict[Node, list[tuple[Node, int]]] = defaultdict(list)
        for node in self.nodes:
            for position, (following, _) in enumerate(node.next_functions):
                if following is not None:
                    found[following].append((node, position))
        return found

    @cached_property
    def tail(self) -> list[Node]:
        """The loss, and the part of the network after its last weight layer."""

        def deeper(node: Node) -> list[Node]:
            is_layer = base(node) in WEIGHT_OPS and any(self.name_of(inner) for inner in map(_through_casts, behind(node)))
            return [] if is_layer else behind(node)

        return list(_reachable(self.roots, deeper))

    def name_of(self, node: Node | None) -> str:
        """The parameter that gathers its gradient here, "" for other nodes."""
        if node is None or base(node) != ACCUMULATE:
            return ""
        return self.names.get(id(getattr(node, "variable", None)), "")

    def nearest_parameter(self, node: Node) -> str:
        """A parameter of the last layer before `node`, by breadth; "" where there is none within a few steps."""
        level = [node]
        for _ in range(6):
            level = [inner for outer in level for inner in behind(outer)]
            names = [name for inner in level if (name := self.name_of(inner))]
            if names:
                return names[0]
        return ""

    def parameters_behind(self, *nodes: Node) -> frozenset[str]:
        return frozenset(name for node in _reachable(nodes, behind) if (name := self.name_of(node)))

    @cached_property
    def parameters(self) -> frozenset[str]:
        return frozenset(name for node in self.nodes if (name := self.name_of(node)))

    def without(self, node: Node) -> list[Node]:
        """What is reached from the roots by paths that do not lead through `node`."""
        roots = [root for root in self.roots if root is not node]
        return list(_reachable(roots, lambda inner: [following for following in behind(inner) if following is not node]))

    @property
    def has_hidden_paths(self) -> bool:
        """Whether a function of the user's own may run a backward inside its own, as reentrant checkpoints and reversible blocks do."""
        return any(map(_is_of_user, self.nodes))

    @cached_property
    def direct_arguments_of_functions(self) -> frozenset[str]:
        """Parameters that functions of the user's own take as arguments, and nothing else in the graph takes."""
        theirs = set(filter(_is_of_user, self.nodes))
        return frozenset(
            name for node in self.nodes if (name := self.name_of(node)) and all(user in theirs for user, _ in self.users[node])
        )

    def ahead_of(self, node: Node) -> set[Node]:
        """Every node that `node` feeds."""
        return set(_reachable([node], lambda inner: [user for user, _ in self.users[inner]])) - {node}


def _is_of_user(node: object) -> bool:
    """A `torch.autograd.Function`."""
    return isinstance(node, BackwardCFunction)


def _through_casts(node: Node) -> Node:
    while base(node) in ("T", "Transpose", "ToCopy", "Permute", "View", "UnsafeView", "Expand") and behind(node):
        node = behind(node)[0]
    return node


def _reachable(start: Iterable[Node], following: Callable[[Node], Iterable[Node]]) -> dict[Node, None]:
    seen: dict[Node, None] = {}
    waiting = list(start)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen[node] = None
            waiting += following(node)
    return seen
