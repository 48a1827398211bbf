"""Keeps the batch norms of frozen parts in eval mode; takes biases that a norm removes out of training."""

from __future__ import annotations

__all__ = ["freeze_biases_before_norms", "keep_norms_in_eval"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pl_normkit.errors import EditError
from pl_normkit.graph import ModelGraph
from pl_normkit.methods.wiring.find import find_biases_before_norms
from pl_normkit.methods.wiring.modules import KeptInEval
from pl_normkit.surgery import Change, Changes, Edit, Filter, MixIn, apply_edits, get_module
from pl_normkit.wrappers import unwrapped

Undo = Callable[[], None]


@dataclass(frozen=True)
class _StayInEval:
    """Eval mode now, and after every later `train()`."""

    path: str

    def _mix_in(self) -> MixIn:
        return MixIn(self.path, KeptInEval, "stays in eval mode, also after train()")

    def check(self, model: nn.Module) -> None:
        self._mix_in().check(model)

    def is_done(self, model: nn.Module) -> bool:
        return self._mix_in().is_done(model)

    def apply(self, model: nn.Module) -> tuple[Change, Undo]:
        module = get_module(model, self.path)
        mode = module.training
        change, undo_class = self._mix_in().apply(model)
        module.training = False

        def undo() -> None:
            undo_class()
            module.training = mode

        return change, undo


@dataclass(frozen=True)
class _Freeze:
    """`requires_grad_(False)` for one parameter."""

    parameter: str

    def check(self, model: nn.Module) -> None:
        if self.parameter not in dict(model.named_parameters()):
            raise EditError("the model has no such parameter", where=self.parameter)

    def is_done(self, model: nn.Module) -> bool:
        return not model.get_parameter(self.parameter).requires_grad

    def apply(self, model: nn.Module) -> tuple[Change, Undo]:
        parameter = model.get_parameter(self.parameter)
        parameter.requires_grad = False

        def undo() -> None:
            parameter.requires_grad = True

        return Change(self.parameter, "is not trained: the norm behind it removes it"), undo


def keep_norms_in_eval(model: nn.Module, example_inputs: Any = None, *, filter_fn: Filter | None = None) -> Changes:
    """Put batch norms whose own parameters are all frozen into eval mode and keep them there over `train()`.

    Args:
        model: edited in place; the norms stay the same objects with the same keys.
        example_inputs: not needed.
        filter_fn: says at which norms, by (module, path); all of them without it.

    >>> from torch import nn
    >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).requires_grad_(False)
    >>> print(keep_norms_in_eval(encoder))
    1: stays in eval mode, also after train()
    >>> encoder.train()[1].training
    False
    """
    edits: list[Edit] = [
        _StayInEval(path)
        for path, module in unwrapped(model).named_modules()
        if isinstance(module, _BatchNorm)
        and not any(parameter.requires_grad for parameter in module.parameters())
        and (filter_fn is None or filter_fn(module, path))
    ]
    return apply_edits(model, edits)


def freeze_biases_before_norms(model: nn.Module, example_inputs: Any, *, filter_fn: Filter | None = None) -> Changes:
    """Take biases that the following batch or instance norm removes out of training; the function stays as it is.

    Args:
        model: edited in place (`requires_grad`).
        example_inputs: what the model is called with, to find the norms.
        filter_fn: says at which layers, by (module, path of the bias); all of them without it.

    Raises:
        TraceError: when the model cannot be traced.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    >>> changes = freeze_biases_before_norms(model, torch.rand(2, 3, 8, 8))
    >>> model[0].bias.requires_grad
    False
    """
    plain = unwrapped(model)
    found = find_biases_before_norms(plain, ModelGraph.from_model(plain, example_inputs))
    names = [bias.parameter for bias in found if filter_fn is None or filter_fn(plain.get_submodule(bias.layer), bias.parameter)]
    return apply_edits(model, [_Freeze(name) for name in dict.fromkeys(names)])
