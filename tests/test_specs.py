from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pl_normkit.errors import ModelSpecError
from pl_normkit.importing import import_object
from pl_normkit.specs import build_model

USER_MODULE = """
import torch
from torch import nn

net = nn.Linear(2, 3)
number = 7


class Net(nn.Module):
    example_input_array = torch.zeros(4, 5)

    def __init__(self, width=5, bias=True):
        super().__init__()
        self.layer = nn.Linear(width, 2, bias=bias)

    def forward(self, x):
        return self.layer(x)


def build(width=5, bias=True, name="net"):
    model = Net(width, bias)
    model.name = name
    return model


def build_nothing():
    return None


def fails():
    raise ValueError("width must be even\\nsecond line")


def needs_values():
    assert torch.linspace(0, 1, 3).sum().item() > 0
    return Net()


class nested:
    build = staticmethod(build)
"""


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with `userpkg.models`, and imports forgotten afterwards."""
    package = tmp_path / "userpkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in {"userpkg", "broken"}]:
        del sys.modules[name]


def test_libraries_and_user_modules_build_on_meta_without_weights() -> None:
    for spec, kind in [
        ("timm:resnet18", "ResNet"),
        ("smp:Unet?encoder_name=resnet18", "Unet"),
        ("smp:unet?encoder_name=resnet18&classes=4", "Unet"),
        ("torchvision:resnet18", "ResNet"),
        ("torchvision:fcn_resnet50", "FCN"),
        ("userpkg.models:build", "Net"),
        ("userpkg.models:Net", "Net"),
        ("userpkg.models:nested.build", "Net"),
    ]:
        model = build_model(spec)
        assert (type(model).__name__, {parameter.device.type for parameter in model.parameters()}) == (kind, {"meta"})


def test_arguments_are_python_literals_or_words() -> None:
    model = build_model("userpkg.models:build?width=8&bias=False&name=wide", device="cpu")
    assert (model.layer.in_features, model.layer.bias, model.name) == (8, None, "wide")


def test_a_module_is_taken_as_it_is() -> None:
    model = build_model("userpkg.models:net")
    assert model is import_object("userpkg.models:net")


def test_what_cannot_be_built_on_meta_is_built_on_the_cpu() -> None:
    model = build_model("userpkg.models:needs_values")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("spec", "what", "evidence", "fix"),
    [
        ("resnet50", "'resnet50' is no model specification", "", "timm:NAME"),
        (":resnet50", "':resnet50' is no model specification", "", "package.module:BUILDER"),
        ("timm:", "'timm:' is no model specification", "", "timm:NAME"),
        ("", "'' is no model specification", "", "timm:NAME"),
        ("timm:wide_resnet50_22", "timm has no model 'wide_resnet50_22'", "", "did you mean 'wide_resnet50_2'?"),
        ("smp:DeepLabV4", "segmentation_models_pytorch has no architecture 'DeepLabV4'", "", "did you mean 'DeepLabV3'?"),
        ("smp:zzz", "segmentation_models_pytorch has no architecture 'zzz'", "", "Unet"),
        ("torchvision:resnet51", "torchvision has no model 'resnet51'", "", "did you mean 'resnet50'?"),
        ("timm:resnet18?widht=3", "'timm:resnet18?widht=3' cannot be built", "widht", "check the arguments"),
        ("smp:Unet?encoder_name=resnet19", "'smp:Unet?encoder_name=resnet19' cannot be built", "resnet19", "check the arguments"),
        ("nopackage:build", "there is no module 'nopackage'", "", "check the spelling"),
        ("userpkg.modles:build", "there is no module 'userpkg.modles'", "", "check the spelling"),
        ("userpkg.models:biuld", "userpkg.models has no 'biuld'", "", "did you mean 'build'?"),
        ("userpkg.models:number", "userpkg.models:number is no builder", "a int", "name a function"),
        ("userpkg.models:build_nothing", "'userpkg.models:build_nothing' gives no torch.nn.Module", "a NoneType", "returns a module"),
        ("userpkg.models:fails", "'userpkg.models:fails' cannot be built", "ValueError: width must be even", "--debug"),
        ("userpkg.models:build?depth=3", "'userpkg.models:build?depth=3' cannot be built", "TypeError", "check the arguments"),
        ("..models:build", "..models cannot be imported", "TypeError", "check the spelling"),
    ],
)
def test_a_wrong_spec_is_refused(spec: str, what: str, evidence: str, fix: str) -> None:
    with pytest.raises(ModelSpecError) as caught:
        build_model(spec)
    assert (caught.value.what, evidence in caught.value.evidence, fix in caught.value.fix) == (what, True, True)
    assert "second line" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "what", "evidence"),
    [
        ("import no_such_package", "there is no module 'no_such_package'", ""),
        ("raise ValueError('at import')", "broken cannot be imported", "ValueError: at import"),
        ("from torch import nothing_there", "broken cannot be imported", "ImportError: cannot import name 'nothing_there'"),
        ("def (", "broken cannot be imported", "SyntaxError"),
    ],
)
def test_a_user_module_that_fails_to_import_is_named(working_directory: Path, body: str, what: str, evidence: str) -> None:
    (working_directory / "broken.py").write_text(body)
    with pytest.raises(ModelSpecError) as caught:
        build_model("broken:build")
    assert (caught.value.what, evidence in caught.value.evidence) == (what, True)


@pytest.mark.parametrize(
    ("spec", "module", "package"),
    [
        ("timm:resnet18", "timm", "timm"),
        ("smp:Unet", "segmentation_models_pytorch", "segmentation-models-pytorch"),
        ("torchvision:resnet18", "torchvision", "torchvision"),
    ],
)
def test_a_missing_library_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, spec: str, module: str, package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Missing(module), *sys.meta_path])
    with pytest.raises(ModelSpecError) as caught:
        build_model(spec)
    assert caught.value.what == f"there is no module '{module}'"
    assert f"pip install {package}" in caught.value.fix


class _Missing:
    """An importer for which one package is not installed, or fails with `error`."""

    def __init__(self, package: str, error: Exception | None = None) -> None:
        self.package, self.error = package, error

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == self.package:
            raise self.error or ModuleNotFoundError(f"No module named {name!r}", name=self.package)


@pytest.mark.parametrize("spec", ["timm:resnet18", "smp:Unet", "torchvision:resnet18"])
def test_a_torchvision_that_does_not_fit_torch_is_explained(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    """What an import says where torch is a CPU-only build: torchvision's operators were never registered."""

    def import_module(name: str, package: str | None = None) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ModelSpecError) as caught:
        build_model(spec)
    assert caught.value.what == "torchvision does not fit the installed torch"
    assert caught.value.evidence == "operator torchvision::nms does not exist"
    assert "install torch and torchvision together" in caught.value.fix


