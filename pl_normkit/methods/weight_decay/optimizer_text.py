"""An optimizer from text such as `torch.optim.AdamW(lr=1e-3, weight_decay=0.05)`."""

from __future__ import annotations

__all__ = ["build_optimizer"]

import re
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pl_normkit.errors import ConfigError, nearest
from pl_normkit.importing import import_dotted, literal_calls


def build_optimizer(text: str, model: nn.Module) -> Optimizer:
    """The optimizer that `text` describes, over the trainable parameters of `model`; nothing in `text` is evaluated as code.

    Args:
        text: a dotted class path (a bare name means `torch.optim`) and, in parentheses, options as literals.
        model: the module; the meta device is enough.

    Raises:
        ConfigError: when `text` is no such call, names no optimizer, or the optimizer refuses the options.
    """
    path, options = _read_call(text)
    kind = _find_class(path)
    try:
        return kind([parameter for parameter in model.parameters() if parameter.requires_grad], **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{kind.__name__} does not take these options", where=text, evidence=str(error)) from error


def _read_call(text: str) -> tuple[str, dict[str, Any]]:
    fix = 'write it as "torch.optim.AdamW(lr=1e-3, weight_decay=0.05)"'
    try:
        calls = literal_calls(text)
    except SyntaxError as error:
        raise ConfigError("this is no optimizer", where=text, evidence=str(error), fix=fix) from error
    except ValueError as error:
        raise ConfigError("an optimizer's options are literals", where=text, evidence=str(error), fix=fix) from error
    if len(calls) != 1 or not _DOTTED.fullmatch(calls[0].path):
        raise ConfigError("this is no optimizer", where=text, fix=fix)
    if calls[0].arguments or "**" in calls[0].options:
        raise ConfigError("an optimizer's options are given by keyword, its parameters come from the model", where=text, fix=fix)
    return calls[0].path, calls[0].options


_DOTTED = re.compile(r"\w+(\.\w+)*")


def _find_class(path: str) -> type[Optimizer]:
    try:
        kind = import_dotted(path, "torch.optim")
    except ImportError as error:
        raise ConfigError(f"there is no module {path.rpartition('.')[0]!r}", where=path, evidence=str(error)) from error
    except AttributeError:
        kind = None
    if not isinstance(kind, type) or not issubclass(kind, Optimizer):
        known = [word for word, value in vars(torch.optim).items() if isinstance(value, type) and issubclass(value, Optimizer)]
        hint = nearest(path.rpartition(".")[2], known)
        raise ConfigError(f"{path} is no optimizer class", where=path, fix=hint or "give a class of torch.optim")
    return kind
