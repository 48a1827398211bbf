"""Build any timm classifier; whatever keeps one from being built is one error."""

from __future__ import annotations

__all__ = ["build_network", "warn_normalization"]

import warnings
from typing import Any

import timm
from torch import nn

from pl_normkit.errors import ModelSpecError, NormkitWarning, nearest
from pl_normkit.recipes.vit.samples import Normalization


def build_network(
    name: str, num_classes: int, *, image_size: int, in_chans: int = 3, pretrained: bool = False, drop_path: float = 0.0, **options: Any
) -> nn.Module:
    """Network of timm from images (N, in_chans, image_size, image_size) to logits (N, num_classes).

    Args:
        name: a timm model, with or without the tag of its weights.
        num_classes: logits.
        image_size: side of the images in pixels; networks that fix it (ViTs) are built for it.
        in_chans: channels of the images.
        pretrained: take timm's weights, which are downloaded unless they are in the cache.
        drop_path: largest probability of dropping a residual branch (stochastic depth).
        options: further arguments of `timm.create_model`, such as `patch_size`.

    Raises ModelSpecError for an unknown name or tag, weights that cannot be had, or options the model does not take.
    """
    _check_name(name)
    settings: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans, **options}
    if drop_path:
        settings["drop_path_rate"] = drop_path
    sized = {"img_size": image_size, **settings}
    try:
        try:
            network: nn.Module = timm.create_model(name, pretrained=pretrained, **sized)
        except TypeError as error:
            if "unexpected keyword argument 'img_size'" not in str(error):
                raise
            network = timm.create_model(name, pretrained=pretrained, **settings)
    except Warning:  # raised where a user makes warnings errors; no reason to call the network impossible
        raise
    except Exception as error:
        raise _explain(error, name, pretrained, sized) from error
    return network


def _check_name(name: str) -> None:
    bare, _, tag = name.partition(".")
    if not timm.is_model(bare):
        mend = nearest(bare, timm.list_models()) or "see timm.list_models()"
        raise ModelSpecError(f"timm has no model {bare!r}", where=f"--model.name {name}", mend=mend)
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{bare}.*")]
    if tag and tag not in tags:
        raise ModelSpecError(
            f"timm has no weights {tag!r} of {bare}",
            where=f"--model.name {name}",
            mend=f"{nearest(tag, tags)} One of: {', '.join(tags)}".strip() if tags else f"leave the tag away: {bare}",
        )


def _explain(error: Exception, name: str, pretrained: bool, settings: dict[str, Any]) -> ModelSpecError:
    evidence = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if pretrained and isinstance(error, OSError):
        return ModelSpecError(
            f"the weights of {name} are neither in the cache nor can they be downloaded",
            where="--model.pretrained true",
            evidence=evidence,
            mend="set --model.pretrained false, fill the Hugging Face cache (HF_HOME) on a machine with network, "
            "or give a file: --model.options.pretrained_cfg_overlay '{file: weights.safetensors}'",
        )
    return ModelSpecError(
        f"timm cannot build {name}",
        where=", ".join(f"{key}={value}" for key, value in settings.items()),
        evidence=evidence,
        mend="check name, --data.image_size and --model.options; --model.options null takes the model as timm has it",
    )


def warn_normalization(network: nn.Module, normalization: Normalization) -> None:
    """Warn where images are normalized otherwise than those on which timm's weights of `network` were trained."""
    known: dict[str, Any] = getattr(network, "pretrained_cfg", None) or {}
    trained = {name: tuple(known.get(name) or ()) for name in ("mean", "std")}
    given = {"mean": normalization.mean, "std": normalization.std}
    if all(len(trained[name]) == len(given[name]) for name in given) and any(
        abs(own - other) > 1e-3 for name in given for own, other in zip(given[name], trained[name], strict=True)
    ):
        options = " ".join(f"--data.{name} {list(values)}" for name, values in trained.items())
        text = f"the pretrained weights know images normalized otherwise than the data is; give them {options}"
        warnings.warn(text, NormkitWarning, stacklevel=2)
