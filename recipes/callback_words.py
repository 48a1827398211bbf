"""Callbacks from words of the command line: `ScaleEqualization,GammaDecay(policy='all')`."""

from __future__ import annotations

__all__ = ["CallbackWord", "parse_callbacks"]

import inspect
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from pl_normkit import callbacks as own_callbacks
from pl_normkit.errors import ConfigError, nearest
from pl_normkit.importing import LiteralCall, import_dotted, literal_calls

_FORM = 'write names with literal arguments: --with "StochasticPooling(keep=0.1),DropoutPlacement"'


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
        calls = literal_calls(text)
    except SyntaxError as error:
        raise ConfigError("--with cannot be read", where=text, evidence=str(error), fix=_FORM) from error
    except ValueError as error:
        raise ConfigError("an argument of a callback is not a literal", where=text, evidence=str(error), fix=_FORM) from error
    if not calls:
        raise ConfigError("--with names no callback", where=text, fix=_FORM)
    return [_word_of(call) for call in calls]


def _word_of(call: LiteralCall) -> CallbackWord:
    kind = _find_class(call.path)
    text, arguments, options = call.text, call.arguments, call.options
    signature = inspect.signature(kind)
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        taken = list(signature.parameters)
        hints = (nearest(name, taken) for name in options if name not in taken)
        fix = next((hint for hint in hints if hint), "") or f"it takes {', '.join(taken) or 'no arguments'}"
        raise ConfigError(f"{kind.__name__} does not take these arguments", where=text, evidence=str(error), fix=fix) from error
    return CallbackWord(text, kind, arguments, options)


def _find_class(path: str) -> type[pl.Callback]:
    if "." not in path and path not in own_callbacks.__all__:
        hint = nearest(path, own_callbacks.__all__)
        known = f"one of {', '.join(own_callbacks.__all__)}, or the import path of a callback of your own"
        raise ConfigError(f"there is no callback {path!r}", where="--with", fix=f"{hint} {known}".strip())
    try:
        found = import_dotted(path, own_callbacks.__name__)
    except (ImportError, AttributeError) as error:
        fix = "write its import path: package.module.ClassName"
        raise ConfigError(f"there is no callback {path!r}", where="--with", evidence=str(error), fix=fix) from error
    if not (isinstance(found, type) and issubclass(found, pl.Callback)):
        raise ConfigError(f"{path} is no callback class", where="--with", evidence=repr(found), fix=_FORM)
    return found
