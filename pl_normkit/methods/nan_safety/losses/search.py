"""Look for arguments at which a loss or its gradient is not finite: borders first, then along gradients, then pairs of borders."""

from __future__ import annotations

__all__ = ["Hit", "IgnoredIndices", "Search", "search"]

import importlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from pl_normkit.methods.nan_safety.diagnosis.first_bad import Diagnosis, Record, diagnose
from pl_normkit.methods.nan_safety.losses.arguments import Arguments, Role
from pl_normkit.methods.nan_safety.losses.corners import Move, pairs, single_moves
from pl_normkit.methods.nan_safety.losses.loss_call import LossCall
from pl_normkit.methods.nan_safety.losses.steering import dangers, steered

LARGE = 20_000  # elements above which a crop of the example is searched
CROP, FEW = 16, 4  # its size in space, its number of samples
DIAGNOSES = 3  # re-runs that are watched operation by operation, for one argument and outcome
TORCH_IGNORES = -100  # the default of cross_entropy and nll_loss


@dataclass(frozen=True)
class Hit:
    """Arguments at which something is not finite.

    Attributes:
        arguments: these arguments.
        changed: what differs from the example.
        outcome: "value" or "gradient": which of the two is not finite.
        diagnosis: the first tensor that was not.
        record: the operation that made it, None where no single one did.
        arguable: they leave the values that the example has in an argument which the network does not make.
    """

    arguments: Arguments
    changed: tuple[str, ...]
    outcome: str
    diagnosis: Diagnosis
    record: Record | None
    arguable: bool

    @property
    def cause(self) -> tuple[str, str, str]:
        return self.diagnosis.kind, self.diagnosis.op, self.diagnosis.source


@dataclass
class Search:
    """What a search did.

    Attributes:
        hits: one for each place where something first was not finite, those that are not arguable first.
        tries: how often the loss was called.
        is_complete: whether everything was tried before the time was up.
        seconds: processor time it took.
    """

    hits: list[Hit] = field(default_factory=list)
    tries: int = 0
    is_complete: bool = True
    seconds: float = 0.0


def search(call: LossCall, progress: Callable[[float], None] | None = None) -> Search:
    """Find arguments at which `call` is not finite, within `call.seconds` of processor time of this thread.

    Args:
        call: the loss and its example, which is tried first; where it is not finite itself, nothing else is tried.
        progress: told the share of the time that is used up.
    """
    with call.quietly():
        return _Searcher(call, progress).run()


class _Searcher:
    def __init__(self, call: LossCall, progress: Callable[[float], None] | None) -> None:
        self._whole = call
        self._call = call
        self._progress = progress
        self._found = Search()
        self._causes: dict[tuple[str, str, str], Hit] = {}
        self._diagnoses: Counter[tuple[frozenset[int], str]] = Counter()
        self._start = time.thread_time()
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in call.module.buffers()]

    def run(self) -> Search:
        if not self._try_example():
            self._call = self._cropped()
            singles = single_moves(self._call.example, _ignored(self._call))
            for hit in chain(self._moved(singles), self._steered()):
                self._keep(hit)
            if all(hit.arguable for hit in self._causes.values()):
                for hit in self._moved(pairs(singles)):
                    self._keep(hit)
        self._found.hits = sorted(map(self._simplest, self._causes.values()), key=lambda hit: hit.arguable)
        self._found.hits = [hit for hit in self._found.hits if self._holds(hit)]
        self._found.seconds = time.thread_time() - self._start
        return self._found

    def _time_is_up(self) -> bool:
        used = (time.thread_time() - self._start) / self._whole.seconds
        if self._progress is not None:
            self._progress(min(used, 1.0))
        self._found.is_complete &= used < 1
        return used >= 1

    def _try_example(self) -> bool:
        outcome = self._outcome(self._whole, self._whole.example)
        if outcome:
            self._keep(self._hit(self._whole, self._whole.example, (), outcome, arguable=False))
        return bool(outcome)

    def _outcome(self, call: LossCall, arguments: Arguments) -> str | None:
        """ "value" or "gradient" where that is not finite, "" where both are, None where the loss refuses the arguments."""
        self._found.tries += 1
        try:
            value, leaves = call.value(arguments)
            if not bool(torch.isfinite(value)):
                return "value"
            if value.grad_fn is None:
                return ""
            gradients = torch.autograd.grad(value, leaves, allow_unused=True)
            return "" if all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None) else "gradient"
        except Exception:  # a loss may refuse arguments: that is its answer, and a good one
            return None
        finally:
            for buffer, before in self._buffers:
                buffer.data.copy_(before)

    def _cropped(self) -> LossCall:
        """The call on a smaller example, where the loss takes that and is finite there."""
        arguments = self._whole.example
        if sum(leaf.numel() for leaf in arguments.leaves if isinstance(leaf, Tensor)) <= LARGE:
            return self._whole
        crop = arguments.replaced(_crops(arguments))
        return replace(self._whole, example=crop) if self._outcome(self._whole, crop) == "" else self._whole

    def _moved(self, moves: Sequence[Move]) -> Iterator[Hit]:
        for move in moves:
            if self._time_is_up():
                return
            arguments = _applied(move, self._call.example)
            outcome = None if arguments is None else self._outcome(self._call, arguments)
            if arguments is not None and outcome and self._diagnoses[move.positions, outcome] < DIAGNOSES:
                self._diagnoses[move.positions, outcome] += 1
                yield self._at_full_size(move, self._hit(self._call, arguments, move.words, outcome, arguable=move.arguable))

    def _steered(self) -> Iterator[Hit]:
        known = {source for _, _, source in self._causes}
        for danger in dangers(self._call):
            for arguments in () if danger.source in known else steered(self._call, danger):
                if self._time_is_up():
                    return
                outcome = self._outcome(self._call, arguments)
                if outcome:
                    words = (f"{_free_names(arguments)} moved until the {danger.name.strip('_')} at {danger.source} sees {danger.value:g}",)
                    hit = self._hit(self._call, arguments, words, outcome, arguable=False)
                    known.add(danger.source)
                    yield hit
                if outcome != "":
                    break

    def _hit(self, call: LossCall, arguments: Arguments, words: tuple[str, ...], outcome: str, *, arguable: bool) -> Hit:
        self._load_compiler()
        diagnosis, record = diagnose(lambda: call.value(arguments)[0], self._whole.module, None)
        return Hit(arguments, words, outcome, diagnosis, record, arguable)

    def _load_compiler(self) -> None:
        """A diagnosis asks the compiler to stand aside, which loads it, once a process: seconds that no loss should be charged for."""
        before = time.thread_time()
        importlib.import_module("torch._dynamo")
        self._start += time.thread_time() - before

    def _at_full_size(self, move: Move, hit: Hit) -> Hit:
        """The same move of the whole example where that does the same, else the crop, which is said."""
        if self._call is self._whole or hit.cause in self._causes:
            return hit
        whole = _applied(move, self._whole.example)
        if whole is not None and self._outcome(self._whole, whole) == hit.outcome:
            return replace(hit, arguments=whole)
        return replace(hit, changed=("a crop of the example", *hit.changed))

    def _keep(self, hit: Hit) -> None:
        self._causes.setdefault(hit.cause, hit)

    def _simplest(self, hit: Hit) -> Hit:
        """The change made in one sample, or one element, only, where that does the same."""
        for words, keep in (("in one element", _first_element), ("in the first sample", _first_row)):
            smaller = _restricted(self._whole.example, hit.arguments, keep)
            if smaller is not None and hit.changed and self._outcome(self._whole, smaller) == hit.outcome:
                again = self._hit(self._whole, smaller, hit.changed, hit.outcome, arguable=hit.arguable)
                if again.cause == hit.cause:
                    return replace(again, changed=(*hit.changed[:-1], f"{hit.changed[-1]} {words}"))
        return hit

    def _holds(self, hit: Hit) -> bool:
        """Once more, from the state that the loss was found in: one that remembers its calls is no witness."""
        return self._outcome(self._whole, hit.arguments) == hit.outcome


