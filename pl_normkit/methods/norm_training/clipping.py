"""`AdaptiveClipping`: gradients clipped by the size of the weights of each unit, by timm's function."""

from __future__ import annotations

__all__ = ["AdaptiveClipping"]

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from pl_normkit.errors import ConfigError, TraceError
from pl_normkit.graph import ModelGraph
from pl_normkit.importing import import_library
from pl_normkit.methods.norm_training.find import head_parameters, parameters_under
from pl_normkit.wrappers import unwrapped

View = tuple[Tensor, Tensor]
"""A parameter and its gradient, seen so that the first dimension counts units."""


class AdaptiveClipping:
    """Adaptive gradient clipping: where ||g|| > clip_factor max(||w||, eps) in a unit, g is scaled down to that length.

    timm's `adaptive_clip_grad` clips. It counts units along the first dimension, and each element of a gain of shape (C, 1, 1, 1) as one;
    here a parameter that is a vector but for dimensions of size 1 is one unit, as in the paper's code, and units of transposed
    convolutions and of GPT-2's `Conv1D` are their outputs. Sparse gradients are left alone.

    Args:
        model: any module.
        example_inputs: with it, the head is found in the traced graph and not clipped: weight layers whose result reaches an output
            through no other weight layer, norm or residual addition. A weight tied to the embedding is the head's.
        clip_factor: timm's advice for RMSProp and small batches is 0.001 to 0.005.
        eps: shortest length that counts for a weight.
        skip: paths of modules or parameters not to clip, beside that head.

    Attributes:
        skipped: names of the parameters not to clip.

    Raises:
        ConfigError: for numbers that are not above 0, and a path of `skip` that holds no parameter.
        ModelSpecError: when timm is not installed.
        TraceError: when the model cannot be traced with `example_inputs`.

    Source: "High-Performance Large-Scale Image Recognition Without Normalization", arXiv 2102.06171, and its code: formula, defaults,
    one norm for vectors and scalars, the final linear layer excluded. How that is found, and outputs as units, are derived here.

    >>> import torch
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.fill_(1.0)
    >>> layer.weight.grad = torch.full((1, 2), 3.0)
    >>> AdaptiveClipping(layer, clip_factor=0.5).clip(layer.parameters())
    >>> layer.weight.grad
    tensor([[0.5000, 0.5000]])
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any = None, *, clip_factor: float = 0.01, eps: float = 1e-3, skip: Sequence[str] = ()
    ) -> None:
        check_options(clip_factor, eps)
        self._clip_grad = import_library("timm.utils.agc", "timm").adaptive_clip_grad
        self.clip_factor = clip_factor
        self.eps = eps
        self._model = unwrapped(model)
        self.skipped = parameters_under(self._model, skip, "skip")
        if example_inputs is not None:
            self.skip_head(self._model, example_inputs)
        self._holders = {
            id(parameter): module for module in self._model.modules() for parameter in module._parameters.values() if parameter is not None
        }

    def skip_head(self, network: nn.Module, example_inputs: Any) -> set[str]:
        """Leave out the head of `network`, the model or a part of it; the names in the model. Raises TraceError."""
        graph = _graph(network, example_inputs)
        inside, names = dict(unwrapped(network).named_parameters()), {id(held): name for name, held in self._model.named_parameters()}
        head = {names[id(inside[name])] for name in head_parameters(graph) if name in inside and id(inside[name]) in names}
        self.skipped |= head
        return head

    def clip(self, parameters: Iterable[nn.Parameter]) -> None:
        """Clip the gradients of those of `parameters` that are not skipped, in place. Raises ConfigError for shards."""
        left_out = {id(parameter) for name, parameter in self._model.named_parameters() if name in self.skipped}
        chosen = [held for held in parameters if held.grad is not None and not held.grad.is_sparse and id(held) not in left_out]
        if any(hasattr(parameter, "to_local") for parameter in chosen):
            raise ConfigError("lengths of units are not known where each process holds a part of them", fix="use DDP or one device")
        views = [_stand_in(weight, gradient) for parameter in chosen for weight, gradient in self._views(parameter)]
        self._clip_grad(views, self.clip_factor, self.eps)

    def _views(self, parameter: nn.Parameter) -> Iterator[View]:
        assert parameter.grad is not None
        weight, gradient = parameter.detach(), parameter.grad.detach()
        holder = self._holders.get(id(parameter))
        if weight.squeeze().ndim <= 1:
            yield weight.squeeze(), gradient.squeeze()
        elif isinstance(holder, _ConvTransposeNd):  # (inputs, outputs / groups, ...)
            parts = zip(weight.chunk(holder.groups), gradient.chunk(holder.groups), strict=True)
            yield from ((values.transpose(0, 1), slopes.transpose(0, 1)) for values, slopes in parts)
        elif type(holder).__name__ == "Conv1D" and weight.ndim == 2:  # (inputs, outputs)
            yield weight.t(), gradient.t()
        else:
            yield weight, gradient


def _graph(network: nn.Module, example_inputs: Any) -> ModelGraph:
    """In training mode, or else in eval mode; never in parts, each of which would seem to end in a head."""
    try:
        return ModelGraph.from_model(network, example_inputs)
    except TraceError:
        return ModelGraph.from_model(network, example_inputs, training=False)


def _stand_in(weight: Tensor, gradient: Tensor) -> nn.Parameter:
    """What timm's function takes; it writes into `gradient`, a view of the parameter's own."""
    parameter = nn.Parameter(weight)
    parameter.grad = gradient
    return parameter


def check_options(clip_factor: float, eps: float) -> None:
    """Raises ConfigError for what `AdaptiveClipping` does not take."""
    if clip_factor <= 0 or eps <= 0:
        raise ConfigError("clip_factor and eps must be above 0", evidence=f"clip_factor={clip_factor!r}, eps={eps!r}")
