"""Build any timm classifier; whatever keeps one from being built is one error."""

from __future__ import annotations

__all__ = ["DROP_PATH", "build_network", "build_with_settings"]

import re
from typing import Any

import timm
from torch import nn

from pl_normkit.errors import ModelSpecError, nearest

DROP_PATH = 0.1
"""The largest probability of dropping a branch, where none is given."""


def build_network(
    name: str,
    num_classes: int,
    *,
    image_size: int,
    in_chans: int = 3,
    pretrained: bool = False,
    drop_path: float | None = None,
    **options: Any,
) -> nn.Module:
    """Network of timm from images (N, in_chans, image_size, image_size) to logits (N, num_classes).

    Args:
        name: a timm model, with or without the tag of its weights.
        num_classes: logits.
        image_size: side of the images in pixels; networks that fix it (ViTs) are built for it.
        in_chans: channels of the images.
        pretrained: take timm's weights, which are downloaded unless they are in the cache.
        drop_path: largest probability of dropping a residual branch (stochastic depth); None is 0.1 where the network has it.
        options: further arguments of `timm.create_model`, such as `patch_size`.

    Raises ModelSpecError for an unknown name or tag, weights that cannot be had, or options the model does not take.
    """
    return build_with_settings(
        name, num_classes, image_size=image_size, in_chans=in_chans, pretrained=pretrained, drop_path=drop_path, **options
    )[0]


def build_with_settings(
    name: str,
    num_classes: int,
    *,
    image_size: int,
    in_chans: int = 3,
    pretrained: bool = False,
    drop_path: float | None = None,
    **options: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """As `build_network`, with the arguments that `timm.create_model` was given after the name and `pretrained`."""
    _check_name(name)
    settings: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    wishes: dict[str, Any] = {"img_size": image_size}
    if drop_path is None:
        wishes["drop_path_rate"] = DROP_PATH
    elif drop_path:
        settings["drop_path_rate"] = drop_path
    settings |= options
    try:
        return _create(name, pretrained, settings, wishes)
    except Warning:  # raised where a user makes warnings errors; no reason to call the network impossible
        raise
    except Exception as error:
        raise _explain(error, name, pretrained, {**wishes, **settings}) from error


def _create(name: str, pretrained: bool, settings: dict[str, Any], wishes: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model with `settings`, and with those of `wishes` that it takes: not every class knows an image size or stochastic depth."""
    while True:
        try:
            taken = {**wishes, **settings}
            return timm.create_model(name, pretrained=pretrained, **taken), taken
        except TypeError as error:
            refused = _read_refused(str(error)) & (wishes.keys() - settings.keys())
            if not refused:
                raise
            wishes = {key: value for key, value in wishes.items() if key not in refused}


def _read_refused(message: str) -> set[str]:
    """Names in Python's "unexpected keyword argument 'a'", and in timm's "unexpected keyword argument(s): ['a', 'b']"."""
    _, found, names = message.partition("unexpected keyword argument")
    return set(re.findall(r"'(\w+)'", names)) if found else set()


def _check_name(name: str) -> None:
    bare, _, tag = name.partition(".")
    if not timm.is_model(bare):
        fix = nearest(bare, timm.list_models()) or "see timm.list_models()"
        raise ModelSpecError(f"timm has no model {bare!r}", where=f"--model.name {name}", fix=fix)
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{bare}.*")]
    if tag and tag not in tags:
        raise ModelSpecError(
            f"timm has no weights {tag!r} of {bare}",
            where=f"--model.name {name}",
            fix=f"{nearest(tag, tags)} One of: {', '.join(tags)}".strip() if tags else f"leave the tag away: {bare}",
        )


def _explain(error: Exception, name: str, pretrained: bool, settings: dict[str, Any]) -> ModelSpecError:
    evidence = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if pretrained and isinstance(error, OSError):
        return ModelSpecError(
            f"the weights of {name} are neither in the cache nor can they be downloaded",
            where="--model.pretrained true",
            evidence=evidence,
            fix="set --model.pretrained false, fill the Hugging Face cache (HF_HOME) on a machine with network, "
            "or give a file: --model.options.pretrained_cfg_overlay '{file: weights.safetensors}'",
        )
    return ModelSpecError(
        f"timm cannot build {name}",
        where=", ".join(f"{key}={value}" for key, value in settings.items()),
        evidence=evidence,
        fix="leave --model.drop_path out, there is no branch to drop"
        if "drop_path_rate" in _read_refused(str(error))
        else "check name, --data.image_size and --model.options; --model.options null takes the model as timm has it",
    )