def test_classes_of_transformers_and_diffusers_are_built_from_their_configurations(working_directory: Path) -> None:
    bert = build_model("transformers:BertModel?num_hidden_layers=1&hidden_size=24&num_attention_heads=2")
    assert (type(bert).__name__, len(bert.encoder.layer), bert.config.hidden_size) == ("BertModel", 1, 24)
    assert all(parameter.is_meta for parameter in bert.parameters())
    (working_directory / "config.json").write_text(
        '{"model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 24}'
    )
    vit = build_model("hf:config.json?num_hidden_layers=1&num_attention_heads=2")
    assert (type(vit).__name__, vit.config.hidden_size) == ("ViTForImageClassification", 24)


@pytest.mark.parametrize(
    ("spec", "what", "fix"),
    [
        ("transformers:BertModl", "transformers has no model class 'BertModl'", "did you mean 'BertModel'?"),
        ("transformers:BertConfig", "transformers has no model class 'BertConfig'", "did you mean 'Bert"),
        ("transformers:BertModel?hidden_size=7", "cannot be built", "check the arguments"),
        ("hf:nothing.json", "there is no configuration 'nothing.json'", "config.json"),
        ("hf:userpkg", "the configuration 'userpkg' cannot be read", "config.json"),
    ],
)
def test_a_class_or_configuration_that_is_none(spec: str, what: str, fix: str) -> None:
    with pytest.raises(ModelSpecError) as caught:
        build_model(spec)
    assert (what in caught.value.what, fix in caught.value.fix) == (True, True), caught.value


def test_the_users_own_module_is_not_looked_for_in_the_registry() -> None:
    with pytest.raises(ModelSpecError) as caught:
        build_model("my_nets.py:build")
    assert ("pip install" in str(caught.value), "no .py" in caught.value.fix) == (False, True)


def test_parameters_that_know_no_default_device_go_with_the_others(working_directory: Path) -> None:
    (working_directory / "userpkg" / "masked.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Masked(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.mask = nn.Parameter(torch.Tensor(3).uniform_())\n        self.layer = nn.Linear(3, 3)\n"
    )
    model = build_model("userpkg.masked:Masked")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
