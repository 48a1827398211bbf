"""The residual branches of a model, and which of their modules an edit can reach."""

from __future__ import annotations

__all__ = ["Layout", "OutputPlace", "Site", "read_layout"]

from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from torch import nn

from pl_normkit.errors import NothingMatchedError
from pl_normkit.graph import Branch, Kind, ModelGraph, Node, Norm, ResidualAdd
from pl_normkit.graph.paths import block_of
from pl_normkit.graph.structure import PASSING


class OutputPlace(NamedTuple):
    """Where the output of a branch's last weight layer can be acted on: the output or the input of a module."""

    path: str
    side: Literal["before", "after"]


@dataclass(frozen=True)
class Site:
    """A branch of a residual addition.

    Attributes:
        add: the addition.
        branch: the branch.
        block: the numbered block that holds the addition.
        layer: number of its layer, from 1.
        norm: the first norm before its first weight layer; in a branch without one, its first norm that no weight layer is behind.
        is_entry: whether nothing but views stands before `norm`, and a weight layer behind it.
        output_norm: a norm behind the last weight layer.
        post_norm: a norm that alone reads the sum.
        scale: name of the parameter that scales the output per channel (LayerScale), "" without one.
        heads: heads of its attention, 0 without one.
    """

    add: Node
    branch: Branch
    block: str
    layer: int
    norm: Norm | None
    is_entry: bool
    output_norm: Norm | None
    post_norm: Norm | None
    scale: str
    heads: int

    @property
    def weights(self) -> list[Node]:
        return self.branch.of_kind(Kind.WEIGHT)

    @property
    def last(self) -> Node:
        return self.weights[-1]

    @property
    def ends(self) -> list[Node]:
        """The weight layers with no other behind them: several where the branch adds what they give (parallel layers, LoRA)."""
        weights = set(self.weights)
        return [node for node in self.weights if weights.isdisjoint(self.branch.downstream(node))]


@dataclass(frozen=True)
class Layout:
    """The residual branches in depth order, and the model they belong to."""

    model: nn.Module
    graph: ModelGraph
    sites: tuple[Site, ...]

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.sites[-1].layer

    @property
    def takes_images(self) -> bool:
        """Whether the first weight layer is a convolution."""
        first = next((node for node in self.graph.nodes if node.kind is Kind.WEIGHT), None)
        return first is not None and "conv" in first.op

    def is_parallel(self, site: Site) -> bool:
        return sum(other.add is site.add for other in self.sites) > 1

    def norm_module(self, norm: Norm) -> str | None:
        """The path of a module that does nothing but this norm, once in a forward pass; None without one."""
        module = self._module(norm.module)
        own = {f"{norm.module}.{name}" for name, _ in module.named_parameters()} if module is not None else set()
        if module is None or any(module.children()) or not own <= {norm.gamma, norm.beta}:
            return None
        return norm.module if sum(other.module == norm.module for other in self.graph.norms) == 1 else None

    def weight_module(self, node: Node) -> str | None:
        """The path of a module that does nothing but this weight layer, once in a forward pass; None without one."""
        module = self._module(node.module)
        if module is None or any(module.children()) or self.graph.calls[node.module, node.op] != 1:
            return None
        own = {f"{node.module}.{name}" for name, _ in module.named_parameters()}
        return node.module if own and own == set(node.parameters) else None

    def output_place(self, site: Site) -> OutputPlace | None:
        """The output of the last weight layer or, where that is no module of its own, the input of the dropout behind it."""
        path = self.weight_module(site.last)
        if path is not None:
            return OutputPlace(path, "after")
        for node in site.branch.downstream(site.last):
            if node.kind is Kind.DROPOUT:
                is_module = isinstance(self._module(node.module), nn.Dropout) and self.graph.calls[node.module, node.op] == 1
                return OutputPlace(node.module, "before") if is_module else None
            if node.kind is not Kind.VIEW:
                return None
        return None

    def weight_name(self, node: Node) -> str:
        """The name of the matrix of a weight layer."""
        names = {read.path[-1].argument: read.parameter for read in node.reads}
        return next(names[argument] for argument in ("weight", "mat2", "mat1", "other", *names) if argument in names)

    def axis(self, node: Node) -> int:
        """The axis of the features that a weight layer writes."""
        return 1 if "conv" in node.op and len(node.shape) > 2 else -1

    def _module(self, path: str) -> nn.Module | None:
        try:
            return self.model.get_submodule(path) if path else None
        except AttributeError:
            return None


