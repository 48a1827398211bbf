"""What the functions of torch do, by their names and arguments, as a TorchFunctionMode sees them called."""

from __future__ import annotations

__all__ = [
    "CASTS",
    "DROPOUTS",
    "LOOKUPS",
    "NORMS",
    "SHAPE_ONLY",
    "VALUE_READS",
    "VIEWS",
    "WEIGHT_LAYERS",
    "as_written",
    "drop_probability",
    "first_input",
    "is_in_place",
    "is_switched_off",
    "name_of",
    "norm_call",
    "reads_last",
]

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pl_normkit.findings import Place
from pl_normkit.first_step.facts import FirstInput, NormCall


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


WEIGHT_LAYERS = _words("""conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear addmm matmul __matmul__ mm
    lstm gru rnn_tanh rnn_relu multi_head_attention_forward bilinear""")
NORMS = _words("batch_norm group_norm layer_norm instance_norm rms_norm")
LOOKUPS = _words("embedding embedding_bag one_hot")
CASTS = _words("to float double half bfloat16 type type_as")
VIEWS = _words("""view reshape flatten unflatten permute transpose movedim swapaxes squeeze unsqueeze contiguous expand expand_as t
    __getitem__ narrow select chunk split unbind clone unfold view_as mT""")
DROPOUTS = _words("""dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout
    scaled_dot_product_attention multi_head_attention_forward""")
SHAPE_ONLY = _words("""zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty
    new_full new_tensor size bernoulli_ uniform_ normal_ fill_ zero_""")
"""Their result has the shape of the argument and none of its values."""
VALUE_READS = _words("item tolist numpy __bool__ __int__ __float__ __index__ __array__ __contains__ is_nonzero equal allclose")
_SAMPLES = 8
"""So many images show the range of all."""
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


def name_of(func: Any) -> str:
    name: str = getattr(func, "__name__", "")
    return "data" if name == "__get__" and func == _DATA else name


def as_written(name: str) -> str:
    """An operation as it stands in a user's program."""
    return ".data" if name == "data" else f"{name}()"


def is_in_place(name: str) -> bool:
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name.endswith("__"))


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str, default: Any = None) -> Any:
    return kwargs[name] if name in kwargs else args[position] if position < len(args) else default


def drop_probability(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """With which probability this call drops; 0 where it is switched off."""
    if name == "scaled_dot_product_attention":
        return float(_argument(args, kwargs, 4, "dropout_p", 0.0) or 0.0)
    if name == "multi_head_attention_forward":
        return float(_argument(args, kwargs, 10, "dropout_p", 0.0)) if _argument(args, kwargs, 13, "training", True) else 0.0
    return float(_argument(args, kwargs, 1, "p", 0.5)) if _argument(args, kwargs, 2, "training", True) else 0.0


def is_switched_off(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a dropout function with a probability was told not to drop."""
    if "attention" in name:
        return False
    return not _argument(args, kwargs, 2, "training", True) and float(_argument(args, kwargs, 1, "p", 0.5)) > 0


def reads_last(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], time: int | None) -> bool:
    """Whether the call picks the last position along dimension `time` (never where that is None)."""
    if time is None:
        return False
    if name == "select":
        dim, index = _argument(args, kwargs, 1, "dim"), _argument(args, kwargs, 2, "index")
    else:
        key = args[1] if isinstance(args[1], tuple) else (args[1],)
        dim, index = time, key[time] if time < len(key) and Ellipsis not in key[: time + 1] else None
    return dim == time and isinstance(index, int) and index in (-1, args[0].shape[time] - 1)


def norm_call(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], place: Place) -> NormCall | None:
    """How many values the statistics of this call are taken over."""
    value = _argument(args, kwargs, 0, "input")
    if not isinstance(value, Tensor) or value.dim() < 1 or value.numel() == 0:
        return None
    gradient, batch, spatial = value.requires_grad, value.shape[0], math.prod(value.shape[2:])
    if name == "batch_norm":
        uses_batch = bool(_argument(args, kwargs, 5, "training", False)) or _argument(args, kwargs, 1, "running_mean") is None
        return NormCall(place, "batch", batch * spatial, spatial, gradient, uses_batch)
    if name == "group_norm":
        size = value.shape[1] // int(_argument(args, kwargs, 1, "num_groups")) * spatial
        return NormCall(place, "group", size, size, gradient, True)
    if name == "instance_norm":
        return NormCall(place, "instance", spatial, spatial, gradient, bool(_argument(args, kwargs, 5, "use_input_stats", True)))
    if name == "layer_norm":
        size = math.prod(_argument(args, kwargs, 1, "normalized_shape"))
        return NormCall(place, "layer", size, size, gradient, True)
    return None


def first_input(value: Tensor, place: Place, *, is_cast: bool) -> FirstInput:
    """Range and moments of a float tensor, and the feature that is farthest from 0 in units of its own spread."""
    with torch.no_grad():
        shape = tuple(value.shape)
        value = (value[:_SAMPLES] if value.dim() > 3 else value).detach().float()
        low, high = (float(bound) for bound in value.aminmax())
        std, mean = (float(moment) for moment in torch.std_mean(value))
        return FirstInput(place, shape, low, high, mean, std, _is_whole(value), _far_column(value), is_cast)


def _is_whole(value: Tensor) -> bool:
    sample = value.flatten()[:65536]
    return all(bool((part == part.round()).all()) for part in (sample[:256], sample))


def _far_column(value: Tensor) -> tuple[int, float, float] | None:
    """Index, mean and standard deviation of the feature (last dimension) that lies farthest from 0, for rows and sequences of features."""
    if value.dim() not in (2, 3) or math.prod(value.shape[:-1]) < 8:
        return None
    std, mean = torch.std_mean(value.reshape(-1, value.shape[-1]), 0)
    distance = torch.where(std > 0, mean.abs() / std, 0.0)
    index = int(distance.argmax())
    return index, float(mean[index]), float(std[index])
