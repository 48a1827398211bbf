"""Parts that a forward pass leaves out when a random number says so: stochastic depth decided by `random.random() < p`.

Two runs are compared that differ in nothing but the single numbers they draw, of Python, numpy or torch: low ones in one run, high ones
in the other. Random tensors (noise, masks, sampled latents) are the same in both.
"""

from __future__ import annotations

__all__ = ["left_to_chance", "own_generators"]

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pl_normkit.findings import Place
from pl_normkit.first_step import operations
from pl_normkit.methods.wiring.eval_calls import Runner
from pl_normkit.preserve import is_generator

_LOW, _HIGH = 0.001, 0.999
_MOST = 64
"""So many numbers are set; then come random ones, since code may draw until one fits."""
_STATE_WORDS = 624  # of the Mersenne Twister; two make a number


class _SingleNumbers(TorchFunctionMode):
    """Gives out low or high numbers wherever a single one is drawn; the caller restores the generators' states."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self._value, self._left = value, _MOST

    def __enter__(self) -> None:
        words = _words(self._value)
        random.setstate((3, (*words, 0), None))
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.set_state(("MT19937", words, 0))
        super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = operations.name_of(func)
        is_number = name in _DRAWS and isinstance(output, Tensor) and output.numel() == 1 and output.is_floating_point()
        if is_number and self._left > 0:
            self._left -= 1
            output.data.fill_(_drawn(name, args, kwargs or {}, self._value))
        return output


_DRAWS = frozenset(("rand", "rand_like", "uniform_", "bernoulli", "bernoulli_"))


def _drawn(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], value: float) -> float:
    if name == "uniform_":
        low, high = (kwargs.get(end, args[place] if len(args) > place else place - 1.0) for place, end in ((1, "from"), (2, "to")))
        return float(low + (high - low) * value)
    if name in ("bernoulli", "bernoulli_"):
        chance = kwargs.get("p", args[1] if len(args) > 1 else args[0] if name == "bernoulli" else 0.5)
        return float(value < float(chance))
    return value


@dataclass(frozen=True)
class _Run:
    """One eval run: parameters with a gradient from its outputs, modules called, and the outputs' shapes."""

    used: frozenset[str]
    called: frozenset[str]
    shapes: tuple[torch.Size, ...]


def own_generators(model: nn.Module) -> list[Any]:
    """Random generators of Python and numpy that modules hold."""
    held = (value for module in model.modules() for value in vars(module).values())
    return [value for value in held if is_generator(value) and not isinstance(value, torch.Generator)]


def left_to_chance(runner: Runner, *, tries: int) -> tuple[Place, ...]:
    """Parts whose parameters have a share in the output of one run and none in that of another, with nothing in their place.

    The caller has put the model into eval mode, and restores what a run changes.

    Args:
        runner: calls the model.
        tries: so many more runs, where the model draws from generators that cannot be set.
    """
    runs: list[_Run] = []
    generators = own_generators(runner.model)
    draws: list[AbstractContextManager[Any]] = [_SingleNumbers(_LOW), _SingleNumbers(_HIGH)]
    for numbers in (*draws, *(_later_numbers(generators, count) for count in range(tries))):
        try:
            runs.append(_run(runner, numbers))
        except Exception:  # no backward in eval mode, or numbers that the model cannot take
            return ()
        for other in runs[:-1]:
            lean, full = sorted((runs[-1], other), key=lambda run: len(run.used))
            if lean.used < full.used and lean.shapes == full.shapes:
                return tuple(dict.fromkeys(_part(name, lean, full) for name in sorted(full.used - lean.used)))
    return ()


@contextmanager
def _later_numbers(generators: list[Any], count: int) -> Iterator[None]:
    """Generators of a model's own cannot be set: they go on by a few numbers."""
    for generator in generators:
        for _ in range(count):
            generator.random()
    yield


def _run(runner: Runner, numbers: AbstractContextManager[Any]) -> _Run:
    parameters = {name: parameter for name, parameter in runner.model.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        watch, outputs = runner.watched(runner.leaves, within=numbers)
        learned = [output for output in outputs if output.requires_grad]
        weights = [torch.linspace(1, 2, output.numel()).view_as(output).to(output) for output in learned]
        gradients = torch.autograd.grad(learned, list(parameters.values()), weights, allow_unused=True)
    used = {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None and bool(gradient.any())}
    return _Run(frozenset(used), watch.facts().called, tuple(output.shape for output in outputs))


def _part(name: str, lean: _Run, full: _Run) -> Place:
    """The module that leaves itself out; where the model's own forward leaves it out, the outermost one that is called."""
    parts = name.split(".")[:-1]
    around = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    inner = next((path for path in reversed(around) if path in lean.called), None)
    return Place(inner or next((path for path in around if path in full.called), ""))


def _words(value: float) -> list[int]:
    """The state of a Mersenne Twister whose first numbers are `value`."""
    word = _untempered(int(value * 2**32))
    rest = random.Random(0)
    return [word if position < 2 * _MOST else rest.getrandbits(32) for position in range(_STATE_WORDS)]


def _untempered(word: int) -> int:
    """The word of the state that the generator gives out as `word` (Matsumoto and Nishimura 1998, its tempering undone)."""
    word ^= word >> 18
    word ^= (word << 15) & 0xEFC60000
    given = word
    for _ in range(4):
        word = given ^ ((word << 7) & 0x9D2C5680)
    given = word
    for _ in range(2):
        word = given ^ (word >> 11)
    return word & 0xFFFFFFFF
