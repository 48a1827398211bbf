"""Example inputs of a model: from `--input` options, or from what is known of the model."""

from __future__ import annotations

__all__ = ["parse_inputs"]

import inspect
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.errors import ModelSpecError, nearest
from pl_normkit.importing import import_library, users_code
from pl_normkit.specs import read_spec

BATCH = 2
"""Samples in the made-up batch: batch norm needs two where it sees one value per channel."""

TOKENS = 16
FRAMES = 16

_FORM = (
    "write sizes without the batch, and a dtype if not float32: 3,224,224 or 128:int64; "
    "NAME=16:int64 for a keyword argument, ids:16 for tokens"
)


def parse_inputs(texts: Sequence[str], model: nn.Module, *, spec: str = "", device: str = "meta") -> Any:
    """Example inputs from `--input` options, or the model's own when there is none.

    Args:
        texts: one text per argument of forward, sizes without the batch: "3,224,224", and optionally a dtype, "128:int64" (float32
            otherwise, int64 where the name ends in "ids"). "mask=16:bool" is the keyword argument `mask`, "batch.image=3,8,8" the entry
            `image` of a dict given as `batch`, "ids:16" or "ids:2,16" (batch and length) a batch of token ids.
        model: asked for `example_input_array` and for what its library says of its inputs when `texts` is empty.
        spec: what the model was built from, which says more in that case.
        device: where the tensors are made.

    Returns:
        A tuple of positional arguments or a dict of keyword arguments.

    Raises:
        ModelSpecError: for a text that is no shape, a name that forward does not take, or when there is nothing to go by.
    """
    if texts:
        return _from_texts(texts, model, device)
    with users_code("the model's example_input_array cannot be read", fix="give the input's shape: --input 3,224,224"):
        own = getattr(model, "example_input_array", None)
    if own is not None:
        return own
    found = _of_library(model, spec, device)
    if found is None:
        raise ModelSpecError("the input shape of this model is not known", fix="give it, without the batch: --input 3,224,224")
    return found


# From words


def _from_texts(texts: Sequence[str], model: nn.Module, device: str) -> Any:
    positional: list[Tensor] = []
    keywords: dict[str, Any] = {}
    for text in texts:
        name, equals, shape = text.rpartition("=")
        tensor = _parse(text, shape, name, device)
        if not equals:
            positional.append(tensor)
            continue
        home = keywords
        *outer, last = name.split(".")
        for part in outer:
            home = home.setdefault(part, {})
            if not isinstance(home, dict):
                raise ModelSpecError(f"--input {text!r} is inside of what is a tensor already", fix="give an entry of a dict another name")
        home[last] = tensor
    if not keywords:
        return tuple(positional)
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in keywords:
        if name not in parameters and not takes_any:
            fix = nearest(name, parameters) or f"it takes {', '.join(parameters) or 'nothing'}"
            raise ModelSpecError(f"forward of {type(model).__name__} takes no {name!r}", where="--input", fix=fix)
    return {**dict(zip(parameters, positional, strict=False)), **keywords}


def _parse(text: str, shape: str, name: str, device: str) -> Tensor:
    tokens = re.fullmatch(r"ids:(?:(\d{1,9}),)?(\d{1,9})", shape)
    if tokens:
        return _made_up((int(tokens[2]),), torch.int64, device, batch=int(tokens[1] or BATCH))
    sizes, _, dtype_name = shape.partition(":")
    dtype = getattr(torch, dtype_name or ("int64" if name.endswith("ids") else "float32"), None)
    try:
        numbers = [int(size) for size in sizes.split(",")] if sizes or not name else []
    except ValueError:
        numbers = [0]
    if min(numbers, default=1) < 1 or not isinstance(dtype, torch.dtype) or not _holds_numbers(dtype):
        raise ModelSpecError(f"--input {text!r} is no shape", fix=_FORM)
    return _made_up(numbers, dtype, device)


def _holds_numbers(dtype: torch.dtype) -> bool:
    """Not a quantized or a bit-field type, which no operation takes."""
    return dtype.is_floating_point or dtype.is_complex or str(dtype).removeprefix("torch.").lstrip("u").startswith(("int", "bool"))


def _made_up(shape: Sequence[int], dtype: torch.dtype, device: str, *, batch: int = BATCH, below: int = 1) -> Tensor:
    """A batch of noise, the same in every run, so that what is measured on it means something; where noise has no dtype, whole numbers
    from 0 up to `below`.
    """
    text = ",".join(map(str, shape))
    size = batch * math.prod(shape) * dtype.itemsize
    if device != "meta" and size > _memory_size():
        raise ModelSpecError(
            f"--input {text} is larger than the memory of this machine",
            evidence=f"{size / 2**30:.3g} GiB",
            fix="give smaller sizes, or leave out --real",
        )
    with users_code(f"--input {text} cannot be made", fix="give other sizes or another dtype"):
        if device == "meta" or (not dtype.is_floating_point and below == 1):
            return torch.zeros(batch, *shape, dtype=dtype, device=device)
        generator = torch.Generator().manual_seed(0)
        if not dtype.is_floating_point:
            return torch.randint(below, (batch, *shape), generator=generator, dtype=dtype)
        return torch.randn(batch, *shape, generator=generator).to(device, dtype)