def _applied(move: Move, arguments: Arguments) -> Arguments | None:
    try:
        return move.apply(arguments)
    except (RuntimeError, IndexError, ValueError):  # a move that does not fit these shapes
        return None


def _free_names(arguments: Arguments) -> str:
    return " and ".join(name for name, role in zip(arguments.names, arguments.roles, strict=True) if role is Role.FREE)


Restrict = Callable[[Tensor], Tensor]


def _restricted(before: Arguments, after: Arguments, where: Restrict) -> Arguments | None:
    """`after` where `where` says, `before` elsewhere; None where shapes differ or nothing would be left out."""
    changes: dict[int, Tensor] = {}
    for position, (old, new) in enumerate(zip(before.leaves, after.leaves, strict=True)):
        if not isinstance(old, Tensor) or old is new:
            continue
        if old.shape != new.shape or old.dim() == 0 or old.numel() < 2:
            return None
        mixed = torch.where(where(old), new.detach(), old.detach())
        changes[position] = mixed.requires_grad_(old.requires_grad)
    return before.replaced(changes) if changes else None


def _first_element(tensor: Tensor) -> Tensor:
    chosen = torch.zeros_like(tensor, dtype=torch.bool)
    chosen[(0,) * tensor.dim()] = True
    return chosen


def _first_row(tensor: Tensor) -> Tensor:
    chosen = torch.zeros_like(tensor, dtype=torch.bool)
    chosen[0] = True
    return chosen


def _crops(arguments: Arguments) -> dict[int, Tensor]:
    """Fewer samples, and less of each size that a tensor has among its last two dimensions behind batch and channels."""
    tensors = {i: leaf for i, leaf in enumerate(arguments.leaves) if isinstance(leaf, Tensor)}
    free = [leaf for i, leaf in tensors.items() if arguments.roles[i] is Role.FREE and leaf.dim()]
    batch = len(free[0]) if free else 0
    spatial = {size for leaf in free for size in leaf.shape[2:] if size > CROP} - {leaf.shape[1] for leaf in free if leaf.dim() > 1}
    crops = {}
    for position, tensor in tensors.items():
        crop = tensor.detach()
        for dimension, size in enumerate(tensor.shape):
            if dimension == 0 and size == batch:
                crop = crop.narrow(0, 0, min(size, FEW))
            elif size in spatial and dimension:
                crop = crop.narrow(dimension, 0, CROP)
        crops[position] = crop.clone().requires_grad_(tensor.requires_grad)
    return crops


class IgnoredIndices(TorchFunctionMode):
    """Label values that the loss ignores, with whether that may be only torch's default."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, bool] = {}

    def __torch_function__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        if (resolve_name(func) or "").endswith((".cross_entropy", ".nll_loss")):
            index = (kwargs or {}).get("ignore_index")
            if isinstance(index, int):
                self.found[index] = index == TORCH_IGNORES
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def _ignored(call: LossCall) -> list[tuple[int, bool]]:
    watch = IgnoredIndices()
    with watch:
        call.value(call.example)
    return list(watch.found.items())
