"""What this adds to the command line: `pl-normkit erf`."""

from __future__ import annotations

__all__: list[str] = []

import argparse
import warnings
from pathlib import Path

from torch import Tensor
from torch.utils._pytree import tree_leaves

from pl_normkit.commands import command
from pl_normkit.errors import ConfigError
from pl_normkit.importing import users_code
from pl_normkit.inputs import parse_inputs
from pl_normkit.receptive_field.images import image_files, read_images, transform_of
from pl_normkit.receptive_field.probe import effective_receptive_field
from pl_normkit.specs import build_model

_FORMS = "timm:NAME?pretrained=True, smp:ARCHITECTURE, torchvision:NAME or package.module:builder (which may load weights)"


@command(
    "erf",
    "measure the effective receptive field of a model and draw it",
    {
        "model": {"help": _FORMS},
        "--images": {"required": True, "type": Path, "metavar": "DIR", "help": "folder of images, searched through with its subfolders"},
        "--out": {"required": True, "type": Path, "metavar": "FILE", "help": "PNG to write"},
        "--input": {"metavar": "C,H,W", "help": "size the images are brought to, such as 3,224,224 (default: the model's own)"},
        "--layer": {
            "metavar": "PATH",
            "help": "module whose output is looked at; default: the logits' map, or the last map before pooling",
        },
        "--position": {"metavar": "Y,X", "help": "cell of that output; default: the middle"},
        "--max-images": {"type": int, "metavar": "N", "help": "take the first N images (default: all)"},
        "--absolute": {"action": "store_true", "help": "take magnitudes of gradients instead of their positive part"},
    },
)
def _erf(options: argparse.Namespace) -> int:
    position = _position(options.position)
    files = image_files(options.images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_model(options.model, device="cpu")
    inputs = parse_inputs([options.input] if options.input else [], model, spec=options.model, device="cpu")
    example = next((leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() == 4), None)
    if example is None:
        raise ConfigError("the model takes no images (C, H, W)", evidence=f"--input {options.input}", fix="write --input 3,224,224")
    transform = transform_of(model, tuple(example.shape[1:]))
    with users_code("the receptive field cannot be measured", fix="check --input, --layer and the model"):
        field = effective_receptive_field(
            model,
            read_images(files, transform),
            options.layer,
            position,
            max_images=options.max_images,
            gradient="absolute" if options.absolute else "positive",
        )
    field.save(options.out)
    print(field)  # noqa: T201
    return 0


def _position(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        y, x = (int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--position {text!r} is no cell", fix="write row and column: --position 7,7") from error
    return y, x
