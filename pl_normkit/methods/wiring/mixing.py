"""Where the samples of a batch mix first, and whether anybody lets them do so there on purpose."""

from __future__ import annotations

__all__ = ["Mixing", "explained", "is_by_sample"]

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pl_normkit.findings import Place
from pl_normkit.first_step import Seen
from pl_normkit.graph.autograd import tensors_in
from pl_normkit.methods.wiring.eval_calls import Runner, differ

_RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))
_ATTENTION = frozenset(("multi_head_attention_forward",))
_VIEWS = frozenset(("view", "reshape", "flatten", "unflatten", "view_as"))
_OVER_BATCH = frozenset(("softmax", "log_softmax", "normalize"))
_ALONG_TIME = frozenset(("cumsum", "cumprod", "cummax", "logcumsumexp"))
_CELLS = frozenset(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"))
_PRODUCTS = frozenset(("matmul", "__matmul__", "bmm", "einsum", "scaled_dot_product_attention"))


@dataclass(frozen=True)
class Mixing:
    """Where samples mix first: the operation, and in words why."""

    place: Place
    op: str
    why: str
    advice: str


@dataclass(frozen=True)
class _First:
    """The first operation whose result for one sample changes with another's input: along which dimension, and how much of it."""

    seen: Seen
    dim: int
    changed_share: float


def is_by_sample(value: Tensor, rows: int) -> bool:
    return value.dim() > 0 and value.shape[0] == rows and value.is_floating_point()


def explained(runner: Runner, leaves: list[Any], changed: list[Any], rows: int, others: list[int]) -> Mixing | None:
    """Run both once more, operation by operation: the first whose rows differ is where samples mix."""
    results: list[list[Tensor]] = []
    cells: list[Seen] = []
    attends_over_time = False

    def keep(seen: Seen) -> None:
        nonlocal attends_over_time
        results.append(list(tensors_in(seen.result)))
        attends_over_time |= _is_over_time(seen, runner)
        if seen.op in _CELLS:
            cells.append(seen)

    runner.watched(leaves, keep)
    position = 0
    first: list[_First] = []

    def compare(seen: Seen) -> None:
        nonlocal position
        before = results[position] if position < len(results) else []
        position += 1
        for a, b in zip(before, tensors_in(seen.result), strict=False) if not first else ():
            dim = _batch_dim(a, rows)
            if dim is not None and a.shape == b.shape and differ(a.transpose(0, dim), b.transpose(0, dim), others):
                first.append(_First(seen, dim, float((a != b).double().mean())))
                break

    runner.watched(changed, compare)
    if first and cells and first[0].seen.op in ("stack", "cat") and _has_time(runner) and not _is_time_first(runner):
        advice = "step through dimension 1: x[:, t]"
        return Mixing(cells[0].place, cells[0].op, f"the loop over {cells[0].op} runs over dimension 0, the batch", advice)
    if not first:
        return None
    return _judged_first(runner, first[0], rows) if first[0].dim == 0 else _judged_swapped(runner, first[0], rows, attends_over_time)


def _batch_dim(value: Tensor, rows: int) -> int | None:
    """The dimension of the samples: 0 where it can be, else the only one of their number."""
    if is_by_sample(value, rows):
        return 0
    dims = [dim for dim, size in enumerate(value.shape) if size == rows]
    return dims[0] if len(dims) == 1 and value.is_floating_point() else None


def _judged_first(runner: Runner, first: _First, rows: int) -> Mixing | None:
    """The operations that nobody lets mix samples on purpose; statistics and products over the batch may be meant."""
    seen = first.seen
    if seen.op in _RECURRENT | _ATTENTION:
        module = runner.model.get_submodule(seen.place.module)
        is_unbatched = isinstance(seen.args[0], Tensor) and seen.args[0].dim() > 1 and seen.args[0].shape[1] == 1
        if getattr(module, "batch_first", None) is not False or is_unbatched or _is_time_first(runner):
            return None
        kind = type(module).__name__
        return Mixing(seen.place, seen.op, f"{kind} reads dimension 0, the batch, as the sequence", f"build {kind} with batch_first=True")
    if seen.op in _VIEWS and first.changed_share < 1.5 / rows:  # one sample's values, spread over the rows; nothing computed with others'
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


def _judged_swapped(runner: Runner, first: _First, rows: int, attends_over_time: bool) -> Mixing | None:
    """The same behind a swap of batch and time, which stand the other way round there."""
    seen, dim = first.seen, first.dim
    (result, *_) = tensors_in(seen.result)
    if not set(result.shape[:dim]) & _times(runner) or _is_time_first(runner):
        return None
    if seen.op in _VIEWS and first.changed_share < 1.5 / rows:
        why = f"{seen.op} puts time before the batch without moving the values, so that rows hold parts of different samples"
        return Mixing(seen.place, seen.op, why, f"swap dimensions with transpose or permute, not with {seen.op}")
    if seen.op in _RECURRENT | _ATTENTION:
        kind = type(runner.model.get_submodule(seen.place.module)).__name__
        why = f"{kind} reads dimension {dim}, the batch, as the sequence"
        return Mixing(seen.place, seen.op, why, f"give {kind} the batch first, without the transpose before it")
    if seen.op in _PRODUCTS and not attends_over_time:  # a network that attends over both means it
        why = f"the attention in {seen.op} runs over dimension {dim}, the batch, with time in front of it"
        return Mixing(seen.place, seen.op, why, "attend over time: keep the batch in dimension 0, and time next to last, in both factors")
    if seen.op in _OVER_BATCH and _dim_of(seen) in (dim, dim - result.dim()):
        return Mixing(seen.place, seen.op, f"{seen.op} runs over dimension {dim}, the batch", "let it run over another dimension")
    return None


def _times(runner: Runner) -> set[int]:
    """How long the sequences are."""
    return {leaf.shape[1] for leaf in runner.leaves if isinstance(leaf, Tensor) and leaf.dim() > 1}


def _is_over_time(seen: Seen, runner: Runner) -> bool:
    """Whether an operation computes scores between steps of time, or attends with them."""
    values = seen.args[:1] if seen.op == "scaled_dot_product_attention" else list(tensors_in(seen.result))[:1]
    sizes = [tuple(value.shape[-2:]) for value in values if isinstance(value, Tensor) and value.dim() > 2]
    if seen.op == "scaled_dot_product_attention":
        return any(size[0] in _times(runner) for size in sizes)
    return seen.op in _PRODUCTS and any(size[0] == size[1] and size[0] in _times(runner) for size in sizes)


def _dim_of(seen: Seen) -> Any:
    position = 2 if seen.op == "normalize" else 1
    return seen.kwargs.get("dim", seen.args[position] if position < len(seen.args) else None)


def _has_time(runner: Runner) -> bool:
    """Whether a sample has more than one dimension: then dimension 0 of a plain sequence is not time."""
    return any(leaf.dim() > 2 for leaf in runner.leaves if isinstance(leaf, Tensor))


def _is_time_first(runner: Runner) -> bool:
    """Whether dimension 1 may be the batch: an output of the input's rank then keeps it."""
    leaves = [leaf for leaf in runner.leaves if isinstance(leaf, Tensor) and leaf.dim() > 1]
    outputs = [value for value in runner.run(runner.leaves) if value.is_floating_point() and value.dim() > 1]
    return any(value.shape[1] == leaf.shape[1] and value.dim() >= leaf.dim() for value in outputs for leaf in leaves)
