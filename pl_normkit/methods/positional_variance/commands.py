"""What this room adds to the command line: `lint --loaders`."""

from __future__ import annotations

__all__: list[str] = []

import argparse
from typing import Any

from torch import nn

from pl_normkit.commands import lint_part
from pl_normkit.errors import ConfigError
from pl_normkit.importing import import_object
from pl_normkit.rules import Loaders

_HELP = "a function without arguments that returns (training loader, evaluation loader), with a list of what changes batches later as third"


@lint_part({"--loaders": {"metavar": "MODULE:NAME", "help": _HELP}})
def _fill_loaders(options: argparse.Namespace, model: nn.Module | None) -> dict[str, Any]:
    if model is None:
        raise ConfigError("loaders are judged for a model", mend="name one: pl-normkit lint timm:vit_small_patch16_224 --loaders ...")
    make = import_object(options.loaders)
    try:
        found = make()
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"--loaders {options.loaders} failed", evidence=what, mend="name a function without arguments") from error
    if not isinstance(found, (Loaders, tuple)) or (isinstance(found, tuple) and len(found) not in (2, 3)):
        raise ConfigError(
            f"--loaders {options.loaders} gives no loaders", evidence=f"a {type(found).__name__}", mend="return (train_loader, val_loader)"
        )
    return {"loaders": found if isinstance(found, Loaders) else Loaders(*found)}
