"""The fix: move each dropout to the slot where it shifts no variance inside the branch."""

from __future__ import annotations

__all__ = ["place_dropout"]

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from pl_normkit.errors import ConfigError, NothingMatchedError
from pl_normkit.graph import Dropout, Kind, ModelGraph, Node, call_arguments
from pl_normkit.methods.dropout_placement.find import (
    BranchDropout,
    HeadDropout,
    Verdict,
    find_always_on,
    read_branch_dropouts,
    read_head_dropouts,
)
from pl_normkit.methods.dropout_placement.measure import equal_strength
from pl_normkit.preserve import preserved
from pl_normkit.surgery import Change, Changes, Edit, Filter, Insert, Replace, SetAttributes, apply_edits
from pl_normkit.wrappers import unwrapped

SLOT = "placed_dropout"
"""Name of the child that a moved dropout becomes."""


HeadP = Literal["same", "equal_strength"]
"""The drop probability in front of a pool."""


def place_dropout(model: nn.Module, example_inputs: Any, *, filter_fn: Filter | None = None, head_p: HeadP = "same") -> Changes:
    """Move dropouts to where they shift no variance: before the last weight layer of the branch, before pooling in the head.

    Keeps every state_dict key, and each drop probability unless `head_p` says otherwise. Of several dropouts in one branch one stays:
    "one dropout" (arXiv 2302.06112, abstract). The output in eval mode is unchanged. Post-activation branches have no admissible slot
    and are left alone, as is a dropout that is shared with code outside the plan or that acts in eval mode too (Monte Carlo dropout);
    all are listed in `Changes.skipped`.

    Args:
        model: any module that `ModelGraph.from_model` can read.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        filter_fn: called with (module that drops, path), says whether this dropout may be moved; by default all.
        head_p: the same p before a pool is a much weaker dropout than behind it. "equal_strength" sets the p whose noise at the classifier
            has the variance of the dropout behind the pool, measured on `example_inputs` in eval mode with the weights there are
            (derived here; see `equal_strength`).

    Returns:
        the edits; empty when every dropout already stands right.

    Raises:
        ConfigError: for another `head_p`.
        NothingMatchedError: when the model has no active dropout.
        TraceError: when the model cannot be read.

    >>> import timm, torch
    >>> from torch import nn
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.conv1, self.drop, self.norm, self.conv2 = nn.Conv2d(4, 4, 1), nn.Dropout(0.2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
    ...     def forward(self, x):
    ...         return x + self.conv2(self.norm(self.drop(self.conv1(x))).relu())
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), Block())
    >>> changes = place_dropout(model, torch.rand(2, 3, 8, 8))
    >>> len(changes.made) > 0
    True
    """
    if head_p not in get_args(HeadP):
        raise ConfigError("head_p is unknown", evidence=repr(head_p), fix=f"give one of {', '.join(get_args(HeadP))}")
    model = unwrapped(model)
    graph = ModelGraph.from_model(model, example_inputs)
    if not any(dropout.p > 0 for dropout in graph.dropouts):
        raise NothingMatchedError("the model has no active dropout to place", fix="give its dropouts p > 0, or leave the fix out")
    plan = _Plan(model, graph, example_inputs, filter_fn, head_p)
    plan.add_branches(read_branch_dropouts(graph))
    plan.add_heads(read_head_dropouts(graph))
    return apply_edits(model, plan.edits(), plan.skipped)


@dataclass(frozen=True)
class _Move:
    """Switch `dropout` off, and put one of its probability where `insert` says (nowhere for a surplus one)."""

    dropout: Dropout
    insert: Insert | None


