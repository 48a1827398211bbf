"""`NormAscent`: the ascent step of sharpness-aware minimization on the parameters of norms alone."""

from __future__ import annotations

__all__ = ["AscentKind", "NormAscent"]

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pl_normkit.errors import ConfigError, DataError, NothingMatchedError
from pl_normkit.methods.norm_training.find import NormParameters, find_norm_parameters
from pl_normkit.wrappers import unwrapped

AscentKind = Literal["l2", "elementwise_l2", "elementwise_linf"]
_TINY = 1e-16


class NormAscent:
    """Sharpness-aware minimization whose ascent moves norms only (SAM-ON). Between two backward passes the norms' parameters stand where
    the loss is higher; the second gradient, at that point and for all parameters, is what the optimizer steps by.

    - `l2`: e = rho g / (||g|| + 1e-16), the length over all norm parameters together.
    - `elementwise_l2`: e = rho T^2 g / (||T g|| + 1e-16), T = |w| + eta; for shifts T = 1 unless `normalize_bias`.
    - `elementwise_linf`: e = rho T sign(g).

    Running statistics of batch norms, and other buffers of norms, are after the second pass what they were before it. Dropout draws
    anew in the second pass, as any forward pass does. Where the first gradient is not finite, nothing moves.

    Args:
        model: any module that is not sharded; every norm parameter that has a gradient takes part.
        example_inputs: with it, norms are read from the traced graph too, as for `tune_norms_only`.
        rho: radius of the ascent. It needs to be far larger than for SAM on all parameters.
        kind: see above.
        eta: constant of the elementwise kinds.
        normalize_bias: whether T scales shifts too.

    Attributes:
        found: the norms' parameters by name.

    Raises:
        NothingMatchedError: when no norm with parameters is found.
        ConfigError: for numbers out of range, another kind, and sharded parameters.

    Source: "Normalization Layers Are All That Sharpness-Aware Minimization Needs", arXiv 2306.04226: formulas and the defaults of rho and
    eta as in its code. Choice by role, frozen statistics and the guard against gradients that are not finite are derived here.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    >>> ascent = NormAscent(model, rho=0.5)
    >>> model(torch.tensor([[1.0, 2.0]])).square().sum().backward()
    >>> with ascent.perturbed():
    ...     model.zero_grad()
    ...     model(torch.tensor([[1.0, 2.0]])).square().sum().backward()
    ...     moved = not torch.equal(model[1].weight, torch.ones(2))
    >>> moved, torch.equal(model[1].weight, torch.ones(2))
    (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any = None,
        *,
        rho: float = 0.5,
        kind: AscentKind = "l2",
        eta: float = 0.01,
        normalize_bias: bool = False,
    ) -> None:
        check_options(rho, kind, eta)
        model = unwrapped(model)
        self.found: NormParameters = find_norm_parameters(model, example_inputs)
        if not self.found.all:
            raise NothingMatchedError("no norm with parameters", evidence="; ".join(map(str, self.found.unread)))
        if any(hasattr(parameter, "to_local") for parameter in self.found.all.values()):
            raise ConfigError("the length of a gradient is not known where each process holds a part of it", fix="use DDP or one device")
        self.rho = rho
        self.kind = kind
        self.eta = eta
        self.normalize_bias = normalize_bias
        self._keeping = [*self.found.modules.values(), *(module for module in model.modules() if isinstance(module, _NormBase))]

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Within the block norms stand at the perturbed point, by the gradients at its start; put the second pass, with `zero_grad`, in
        it and the optimizer's step behind it.

        Raises DataError where no norm parameter has a gradient.
        """
        parameters = {name: parameter for name, parameter in self.found.all.items() if parameter.grad is not None}
        if not parameters:
            raise DataError("no norm parameter has a gradient", fix="call backward first, and unfreeze norms")
        buffers = [buffer for module in dict.fromkeys(self._keeping) for buffer in module.buffers(recurse=False)]
        moved = [*parameters.values(), *buffers]
        saved = [tensor.detach().clone() for tensor in moved]
        try:
            with torch.no_grad():
                for parameter, step in zip(parameters.values(), self._steps(parameters), strict=True):
                    parameter.add_(step)
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(moved, saved, strict=True):
                    tensor.copy_(value)

    def _steps(self, parameters: dict[str, nn.Parameter]) -> list[Tensor]:
        gradients = {name: parameter.grad.detach() for name, parameter in parameters.items() if parameter.grad is not None}
        factors = {name: self._factor(name, parameter) for name, parameter in parameters.items()}
        scaled = [factors[name] * gradient for name, gradient in gradients.items()]
        length = _length(scaled)
        steps = []
        for name, values in zip(gradients, scaled, strict=True):
            if self.kind == "elementwise_linf":
                step = self.rho * factors[name] * values.sign()
            else:
                step = factors[name] * values * (self.rho / (length + _TINY)).to(values.device)
            steps.append(torch.where(length.isfinite().to(values.device), step, 0).to(parameters[name].dtype))
        return steps

    def _factor(self, name: str, parameter: nn.Parameter) -> Tensor:
        if self.kind == "l2" or (name in self.found.shifts and not self.normalize_bias):
            return torch.ones_like(parameter)
        return parameter.detach().abs() + self.eta


def _length(tensors: Sequence[Tensor]) -> Tensor:
    """Length of all of them together, in float32 at least."""
    wide = [values.to(torch.promote_types(values.dtype, torch.float32)) for values in tensors]
    length: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(values).to(wide[0].device) for values in wide]))
    return length


def check_options(rho: float, kind: str, eta: float) -> None:
    """Raises ConfigError for what `NormAscent` does not take."""
    if rho <= 0 or eta < 0:
        raise ConfigError("rho must be above 0 and eta not below", evidence=f"rho={rho!r}, eta={eta!r}")
    if kind not in get_args(AscentKind):
        raise ConfigError("there is no such kind of ascent", evidence=repr(kind), fix=f"use one of {', '.join(get_args(AscentKind))}")
