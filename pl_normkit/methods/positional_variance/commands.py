"""What this room adds to the command line: `lint --loaders`."""

from __future__ import annotations

__all__: list[str] = []

import argparse
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import nn

from pl_normkit.commands import lint_part
from pl_normkit.errors import ConfigError, DataError
from pl_normkit.importing import import_object, users_code
from pl_normkit.rules import Loaders

_HELP = "a function without arguments that returns (training loader, evaluation loader), with a list of what changes batches later as third"


@lint_part({"--loaders": {"metavar": "MODULE:NAME", "help": _HELP}})
def _fill_loaders(options: argparse.Namespace, model: nn.Module | None) -> dict[str, Any]:
    if model is None:
        raise ConfigError("loaders are judged for a model", fix="name one: pl-normkit lint timm:vit_small_patch16_224 --loaders ...")
    make = import_object(options.loaders)
    with users_code(f"--loaders {options.loaders} failed", fix="name a function without arguments", kind=ConfigError):
        found = make()
    if not isinstance(found, (Loaders, tuple)) or (isinstance(found, tuple) and len(found) not in (2, 3)):
        raise ConfigError(
            f"--loaders {options.loaders} gives no loaders", evidence=f"a {type(found).__name__}", fix="return (train_loader, val_loader)"
        )
    loaders = found if isinstance(found, Loaders) else Loaders(*found)
    train = _tried(loaders.train, f"the training loader of --loaders {options.loaders}")
    return {
        "loaders": replace(
            loaders, train=train, evaluation=_tried(loaders.evaluation, f"the evaluation loader of --loaders {options.loaders}")
        )
    }


def _tried(loader: Any, what: str) -> Any:
    """The loader, after its first batch was drawn: one that gives none would be judged by nothing. Raises DataError."""
    if loader is None:
        return None
    fix = "let it give batches as in training"
    with users_code(f"{what} gave no batch", fix=fix, kind=DataError):
        batches = iter(loader)
        for first in batches:
            return chain([first], batches) if batches is loader else loader
    raise DataError(f"{what} gave no batch", evidence=f"an empty {type(loader).__name__}", fix=fix)
