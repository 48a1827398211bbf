"""What this room adds to the command line: `pl-normkit profile`."""

from __future__ import annotations

__all__: list[str] = []

import argparse
import warnings
from pathlib import Path

import torch

from pl_normkit.commands import command
from pl_normkit.methods.depth_profile.measure import measure_depth_profile
from pl_normkit.specs import build_model, parse_inputs


@command(
    "profile",
    "measure the residual stream of a model over its depth, on made-up inputs",
    {
        "model": {"help": "timm:NAME, smp:ARCHITECTURE, torchvision:NAME or package.module:builder (which may load weights)"},
        "--input": {"action": "append", "default": [], "metavar": "SHAPE", "help": "without the batch: 3,224,224 or 128:int64"},
        "--seed": {"type": int, "default": 0, "metavar": "N", "help": "of the model's initialization"},
        "--eval": {"action": "store_true", "help": "in eval mode, without dropout; default: the mode the builder gives"},
        "--json": {"action": "store_true", "help": "print JSON instead of a table"},
        "--out": {"type": Path, "metavar": "FILE", "help": "PNG to write, a panel a measure"},
    },
)
def _profile(options: argparse.Namespace) -> int:
    torch.manual_seed(options.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_model(options.model, device="cpu")
    if options.eval:
        model.eval()
    profile = measure_depth_profile(model, parse_inputs(options.input, model, device="cpu"))
    if options.out is not None:
        profile.plot(options.out)
    print(profile.to_json() if options.json else profile)  # noqa: T201
    return 0