def read_layout(model: nn.Module, example_inputs: Any) -> Layout:
    """Raises NothingMatchedError without a residual branch, TraceError where the model cannot be read."""
    graph = ModelGraph.from_model(model, example_inputs)
    adds = [add for add in graph.residual_adds if any(branch.of_kind(Kind.WEIGHT) for branch in add.branches)]
    nested = {add.node for add in adds if any(add.node in branch for other in adds if other is not add for branch in other.branches)}
    adds = [add for add in adds if add.node not in nested and not _is_sum_of_heads(add)]
    if any(_attends(add) for add in adds):
        adds = [add for add in adds if not _adds_positions(add, graph)]
    if not adds:
        raise NothingMatchedError("the model has no residual branch with a weight layer", fix="give a network with residual blocks")
    numbers = _layer_numbers(adds)
    sites = [_site(graph, add, branch, numbers[add.node]) for add in adds for branch in add.branches if branch.of_kind(Kind.WEIGHT)]
    return Layout(model, graph, tuple(sites))


def _is_sum_of_heads(add: ResidualAdd) -> bool:
    """Whether both sides have weights, and nothing but the model's output is made of the sum: VOLO's two heads, no residual block."""
    return add.kind == "projection" and not add.node.users


def _adds_positions(add: ResidualAdd, graph: ModelGraph) -> bool:
    """Whether its branch is one convolution without a norm: in a transformer, positions (Twins, wav2vec 2.0) and no layer."""
    weights = [node for branch in add.branches for node in branch.of_kind(Kind.WEIGHT)]
    has_norm = any(norm.node in branch for branch in add.branches for norm in graph.norms)
    return len(weights) == 1 and "conv" in weights[0].op and not has_norm


def _attends(add: ResidualAdd) -> bool:
    return any(branch.of_kind(Kind.ATTENTION, Kind.SOFTMAX) for branch in add.branches)


def _site(graph: ModelGraph, add: ResidualAdd, branch: Branch, layer: int) -> Site:
    weights = branch.of_kind(Kind.WEIGHT)
    norms = [norm for norm in graph.norms if norm.node in branch]
    before = [norm for norm in norms if norm.node.index < weights[-1].index]
    behind = [norm for norm in norms if norm.node.index > weights[-1].index]
    norm = before[0] if before else None
    is_entry = norm is not None and norm.node.index < weights[0].index and _is_first(branch, norm.node)
    readers = [norm for norm in graph.norms if _reads(norm.node, add.node)]
    post = readers[0] if len(readers) == 1 and not is_entry and set(add.node.users) <= _within(readers[0].node) else None
    gammas = {norm.gamma for norm in behind}
    scale = next((name for node in branch.downstream(weights[-1]) if (name := _factor(node)) and name not in gammas), "")
    return Site(add.node, branch, _block_of(add), layer, norm, is_entry, behind[-1] if behind else None, post, scale, _heads(branch))


def _is_first(branch: Branch, norm: Node) -> bool:
    """Whether what comes before the norm in the branch is arithmetic of the norm itself, or views."""
    return all(node.kind in PASSING or node.module == norm.module for node in branch.nodes if node.index < norm.index)


def _reads(norm: Node, value: Node) -> bool:
    """Whether a norm, written out or not, is taken of a value."""
    return any(source is value or (source.module == norm.module and value in source.inputs) for source in norm.inputs)


def _within(norm: Node) -> set[Node]:
    """The norm and operations of the same module."""
    return {norm, *(user for source in norm.inputs for user in (source, *source.users) if user.module == norm.module)}


def _factor(node: Node) -> str:
    """The parameter of one value a channel that an operation multiplies by."""
    if node.kind is not Kind.MUL or len(node.inputs) != 1 or len(node.reads) != 1:
        return ""
    return node.reads[0].parameter if max(node.reads[0].path[-1].shape, default=1) > 1 else ""


def _heads(branch: Branch) -> int:
    attention = next((node for node in branch.nodes if node.kind in (Kind.ATTENTION, Kind.SOFTMAX) and len(node.shape) > 3), None)
    return attention.shape[-3] if attention is not None else 0


def _layer_numbers(adds: list[ResidualAdd]) -> dict[Node, int]:
    """Additions of one numbered block are one layer; so are an attention and what follows it (T5 numbers the parts of a layer).

    A second attention follows it where one numbered block holds both.
    """
    numbers: dict[Node, int] = {}
    number, last_block, after_attention = 0, "", False
    for add in adds:
        block, attends = _block_of(add), _attends(add)
        is_second = after_attention and (not attends or _enclosing(block) == _enclosing(last_block) != "")
        if block != last_block and not is_second:
            number += 1
        numbers[add.node] = number
        last_block, after_attention = block, attends
    return numbers


def _block_of(add: ResidualAdd) -> str:
    """Of the module that adds or, where this has no number, of what holds the branches' weight layers (a layer may be called fc1)."""
    weights = [node.module for branch in add.branches for node in branch.of_kind(Kind.WEIGHT)]
    parents = zip(*(path.split(".")[:-1] for path in weights), strict=False)
    common = ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, parents))
    found = (block_of(path) for path in (add.node.module, common))
    return next((block for block in found if block[-1:].isdigit()), block_of(weights[0]))


def _enclosing(block: str) -> str:
    """The numbered block that a numbered block is part of, "" without one."""
    outer = block_of(block.rpartition(".")[0].rpartition(".")[0])
    return outer if outer[-1:].isdigit() else ""
