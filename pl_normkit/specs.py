"""From the words of the command line to objects: models, example inputs, optimizers."""

from __future__ import annotations

__all__ = ["build_model", "parse_inputs"]

import ast
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import Tensor, nn

from pl_normkit.errors import ModelSpecError, nearest
from pl_normkit.importing import import_library, import_object, users_code

BATCH = 2
"""Samples in the made-up batch: batch norm needs two where it sees one value per channel."""

_FORMS = "timm:NAME, smp:ARCHITECTURE, torchvision:NAME or package.module:BUILDER, each with ?argument=value&..."


def build_model(spec: str, *, device: str = "meta") -> nn.Module:
    """The model that `spec` names, without weights.

    Args:
        spec: `timm:resnet50`, `smp:Unet?encoder_name=resnet18`, `torchvision:resnet50` or `package.module:builder`, where
            the builder is a function, a class or a module; `?name=value&...` gives keyword arguments (Python literals).
        device: where to build it; a model that cannot be built on the meta device is built on the CPU.

    Raises:
        ModelSpecError: when the spec, the package or the model does not exist, or the builder fails.
    """
    head, _, query = spec.partition("?")
    source, colon, name = head.partition(":")
    if not colon or not source or not name:
        raise ModelSpecError(f"{spec!r} is no model specification", mend=f"write {_FORMS}")
    arguments = {key: _literal(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    build = _LIBRARIES.get(source, _from_import)
    construct = build(source, name, arguments)
    with users_code(f"{spec!r} cannot be built", mend="check the arguments"):
        model = _construct(construct, device)
    if not isinstance(model, nn.Module):
        raise ModelSpecError(
            f"{spec!r} gives no torch.nn.Module", evidence=f"a {type(model).__name__}", mend="name a builder that returns a module"
        )
    return model


def _construct(construct: Callable[[], Any], device: str) -> Any:
    try:
        with torch.device(device):
            return construct()
    except (RuntimeError, NotImplementedError) as error:
        if device != "meta" or "meta" not in str(error).lower():
            raise
    with torch.device("cpu"):
        return construct()


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that literal_eval documents
        return text


def _from_timm(_: str, name: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    timm = import_library("timm", "timm")
    if not timm.is_model(name):
        raise ModelSpecError(f"timm has no model {name!r}", mend=nearest(name, timm.list_models()) or "see timm.list_models()")
    return lambda: timm.create_model(name, **arguments)


def _from_smp(_: str, name: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    smp = import_library("segmentation_models_pytorch", "segmentation-models-pytorch")
    architectures = {kind.__name__.lower(): kind.__name__ for kind in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    if name.lower() not in architectures:
        raise ModelSpecError(
            f"segmentation_models_pytorch has no architecture {name!r}",
            mend=nearest(name, architectures.values()) or ", ".join(architectures.values()),
        )
    return lambda: smp.create_model(name.lower(), **{"encoder_weights": None, **arguments})


def _from_torchvision(_: str, name: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    models = import_library("torchvision.models", "torchvision")
    if name not in models.list_models():
        raise ModelSpecError(
            f"torchvision has no model {name!r}", mend=nearest(name, models.list_models()) or "see torchvision.models.list_models()"
        )
    no_weights = {"weights": None}
    if name.startswith(("deeplab", "fcn", "lraspp")):
        no_weights["weights_backbone"] = None
    return lambda: models.get_model(name, **{**no_weights, **arguments})


def _from_import(source: str, name: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    found = import_object(f"{source}:{name}")
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise ModelSpecError(
            f"{source}:{name} is no builder", evidence=f"a {type(found).__name__}", mend="name a function, a class or a module"
        )
    return lambda: found(**arguments)


_LIBRARIES: dict[str, Callable[[str, str, dict[str, Any]], Callable[[], Any]]] = {
    "timm": _from_timm,
    "smp": _from_smp,
    "torchvision": _from_torchvision,
}


def parse_inputs(texts: Sequence[str], model: nn.Module, *, device: str = "meta") -> Any:
    """Example inputs from `--input` options, or the model's own when there is none.

    Args:
        texts: one text per positional argument: sizes without the batch, "3,224,224", and optionally a dtype,
            "128:int64" (float32 otherwise).
        model: asked for `example_input_array` and for timm's `input_size` when `texts` is empty.
        device: where the tensors are made.

    Raises:
        ModelSpecError: for a text that is no shape, or when there is nothing to go by.
    """
    if texts:
        return tuple(_parse_input(text, device) for text in texts)
    with users_code("the model's example_input_array cannot be read", mend="give the input's shape: --input 3,224,224"):
        own = getattr(model, "example_input_array", None)
    if own is not None:
        return own
    config = getattr(model, "pretrained_cfg", None) or getattr(getattr(model, "encoder", None), "pretrained_cfg", None) or {}
    size = config.get("input_size") if hasattr(config, "get") else None
    if size is None:
        raise ModelSpecError("the input shape of this model is not known", mend="give it, without the batch: --input 3,224,224")
    return (_made_up(size, torch.float32, device),)


def _parse_input(text: str, device: str) -> Tensor:
    sizes, _, dtype_name = text.partition(":")
    dtype = getattr(torch, dtype_name or "float32", None)
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1 or not isinstance(dtype, torch.dtype) or not _holds_numbers(dtype):
        raise ModelSpecError(
            f"--input {text!r} is no shape", mend="write sizes without the batch, and a dtype if not float32: 3,224,224 or 128:int64"
        )
    return _made_up(shape, dtype, device)


def _holds_numbers(dtype: torch.dtype) -> bool:
    """Not a quantized or a bit-field type, which no operation takes."""
    return dtype.is_floating_point or dtype.is_complex or str(dtype).removeprefix("torch.").lstrip("u").startswith(("int", "bool"))


def _made_up(shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    """A batch of noise, the same in every run, so that what is measured on it means something; zeros where noise has no dtype."""
    text = ",".join(map(str, shape))
    with users_code(f"--input {text} cannot be made", mend="give another dtype"):
        size = BATCH * math.prod(shape) * dtype.itemsize
    if device != "meta" and size > memory_size():
        raise ModelSpecError(
            f"--input {text} is larger than the memory of this machine",
            evidence=f"{size / 2**30:.3g} GiB",
            mend="give smaller sizes, or leave out --real",
        )
    with users_code(f"--input {text} cannot be made", mend="give other sizes or another dtype"):
        if device == "meta" or not dtype.is_floating_point:
            return torch.zeros(BATCH, *shape, dtype=dtype, device=device)
        return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def memory_size() -> int:
    """Bytes of the machine's memory; asking for more may end the process before Python can say why."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else sys.maxsize
