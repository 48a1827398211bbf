"""The arms of a comparison: callbacks to add, options to change, arguments to pass; and how the command line words them."""

from __future__ import annotations

__all__ = ["WITHOUT", "Arm", "name_arms", "parse_arms"]

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.callbacks import Callback

from pl_normkit.errors import ConfigError
from pl_normkit.recipes.callback_words import CallbackWord, parse_callbacks

WITHOUT = "without"
"""Name of the arm that has nothing of its own."""

_NAMED = re.compile(r"\s*([A-Za-z_][\w.+-]*)\s*=(?!=)\s*(.*)", re.DOTALL)  # no call can stand before the sign: it has a bracket


@dataclass(frozen=True)
class Arm:
    """What one arm of a comparison has of its own; everything else it shares with the others.

    Attributes:
        callbacks: classes, or functions without arguments, that build a callback for each run.
        module: keyword arguments of the function that builds the module.
        data: keyword arguments of the function that builds the data.
        options: words of the command line.
    """

    callbacks: Sequence[Callable[[], Callback]] = ()
    module: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    options: Sequence[str] = ()

    @property
    def starts_alike(self) -> bool:
        """Whether its module is built in the same way as without it, so that its runs must start from the same weights."""
        return not (self.module or self.data or self.options)


def name_arms(arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """`arms` behind the one without anything. Raises ConfigError where there is none, or a name is taken."""
    if not arms:
        raise ConfigError("there is nothing to compare", fix="name callbacks with --with, or other options with --arm NAME:--option=value")
    if WITHOUT in arms:
        raise ConfigError(f"{WITHOUT!r} is the arm that has nothing of its own", fix="choose another name")
    return {WITHOUT: Arm(), **arms}


def parse_arms(with_words: Iterable[str], option_words: Iterable[str]) -> dict[str, Arm]:
    """Arms from the values of `--with` ("A,B" or "name=A,B") and of `--arm` ("name:--option=value --with=A").

    Raises ConfigError for text of another form, two arms of one name, and what the callbacks' constructors refuse.
    """
    named: list[tuple[str, Arm]] = []
    for name, words in _named_words(with_words):
        named.append((name, Arm(_builders(words))))
    named += map(_read_options, option_words)
    arms: dict[str, Arm] = {}
    for name, arm in named:
        if name in arms:
            raise ConfigError("two arms have one name", evidence=repr(name), fix='name them: --with "a=A(x=1)" --with "b=A(x=2)"')
        arms[name] = arm
    return name_arms(arms)


def _named_words(with_words: Iterable[str]) -> list[tuple[str, list[CallbackWord]]]:
    """The values of `--with` with names: the given one, else the classes, with their arguments where several have the same ones."""
    given = [
        (found[1] if found else "", parse_callbacks(found[2] if found else text))
        for text in with_words
        for found in [_NAMED.fullmatch(text)]
    ]
    classes = Counter("+".join(word.kind.__name__ for word in words) for name, words in given if not name)
    named = []
    for name, words in given:
        short = "+".join(word.kind.__name__ for word in words)
        named.append((name or (short if classes[short] == 1 else "+".join(word.text.removesuffix("()") for word in words)), words))
    return named


def _read_options(text: str) -> tuple[str, Arm]:
    name, colon, rest = text.partition(":")
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise ConfigError("--arm cannot be read", where=text, evidence=str(error)) from error
    if not (colon and name.strip() and words and words[0].startswith("--")):
        raise ConfigError("--arm cannot be read", where=text, fix='write a name and options: --arm "slow:--model.lr=0.001"')
    if any(word.partition("=")[0] == "--seed_everything" for word in words):
        raise ConfigError("a comparison chooses its seeds itself", where=text, fix="give their number with --seeds")
    options: list[str] = []
    callbacks: list[Callable[[], Callback]] = []
    while words:
        word = words.pop(0)
        if word.partition("=")[0] != "--with":
            options.append(word)
            continue
        callbacks += _builders(parse_callbacks(word.partition("=")[2] or (words.pop(0) if words else "")))
    return name.strip(), Arm(callbacks, options=options)


def _builders(words: Sequence[CallbackWord]) -> list[Callable[[], Callback]]:
    for word in words:
        word.build()  # arguments it refuses are said before anything is trained
    return [word.build for word in words]
