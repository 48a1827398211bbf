"""Callbacks from words of the command line: `ScaleEqualization,GammaDecay(policy='all')`."""

from __future__ import annotations

__all__ = ["CallbackWord", "parse_callbacks"]

import ast
import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from pl_normkit import callbacks as own_callbacks
from pl_normkit.errors import ConfigError, nearest

_FORM = 'write names with literal arguments: --with "StochasticPooling(keep=0.5),DropoutPlacement"'


@dataclass(frozen=True)
class CallbackWord:
    """A callback class with the arguments to build it.

    Attributes:
        text: the words it was read from, spaced in one way.
        kind: the class.
        arguments: by position.
        options: by name.
    """

    text: str
    kind: type[pl.Callback]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def build(self) -> pl.Callback:
        """A new callback. Raises what its constructor raises."""
        return self.kind(*self.arguments, **self.options)


def parse_callbacks(text: str) -> list[CallbackWord]:
    """Callbacks of `pl_normkit.callbacks` by name, others by their import path; nothing in `text` is evaluated but literals.

    Raises ConfigError for text of another form, an unknown name or arguments that the class does not take.
    """
    try:
        nodes = ast.parse(f"[{text}]", mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ConfigError("--with cannot be read", where=text, evidence=str(error), mend=_FORM) from error
    elements = nodes.elts if isinstance(nodes, ast.List) else []
    if not elements:
        raise ConfigError("--with names no callback", where=text, mend=_FORM)
    return [_parse_one(node) for node in elements]


def _parse_one(node: ast.expr) -> CallbackWord:
    text = ast.unparse(node)
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    kind = _find_class(ast.unparse(call.func))
    try:
        arguments = tuple(ast.literal_eval(argument) for argument in call.args)
        options = {keyword.arg or "**": ast.literal_eval(keyword.value) for keyword in call.keywords}
    except ValueError as error:
        raise ConfigError("an argument of a callback is not a literal", where=text, evidence=str(error), mend=_FORM) from error
    signature = inspect.signature(kind)
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        taken = list(signature.parameters)
        hints = (nearest(name, taken) for name in options if name not in taken)
        mend = next((hint for hint in hints if hint), "") or f"it takes {', '.join(taken) or 'no arguments'}"
        raise ConfigError(f"{kind.__name__} does not take these arguments", where=text, evidence=str(error), mend=mend) from error
    return CallbackWord(text, kind, arguments, options)


def _find_class(path: str) -> type[pl.Callback]:
    module_name, _, name = path.rpartition(".")
    if not module_name:
        if name not in own_callbacks.__all__:
            hint = nearest(name, own_callbacks.__all__)
            known = f"one of {', '.join(own_callbacks.__all__)}, or the import path of a callback of your own"
            raise ConfigError(f"there is no callback {name!r}", where="--with", mend=f"{hint} {known}".strip())
        found: Any = getattr(own_callbacks, name)
    else:
        try:
            found = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError) as error:
            mend = "write its import path: package.module.ClassName"
            raise ConfigError(f"there is no callback {path!r}", where="--with", evidence=str(error), mend=mend) from error
    if not (isinstance(found, type) and issubclass(found, pl.Callback)):
        raise ConfigError(f"{path} is no callback class", where="--with", evidence=repr(found), mend=_FORM)
    return found