@dataclass
class _Plan:
    model: nn.Module
    graph: ModelGraph
    example_inputs: Any
    filter_fn: Filter | None = None
    head_p: HeadP = "same"
    moves: list[_Move] = field(default_factory=list)
    skipped: list[Change] = field(default_factory=list)

    def add_branches(self, placed: Iterable[BranchDropout]) -> None:
        by_branch: dict[Node, list[BranchDropout]] = defaultdict(list)
        for found in placed:
            by_branch[found.branch.end].append(found)
        for found_in_branch in by_branch.values():
            self._add_branch(found_in_branch)

    def _add_branch(self, placed: list[BranchDropout]) -> None:
        kept = next((found for found in placed if found.verdict is Verdict.ADMISSIBLE), None)
        wrong = [found for found in placed if found is not kept and self._is_chosen(found.dropout)]
        slot = placed[0].slot
        insert = self._before_weight(slot, wrong[0].dropout) if slot is not None and kept is None and wrong else None
        for found in wrong:
            if kept is None and insert is None:
                self._skip(found.dropout, _why_no_slot(slot))
            else:
                self.moves.append(_Move(found.dropout, insert if found is wrong[0] else None))

    def add_heads(self, placed: Iterable[HeadDropout]) -> None:
        for found in placed:
            if not self._is_chosen(found.dropout):
                continue
            insert = self._before_pool(found.head.pool, found.dropout)
            if insert is None:
                self._skip(found.dropout, "the pooling is a function call with no module to attach to; move the dropout in the code")
            else:
                self.moves.append(_Move(found.dropout, insert))

    def edits(self) -> list[Edit]:
        """The edits of every move that can be made; the others join `skipped`."""
        by_path: dict[str, list[_Move]] = defaultdict(list)
        for move in self.moves:
            by_path[move.dropout.module].append(move)
        edits: list[Edit] = []
        for path, moves in by_path.items():
            first = moves[0].dropout
            switch_off = self._switch_off(first)
            if self.graph.calls[path, first.node.op] != len(moves):
                self._skip(first, "the same dropout is called in other places too")
            elif first.node in self._always_on:
                self._skip(first, "it drops in eval mode too (Monte Carlo dropout); if that is not meant, pass training=self.training")
            elif switch_off is None:
                self._skip(first, "it is a function call and no attribute switches it off alone; move it in the code")
            else:
                edits += [switch_off, *(move.insert for move in moves if move.insert is not None)]
        return edits

    def _is_chosen(self, dropout: Dropout) -> bool:
        """Whether it may be moved; one that may not is listed as skipped."""
        if self.filter_fn is None or self.filter_fn(self.model.get_submodule(dropout.module), dropout.module):
            return True
        self._skip(dropout, "not chosen by the filter")
        return False

    def _skip(self, dropout: Dropout, why: str) -> None:
        self.skipped.append(Change(dropout.module, f"dropout at {dropout.node.source or 'an unknown line'} stays: {why}"))

    def _before_weight(self, slot: Node, dropout: Dropout) -> Insert | None:
        layer = self.model.get_submodule(slot.module)
        if not isinstance(layer, (_ConvNd, nn.Linear)) or self.graph.calls[slot.module, slot.op] != 1:
            return None
        kind = type(self._module_of(dropout) or nn.Dropout())
        return Insert(slot.module, SLOT, kind(dropout.p), f"{kind.__name__}(p={dropout.p:g}) now acts before this layer")

    def _before_pool(self, pool: Node, dropout: Dropout) -> Insert | None:
        source, where = self._beside_pool(pool)
        if source is None:
            return None
        p = dropout.p
        if self.head_p == "equal_strength":
            p = equal_strength(p, self._maps(source.module, is_output=where == "after"))
        what = f"Dropout(p={p:.4g}) now acts before the pooling" + (f", as strong as p={dropout.p:g} behind it" if p != dropout.p else "")
        return Insert(source.module, SLOT, nn.Dropout(p), what, where=where)

    def _beside_pool(self, pool: Node) -> tuple[Node | None, Literal["before", "after"]]:
        """The module that a dropout in front of the pool can be attached to, and on which side of it."""
        if self._runs_alone(pool):
            return pool, "before"
        source = pool.inputs[0]
        return (source if source.users == [pool] and self._runs_alone(source) else None), "after"

    def _maps(self, path: str, is_output: bool) -> Tensor:
        """What a pool averages, on the example inputs."""
        seen: list[Tensor] = []
        module = self.model.get_submodule(path)
        handle = module.register_forward_hook(lambda _, arguments, output: seen.append(output if is_output else arguments[0]))
        args, kwargs = call_arguments(self.example_inputs)
        try:
            with preserved(self.model, buffers=True), torch.no_grad():
                self.model.eval()(*args, **kwargs)
        finally:
            handle.remove()
        return seen[0]

    def _runs_alone(self, node: Node) -> bool:
        """Whether the operation is all that its module does, once in a forward pass."""
        inside = [other for other in self.graph.nodes if other.module == node.module or other.module.startswith(f"{node.module}.")]
        return bool(node.module) and inside == [node]

    def _module_of(self, dropout: Dropout) -> nn.Module | None:
        module = self.model.get_submodule(dropout.module)
        return module if isinstance(module, _DropoutNd) else None

    def _switch_off(self, dropout: Dropout) -> Edit | None:
        if self._module_of(dropout) is not None:
            return Replace(dropout.module, nn.Identity(), f"Dropout(p={dropout.p:g}) switched off here")
        owner = self.model.get_submodule(dropout.module)
        for name in [name for name, value in vars(owner).items() if type(value) is float and value == dropout.p]:
            edit = SetAttributes(dropout.module, {name: 0.0}, f"{name} set to 0, which switches the dropout at {dropout.node.source} off")
            if self._silences(edit, dropout):
                return edit
        return None

    @cached_property
    def _always_on(self) -> frozenset[Node]:
        return find_always_on(self.model, self.example_inputs, [move.dropout for move in self.moves])

    def _silences(self, edit: Edit, dropout: Dropout) -> bool:
        """Whether the edit switches the dropouts of this module off and does nothing else: made, seen in a second trace, and taken back."""
        changes = apply_edits(self.model, [edit])
        try:
            traced = ModelGraph.from_model(self.model, self.example_inputs)
        finally:
            changes.undo()
        is_off = not any(other.p > 0 and other.module == dropout.module for other in traced.dropouts)
        return is_off and _beside_dropout(traced) == _beside_dropout(self.graph)


def _beside_dropout(graph: ModelGraph) -> list[tuple[str, str, list[Any]]]:
    """The operations that are no dropouts, with the constants they are called with: an attribute may be a scale or a drop path too."""
    calls = ((node, tree_leaves((node.target.args, node.target.kwargs))) for node in graph.nodes if node.kind is not Kind.DROPOUT)
    return [(node.module, node.op, [repr(leaf) for leaf in leaves if not isinstance(leaf, fx.Node)]) for node, leaves in calls]


def _why_no_slot(slot: Node | None) -> str:
    if slot is not None:
        return f"the layer it belongs before, {slot.module}, is shared or no plain layer; move it in the code"
    return "the branch has no admissible slot, since no last weight layer follows its last batch norm; remove the dropout"
