"""From a model specification of the command line to the module."""

from __future__ import annotations

__all__ = ["build_model", "read_spec"]

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import nn

from pl_normkit.errors import ModelSpecError, nearest
from pl_normkit.importing import import_library, import_object, users_code

_FORMS = (
    "timm:NAME, smp:ARCHITECTURE, torchvision:NAME, transformers:CLASS, diffusers:CLASS, hf:PATH/config.json "
    "or package.module:BUILDER, each with ?argument=value&..."
)


def build_model(spec: str, *, device: str = "meta") -> nn.Module:
    """The model that `spec` names, without weights.

    Args:
        spec: `timm:resnet50`, `smp:Unet?encoder_name=resnet18`, `torchvision:resnet50`, `transformers:BertModel` (a class, built from
            its default configuration), `hf:folder/config.json` (the class that a configuration names), `diffusers:UNet2DModel` or
            `package.module:builder`, where the builder is a function, a class or a module. `?name=value&...` gives keyword
            arguments (Python literals), for transformers of the configuration.
        device: where to build it; a model that cannot be built on the meta device is built on the CPU.

    Raises:
        ModelSpecError: when the spec, the package or the model does not exist, or the builder fails.
    """
    source, name, arguments = read_spec(spec)
    build = _LIBRARIES.get(source, _from_import)
    construct = build(source, name, arguments)
    with users_code(f"{spec!r} cannot be built", fix="check the arguments"):
        model = _construct(construct, device)
    if not isinstance(model, nn.Module):
        raise ModelSpecError(
            f"{spec!r} gives no torch.nn.Module", evidence=f"a {type(model).__name__}", fix="name a builder that returns a module"
        )
    return model


def read_spec(spec: str) -> tuple[str, str, dict[str, Any]]:
    """Source, name and arguments that `spec` is made of. Raises ModelSpecError."""
    head, _, query = spec.partition("?")
    source, colon, name = head.partition(":")
    if not colon or not source or not name:
        raise ModelSpecError(f"{spec!r} is no model specification", fix=f"write {_FORMS}")
    return source, name, {key: _literal(value) for key, value in parse_qsl(query, keep_blank_values=True)}


def _construct(construct: Callable[[], Any], device: str) -> Any:
    try:
        with torch.device(device):
            return _on_one_device(construct(), device)
    except (RuntimeError, NotImplementedError) as error:
        if device != "meta" or "meta" not in str(error).lower():
            raise
    with torch.device("cpu"):
        return construct()


def _on_one_device(model: Any, device: str) -> Any:
    """The model with the parameters that know no default device (`torch.Tensor(sizes)`) beside the others."""
    if device == "meta" and isinstance(model, nn.Module) and len({parameter.device for parameter in model.parameters()}) > 1:
        return model.to(device)
    return model


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that literal_eval documents
        return text


def _from_timm(_: str, name: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    timm = import_library("timm", "timm")
    if not timm.is_model(name):
        raise ModelSpecError(f"timm has no model {name!r}", fix=nearest(name, timm.list_models()) or "see timm.list_models()")
    return lambda: timm.create_model(name, **arguments)


def _from_smp(_: str, name: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    smp = import_library("segmentation_models_pytorch", "segmentation-models-pytorch")
    architectures = {kind.__name__.lower(): kind.__name__ for kind in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    if name.lower() not in architectures:
        raise ModelSpecError(
            f"segmentation_models_pytorch has no architecture {name!r}",
            fix=nearest(name, architectures.values()) or ", ".join(architectures.values()),
        )
    return lambda: smp.create_model(name.lower(), **{"encoder_weights": None, **arguments})


def _from_torchvision(_: str, name: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    models = import_library("torchvision.models", "torchvision")
    if name not in models.list_models():
        raise ModelSpecError(
            f"torchvision has no model {name!r}", fix=nearest(name, models.list_models()) or "see torchvision.models.list_models()"
        )
    taken = inspect.signature(models.get_model_builder(name)).parameters
    no_weights = {option: None for option in ("weights", "weights_backbone") if option in taken}
    return lambda: models.get_model(name, **{**no_weights, **arguments})


def _from_transformers(_: str, name: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    kind = _find_class("transformers", name, "config_class")
    return lambda: kind(kind.config_class(**arguments))


def _from_configuration(_: str, name: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    transformers = import_library("transformers", "transformers")
    path = Path(name)
    if not path.exists():
        raise ModelSpecError(f"there is no configuration {name!r}", fix="give the path of a config.json or of the folder that holds it")
    with users_code(f"the configuration {name!r} cannot be read", fix="give a config.json with a model_type that transformers knows"):
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, **arguments)
    named = next(iter(config.architectures or ()), None)
    if named is None:
        return lambda: transformers.AutoModel.from_config(config)
    kind = _find_class("transformers", named, "config_class")
    return lambda: kind(config)


def _from_diffusers(_: str, name: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    kind = _find_class("diffusers", name, "forward")
    return lambda: kind(**arguments)


_NO_MODEL = re.compile("Config$|Processor|Tokenizer|Pipeline|Output$")


def _find_class(library: str, name: str, attribute: str) -> Any:
    """The class of that name, which has an attribute that its models have. Raises ModelSpecError."""
    module = import_library(library, library)
    with users_code(f"{library}:{name} cannot be imported", fix=f"install what {library} needs for it"):
        found = getattr(module, name, None)
    if not isinstance(found, type) or getattr(found, attribute, None) is None:
        names = [
            word
            for word in dir(module)
            if word[:1].isupper() and not word.isupper() and not word.endswith(("Config", "Processor", "Tokenizer", "Pipeline"))
        ]
        raise ModelSpecError(f"{library} has no model class {name!r}", fix=nearest(name, names) or f"name a class of {library}")
    return found


def _from_import(source: str, name: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    found = import_object(f"{source}:{name}")
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise ModelSpecError(
            f"{source}:{name} is no builder", evidence=f"a {type(found).__name__}", fix="name a function, a class or a module"
        )
    return lambda: found(**arguments)


_LIBRARIES: dict[str, Callable[[str, str, dict[str, Any]], Callable[[], Any]]] = {
    "timm": _from_timm,
    "smp": _from_smp,
    "torchvision": _from_torchvision,
    "transformers": _from_transformers,
    "hf": _from_configuration,
    "diffusers": _from_diffusers,
}
