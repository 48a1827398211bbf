"""Runs a model in eval mode on its own inputs to see what becomes of them; everything is as it was afterwards."""

from __future__ import annotations

__all__ = ["EvalRun", "Mixing", "measure_eval_run"]

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pl_normkit.findings import Place
from pl_normkit.first_step import Dropout, ForwardWatch, Seen
from pl_normkit.graph import call_arguments
from pl_normkit.graph.autograd import tensors_in
from pl_normkit.preserve import preserved

_ROWS = (5, 7, 3)
_TOLERANCE = 1e-4
_RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))
_ATTENTION = frozenset(("multi_head_attention_forward",))
_VIEWS = frozenset(("view", "reshape", "flatten", "unflatten", "view_as"))
_OVER_BATCH = frozenset(("softmax", "log_softmax", "normalize"))
_ALONG_TIME = frozenset(("cumsum", "cumprod", "cummax", "logcumsumexp"))
_CELLS = frozenset(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"))


@dataclass(frozen=True)
class Mixing:
    """Where samples mix first: the operation, and in words why."""

    place: Place
    op: str
    why: str
    advice: str


@dataclass(frozen=True)
class EvalRun:
    """What forward passes in eval mode showed.

    Attributes:
        dropouts: dropouts that were active.
        mixing: where the output of one sample came to depend on another's input, None where it does not or where it is meant.
        ignored: leaves of the input (by position) that no output depends on.
    """

    dropouts: tuple[Dropout, ...] = ()
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
    runner = _Runner(model, inputs)
    with preserved(model, buffers=True), torch.no_grad():
        model.eval()
        try:
            watch, watched = runner.watched(runner.leaves)
            facts = watch.facts()
            if facts.dropouts:
                return EvalRun(facts.dropouts)
            whole = runner.run(runner.leaves)
            if not _is_close(watched, whole):
                return EvalRun()  # random from a source of its own, so that changes tell nothing
        except Exception:  # inputs that eval mode cannot take (targets of a detector, say) are no mistake
            return EvalRun()
        ignored: tuple[int, ...] = ()
        if used_in_training is not None:
            unused = set(range(len(runner.tensor_positions))) - facts.inputs_used - used_in_training
            ignored = tuple(leaf for leaf in sorted(unused) if not _has_influence(runner, runner.tensor_positions[leaf], whole))
        return EvalRun(mixing=_mixing(runner, whole), ignored=ignored)


class _Runner:
    """Calls the model with the leaves of its inputs, always from the same random state."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model = model
        self.leaves, self._spec = tree_flatten(call_arguments(inputs))
        self.leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        self.tensor_positions = [position for position, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]

    def _arguments(self, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = tree_unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], self._spec)
        return args, kwargs

    def run(self, leaves: list[Any]) -> list[Tensor]:
        args, kwargs = self._arguments(leaves)
        with _same_randomness(), preserved(self.model, buffers=True):
            return list(tensors_in(self.model(*args, **kwargs)))

    def watched(self, leaves: list[Any], each: Callable[[Seen], None] | None = None) -> tuple[ForwardWatch, list[Tensor]]:
        args, kwargs = self._arguments(leaves)
        watch = ForwardWatch(self.model, (args, kwargs), each=each)
        with _same_randomness(), preserved(self.model, buffers=True), watch.watching():
            return watch, list(tensors_in(self.model(*args, **kwargs)))


@contextmanager
def _same_randomness() -> Iterator[None]:
    torch.manual_seed(0)  # the caller restores every RNG
    yield


def _is_close(left: list[Tensor], right: list[Tensor]) -> bool:
    """Up to rounding: unwatched, torch's transformer layers take another path through the same computation."""
    return len(left) == len(right) and not any(_differ(a, b, slice(None)) for a, b in zip(left, right, strict=True) if a.dim())


def _is_same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(_equal(a, b) for a, b in zip(left, right, strict=True))


def _equal(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape:
        return False
    return bool(torch.equal(left.nan_to_num(), right.nan_to_num()) if left.is_floating_point() else torch.equal(left, right))


# Inputs without influence.


def _has_influence(runner: _Runner, position: int, before: list[Tensor]) -> bool:
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


def _mixing(runner: _Runner, whole: list[Tensor]) -> Mixing | None:
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
            if any(_differ(a, b, others) for a, b in zip(before, after, strict=True) if _is_by_sample(a, rows)):
                return _explained(runner, leaves, changed, rows, others)
    except Exception:  # a model that takes batches of one size alone
        return None
    return None


def _batch_size(runner: _Runner, whole: list[Tensor]) -> int | None:
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


def _row_count(runner: _Runner, whole: list[Tensor]) -> int:
    """How many samples to run: few, and a number that no other dimension has."""
    sizes = {size for value in (*runner.leaves, *whole) if isinstance(value, Tensor) for size in value.shape[1:]}
    return next((rows for rows in _ROWS if rows not in sizes), _ROWS[0])


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


def _is_by_sample(value: Tensor, rows: int) -> bool:
    return value.dim() > 0 and value.shape[0] == rows and value.is_floating_point()


def _differ(before: Tensor, after: Tensor, rows: list[int] | slice) -> bool:
    if before.shape != after.shape:
        return False
    a, b = before[rows].double(), after[rows].double()
    scale = float(a.abs().amax()) if a.numel() else 0.0
    gap = float((a - b).abs().amax()) if a.numel() else 0.0
    return math.isfinite(gap) and math.isfinite(scale) and gap > _TOLERANCE * scale


def _explained(runner: _Runner, leaves: list[Any], changed: list[Any], rows: int, others: list[int]) -> Mixing | None:
    """Run both once more, operation by operation: the first whose rows differ is where samples mix."""
    results: list[list[Tensor]] = []
    cells: list[Seen] = []

    def keep(seen: Seen) -> None:
        results.append(list(tensors_in(seen.result)))
        if seen.op in _CELLS:
            cells.append(seen)

    runner.watched(leaves, keep)
    position = 0
    first: list[tuple[Seen, float]] = []

    def compare(seen: Seen) -> None:
        nonlocal position
        before = results[position] if position < len(results) else []
        position += 1
        for a, b in zip(before, tensors_in(seen.result), strict=False) if not first else ():
            if _is_by_sample(a, rows) and _differ(a, b, others):
                first.append((seen, float((a != b).double().mean())))
                break

    runner.watched(changed, compare)
    if first and cells and first[0][0].op in ("stack", "cat") and _has_time(runner) and not _is_time_first(runner):
        advice = "step through dimension 1: x[:, t]"
        return Mixing(cells[0].place, cells[0].op, f"the loop over {cells[0].op} runs over dimension 0, the batch", advice)
    return _judged(runner, *first[0], rows) if first else None


def _judged(runner: _Runner, seen: Seen, changed_share: float, rows: int) -> Mixing | None:
    """The operations that nobody lets mix samples on purpose; statistics and products over the batch may be meant."""
    if seen.op in _RECURRENT | _ATTENTION:
        module = runner.model.get_submodule(seen.place.module)
        is_unbatched = isinstance(seen.args[0], Tensor) and seen.args[0].dim() > 1 and seen.args[0].shape[1] == 1
        if getattr(module, "batch_first", None) is not False or is_unbatched or _is_time_first(runner):
            return None
        kind = type(module).__name__
        return Mixing(seen.place, seen.op, f"{kind} reads dimension 0, the batch, as the sequence", f"build {kind} with batch_first=True")
    if seen.op in _VIEWS and changed_share < 1.5 / rows:  # one sample's values, spread over the rows; nothing computed with others'
        advice = "permute the batch back to dimension 0 before the view, or reshape per sample"
        return Mixing(seen.place, seen.op, f"{seen.op} after a permutation puts parts of different samples into one row", advice)
    if seen.op == "layer_norm" and len(seen.args[1]) == seen.args[0].dim():
        return Mixing(
            seen.place, seen.op, "layer_norm runs over all dimensions, the batch among them", "give it the shape of the features alone"
        )
    is_along_time = seen.op in _ALONG_TIME and _has_time(runner) and not _is_time_first(runner)
    if (seen.op in _OVER_BATCH or is_along_time) and _dim_of(seen) == 0:
        return Mixing(seen.place, seen.op, f"{seen.op} runs over dimension 0, the batch", "let it run over another dimension: dim=1, say")
    return None


def _dim_of(seen: Seen) -> Any:
    position = 2 if seen.op == "normalize" else 1
    return seen.kwargs.get("dim", seen.args[position] if position < len(seen.args) else None)


def _has_time(runner: _Runner) -> bool:
    """Whether a sample has more than one dimension: then dimension 0 of a plain sequence is not time."""
    return any(leaf.dim() > 2 for leaf in runner.leaves if isinstance(leaf, Tensor))


def _is_time_first(runner: _Runner) -> bool:
    """Whether dimension 1 may be the batch: an output of the input's rank then keeps it."""
    leaves = [leaf for leaf in runner.leaves if isinstance(leaf, Tensor) and leaf.dim() > 1]
    outputs = [value for value in runner.run(runner.leaves) if value.is_floating_point() and value.dim() > 1]
    return any(value.shape[1] == leaf.shape[1] and value.dim() >= leaf.dim() for value in outputs for leaf in leaves)
