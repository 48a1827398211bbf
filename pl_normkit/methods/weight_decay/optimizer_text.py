"""An optimizer from text such as `torch.optim.AdamW(lr=1e-3, weight_decay=0.05)`."""

from __future__ import annotations

__all__ = ["build_optimizer"]

import ast
import importlib
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pl_normkit.errors import ConfigError, nearest


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
    mend = 'write it as "torch.optim.AdamW(lr=1e-3, weight_decay=0.05)"'
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ConfigError("this is no optimizer", where=text, evidence=str(error), mend=mend) from error
    if isinstance(call, (ast.Name, ast.Attribute)):
        return ast.unparse(call), {}
    if not isinstance(call, ast.Call) or not isinstance(call.func, (ast.Name, ast.Attribute)):
        raise ConfigError("this is no optimizer", where=text, mend=mend)
    if call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ConfigError("an optimizer's options are given by keyword, its parameters come from the model", where=text, mend=mend)
    try:
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except ValueError as error:
        raise ConfigError("an optimizer's options are literals", where=text, evidence=str(error), mend=mend) from error
    return ast.unparse(call.func), options


def _find_class(path: str) -> type[Optimizer]:
    home, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(home or "torch.optim")
    except ImportError as error:
        raise ConfigError(f"there is no module {home!r}", where=path, evidence=str(error)) from error
    kind = getattr(module, name, None)
    if not isinstance(kind, type) or not issubclass(kind, Optimizer):
        known = [word for word, value in vars(torch.optim).items() if isinstance(value, type) and issubclass(value, Optimizer)]
        raise ConfigError(f"{path} is no optimizer class", where=path, mend=nearest(name, known) or "give a class of torch.optim")
    found: type[Optimizer] = kind
    return found
