"""Runs a model in eval mode on its own inputs to see what becomes of them; everything is as it was afterwards."""

from __future__ import annotations

__all__ = ["EvalRun", "measure_eval_run"]

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.findings import Place
from pl_normkit.first_step import Dropout
from pl_normkit.methods.wiring.eval_calls import Runner, differ
from pl_normkit.methods.wiring.left_to_chance import left_to_chance, own_generators
from pl_normkit.methods.wiring.mixing import Mixing, explained, is_by_sample
from pl_normkit.preserve import preserved

_ROWS = (5, 7, 3)
_TRIES = 8


@dataclass(frozen=True)
class EvalRun:
    """What forward passes in eval mode showed.

    Attributes:
        dropouts: dropouts that were active.
        left_out: parts that a random number left out.
        mixing: where the output of one sample came to depend on another's input, None where it does not or where it is meant.
        ignored: leaves of the input (by position) that no output depends on.
    """

    dropouts: tuple[Dropout, ...] = ()
    left_out: tuple[Place, ...] = ()
    mixing: Mixing | None = None
    ignored: tuple[int, ...] = ()


def measure_eval_run(model: nn.Module, inputs: Any, used_in_training: frozenset[int] | None) -> EvalRun:
    """Run `model` in eval mode on `inputs` and on changed copies of them.

    Args:
        model: any module; parameters, buffers, modes and RNG stay.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments, as the training step had them.
        used_in_training: leaves that the training forward used, None where that is not known: then no input is called ignored.

    Returns:
        an empty `EvalRun` where the model cannot be run so.
    """
    runner = Runner(model, inputs)
    with preserved(model, buffers=True), torch.no_grad():
        model.eval()
        try:
            watch, watched = runner.watched(runner.leaves)
            facts = watch.facts()
            if facts.dropouts:
                return EvalRun(facts.dropouts)
            whole = runner.run(runner.leaves)
            is_repeatable = _is_close(watched, whole)
            tries = 0 if is_repeatable and not own_generators(model) else _TRIES
            left_out = left_to_chance(runner, tries=tries) if facts.draws_numbers or tries else ()
            if left_out or not is_repeatable:  # random from a source of its own, so that changes tell nothing
                return EvalRun(left_out=left_out)
        except Exception:  # inputs that eval mode cannot take (targets of a detector, say) are no mistake
            return EvalRun()
        ignored: tuple[int, ...] = ()
        if used_in_training is not None:
            unused = set(range(len(runner.tensor_positions))) - facts.inputs_used - used_in_training
            ignored = tuple(leaf for leaf in sorted(unused) if not _has_influence(runner, runner.tensor_positions[leaf], whole))
        return EvalRun(mixing=_mixing(runner, whole), ignored=ignored)


def _is_close(left: list[Tensor], right: list[Tensor]) -> bool:
    """Up to rounding: unwatched, torch's transformer layers take another path through the same computation."""
    return len(left) == len(right) and not any(differ(a, b, slice(None)) for a, b in zip(left, right, strict=True) if a.dim())


def _is_same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(_equal(a, b) for a, b in zip(left, right, strict=True))


def _equal(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape:
        return False
    return bool(torch.equal(left.nan_to_num(), right.nan_to_num()) if left.is_floating_point() else torch.equal(left, right))


# Inputs without influence.


def _has_influence(runner: Runner, position: int, before: list[Tensor]) -> bool:
    """Whether any output changes with the values of one input; one that cannot be changed counts as read."""
    leaf = runner.leaves[position]
    changed = [value for value in _other_values(leaf) if not torch.equal(value, leaf)]
    for value in changed:
        leaves = [*runner.leaves]
        leaves[position] = value
        try:
            if not _is_same(before, runner.run(leaves)):
                return True
        except Exception:
            return True
    return not changed


def _other_values(value: Tensor) -> Iterator[Tensor]:
    """Other values that are as valid: the same ones elsewhere, masks inverted, numbers moved a little."""
    if value.numel() == 0:
        return
    yield value.flip(0) if value.dim() else value
    if value.dim() > 1:
        yield value.roll(1, -1)
    if value.dtype is torch.bool:
        yield ~value
    elif value.is_floating_point():
        yield value + torch.randn_like(value)
    elif not value.is_complex():
        is_flag = bool(((value == 0) | (value == 1)).all())
        yield 1 - value if is_flag else (value - 1).clamp_min(int(value.amin()))


# Samples that mix.


def _mixing(runner: Runner, whole: list[Tensor]) -> Mixing | None:
    """Where one sample's rows begin to depend on another's, and only where no reading of the shapes makes that right."""
    batch = _batch_size(runner, whole)
    if batch is None:
        return None
    rows = _row_count(runner, whole)
    leaves = [_some_rows(leaf, batch, rows) for leaf in runner.leaves]
    try:
        before = runner.run(leaves)
        for changed_row in (0, rows - 1):
            others = [row for row in range(rows) if row != changed_row]
            changed = [_with_row(leaf, rows, changed_row) for leaf in leaves]
            after = runner.run(changed)
            if any(differ(a, b, others) for a, b in zip(before, after, strict=True) if is_by_sample(a, rows)):
                return explained(runner, leaves, changed, rows, others)
    except Exception:  # a model that takes batches of one size alone
        return None
    return None


def _batch_size(runner: Runner, whole: list[Tensor]) -> int | None:
    """The size that the first dimension of every input and of an output share, if it can be nothing but the batch."""
    tensors = [runner.leaves[position] for position in runner.tensor_positions if runner.leaves[position].dim() > 0]
    floats = [tensor for tensor in whole if tensor.is_floating_point() and tensor.dim() > 0]
    sizes = {tensor.shape[0] for tensor in tensors}
    if len(sizes) != 1 or not floats:
        return None
    batch = sizes.pop()
    if batch < 2 or any(batch in tensor.shape[1:] for tensor in (*tensors, *floats)):
        return None  # a square is ambiguous: similarities, adjacency, as many steps as samples
    if any(list(buffer.shape).count(batch) > 1 for buffer in (*runner.model.buffers(), *runner.model.parameters())):
        return None  # a graph over these rows
    return batch if any(tensor.shape[0] == batch for tensor in floats) else None


def _row_count(runner: Runner, whole: list[Tensor]) -> int:
    """How many samples to run: few, and a number that no other dimension has, of parameters neither if that can be."""
    sizes = {size for value in (*runner.leaves, *whole) if isinstance(value, Tensor) for size in value.shape[1:]}
    inner = sizes | {size for parameter in runner.model.parameters() for size in parameter.shape}
    free = [rows for taken in (inner, sizes) for rows in _ROWS if rows not in taken]
    return next(iter(free), _ROWS[0])


def _some_rows(leaf: Any, batch: int, rows: int) -> Any:
    if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != batch:
        return leaf
    return leaf[torch.arange(rows, device=leaf.device) % batch]


def _with_row(leaf: Any, rows: int, row: int) -> Any:
    """`leaf` with the row of one sample replaced by another's, turned round; integers and masks stay valid so."""
    if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != rows:
        return leaf
    changed = leaf.clone()
    other = leaf[(row + 1) % rows]
    changed[row] = other.flip(-1) if other.dim() and leaf.is_floating_point() else other
    if leaf.is_floating_point():
        changed[row] = changed[row] * 1.5
    return changed