def _memory_size() -> int:
    """Bytes of the machine's memory; asking for more may end the process before Python can say why."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else sys.maxsize


# From what libraries know of their models


def _of_library(model: nn.Module, spec: str, device: str) -> Any:
    source, name, arguments = read_spec(spec) if spec else ("", "", {})
    config = getattr(model, "config", None)
    with users_code("the inputs of this model cannot be made from its configuration", fix="give them: --input NAME=SIZES"):
        if source == "torchvision":
            return _of_torchvision(name, device)
        if source == "diffusers":
            return _of_diffusers(model, config, device)
        if isinstance(getattr(model, "main_input_name", None), str) and config is not None:
            return _of_transformers(model, config, device)
        return _of_timm(model, arguments, device)


def _of_timm(model: nn.Module, arguments: Mapping[str, Any], device: str) -> tuple[Tensor, ...] | None:
    config = getattr(model, "pretrained_cfg", None) or getattr(getattr(model, "encoder", None), "pretrained_cfg", None) or {}
    size = config.get("input_size") if hasattr(config, "get") else None
    if size is None:
        return None
    sides = arguments.get("img_size", size[1:])
    sides = (sides, sides) if isinstance(sides, int) else sides
    return (_made_up((arguments.get("in_chans", arguments.get("in_channels", size[0])), *sides), torch.float32, device),)


def _of_torchvision(name: str, device: str) -> tuple[Tensor, ...] | None:
    """By the transforms of its weights; segmentation takes the size that its evaluation resizes to."""
    models = import_library("torchvision.models", "torchvision")
    weights = next(iter(models.get_model_weights(name)), None)
    if weights is None:
        return None
    transform = weights.transforms()
    kind = type(transform).__name__
    sides = getattr(transform, "crop_size", None) or getattr(transform, "resize_size", None) or [256]
    sides = (sides[0], sides[-1])
    if kind == "VideoClassification":
        return (_made_up((3, FRAMES, *sides), torch.float32, device),)
    if kind == "OpticalFlow":
        return tuple(_made_up((3, *sides), torch.float32, device) for _ in range(2))
    if kind in ("ImageClassification", "SemanticSegmentation"):
        return (_made_up((3, *sides), torch.float32, device),)
    return None


def _of_transformers(model: nn.Module, config: Any, device: str) -> dict[str, Tensor] | None:
    """Its main input; the first tokens of the decoder too where it has one."""
    name = str(model.main_input_name)
    vision, text = getattr(config, "vision_config", config), getattr(config, "text_config", config)
    tokens = _made_up((TOKENS,), torch.int64, device, below=max(getattr(text, "vocab_size", None) or 1, 1))
    known: dict[str, Any] = {}
    if name == "input_ids":
        known[name] = tokens
    elif name == "pixel_values":
        known[name] = _made_up((getattr(vision, "num_channels", 3), *_sides(getattr(vision, "image_size", 224))), torch.float32, device)
    else:
        raise ModelSpecError(f"the shape of {name} is not known", fix=f"give it, without the batch: --input {name}=SIZES")
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" in parameters and "pixel_values" in parameters and text is not vision:
        known["input_ids"] = tokens
        known["pixel_values"] = _made_up((getattr(vision, "num_channels", 3), *_sides(vision.image_size)), torch.float32, device)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        known["decoder_input_ids"] = tokens
    return known


def _sides(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def _of_diffusers(model: nn.Module, config: Any, device: str) -> dict[str, Tensor] | None:
    """What forward requires, by the names that diffusers gives to its arguments."""
    image = (getattr(config, "in_channels", None) or 3, *_sides(getattr(config, "sample_size", None) or 64))
    width = getattr(config, "cross_attention_dim", None) or getattr(config, "joint_attention_dim", None) or 1
    known = {
        "sample": (image, torch.float32),
        "hidden_states": (image, torch.float32),
        "timestep": ((), torch.int64),
        "class_labels": ((), torch.int64),
        "encoder_hidden_states": ((TOKENS, width), torch.float32),
    }
    inputs = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        is_asked_for = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if is_asked_for or (name == "class_labels" and getattr(config, "norm_type", "") == "ada_norm_zero"):
            if name not in known:
                raise ModelSpecError(f"the shape of {name} is not known", fix=f"give all inputs: --input {name}=SIZES")
            shape, dtype = known[name]
            inputs[name] = _made_up(shape, dtype, device)
    return inputs
