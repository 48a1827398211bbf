"""New values for parameters and buffers, and which parameters are trained, as one edit."""

from __future__ import annotations

__all__ = ["Resize", "SetTrainable", "SetValues"]

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pl_normkit.errors import EditError
from pl_normkit.surgery import Change, Undo, get_module


@dataclass(frozen=True)
class SetValues:
    """Write new values into parameters and buffers, which stay the same objects. Names are those of the state_dict."""

    module: str
    values: Mapping[str, Tensor]
    what: str

    def check(self, model: nn.Module) -> None:
        for name, value in self.values.items():
            if _held(model, name).shape != value.shape:
                raise EditError("new values have another shape", where=name)

    def is_done(self, model: nn.Module) -> bool:
        return all(torch.equal(_held(model, name), value) for name, value in self.values.items())

    @torch.no_grad()
    def apply(self, model: nn.Module) -> tuple[Change, Undo]:
        parameters = {name: _held(model, name) for name in self.values}
        saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for name, value in self.values.items():
            parameters[name].copy_(value)

        @torch.no_grad()
        def undo() -> None:
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])

        return Change(self.module, self.what), undo


@dataclass(frozen=True)
class Resize:
    """Write values of another shape into parameters, which stay the same objects under the same names.

    Sizes that the modules keep beside them, such as `out_features`, are another edit's to set. Undoing gives the old storage back.
    """

    module: str
    values: Mapping[str, Tensor]
    what: str

    def check(self, model: nn.Module) -> None:
        for name, value in self.values.items():
            if _held(model, name).ndim != value.ndim:
                raise EditError("new values have another number of dimensions", where=name)

    def is_done(self, model: nn.Module) -> bool:
        return all(
            _held(model, name).shape == value.shape and torch.equal(_held(model, name), value) for name, value in self.values.items()
        )

    @torch.no_grad()
    def apply(self, model: nn.Module) -> tuple[Change, Undo]:
        parameters = {name: _held(model, name) for name in self.values}
        saved = {name: (parameter.data, parameter.grad) for name, parameter in parameters.items()}
        for name, value in self.values.items():
            parameters[name].grad = None  # of the old shape
            parameters[name].data = value.to(parameters[name].dtype).contiguous()

        def undo() -> None:
            for name, parameter in parameters.items():
                parameter.grad = None
                parameter.data, parameter.grad = saved[name]

        return Change(self.module, self.what), undo


@dataclass(frozen=True)
class SetTrainable:
    """Set `requires_grad` of parameters, which stay the same objects. Names are those of `named_parameters`."""

    module: str
    trainable: Mapping[str, bool]
    what: str

    def check(self, model: nn.Module) -> None:
        for name, wanted in self.trainable.items():
            if wanted and not _held(model, name).dtype.is_floating_point:
                raise EditError("only numbers with a fraction can be trained", where=name, evidence=str(_held(model, name).dtype))

    def is_done(self, model: nn.Module) -> bool:
        return all(_held(model, name).requires_grad is wanted for name, wanted in self.trainable.items())

    def apply(self, model: nn.Module) -> tuple[Change, Undo]:
        parameters = {name: _held(model, name) for name in self.trainable}
        before = {name: parameter.requires_grad for name, parameter in parameters.items()}
        for name, wanted in self.trainable.items():
            parameters[name].requires_grad_(wanted)

        def undo() -> None:
            for name, parameter in parameters.items():
                parameter.requires_grad_(before[name])

        return Change(self.module, self.what), undo


def _held(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    found = getattr(get_module(model, path), last)
    assert isinstance(found, Tensor)
    return found
