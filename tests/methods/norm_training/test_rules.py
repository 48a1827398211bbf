"""NK951 fires on selectors that miss norms by their names, in real models, and is quiet where all norms are treated alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from pl_normkit import audit, tune_norms_only

TINY = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 10, "n_positions": 8, "bos_token_id": 0, "eos_token_id": 1}


def resnet() -> nn.Module:
    model: nn.Module = torchvision.models.resnet18(num_classes=2)
    return model


def by_name(model: nn.Module, words: tuple[str, ...]) -> list[dict[str, object]]:
    chosen = [parameter for name, parameter in model.named_parameters() if any(word in name for word in words)]
    others = [parameter for name, parameter in model.named_parameters() if not any(word in name for word in words)]
    return [{"params": others, "weight_decay": 0.1}, {"params": chosen, "weight_decay": 0.0}]


def found(model: nn.Module, groups: object) -> set[str]:
    report = audit(model, optimizers=[torch.optim.SGD(groups, 0.1)], select=["NK951"])
    assert not report.notes
    return {place.module for finding in report.findings for place in finding.places}


def test_a_selector_by_name_misses_the_shortcuts_of_resnet() -> None:
    model = resnet()
    assert found(model, by_name(model, ("bn", "norm"))) == {f"layer{i}.0.downsample.1.weight" for i in (2, 3, 4)}


@pytest.mark.parametrize(
    ("build", "words", "expected"),
    [
        (resnet, ("bn", "norm", "downsample.1"), set()),
        (resnet, ("nothing",), set()),
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, num_heads=2, depth=1), ("norm",), set()),
        (lambda: transformers.GPT2Model(transformers.GPT2Config(**TINY)), ("norm",), set()),
    ],
)
def test_norms_that_are_treated_alike(build: Callable[[], nn.Module], words: tuple[str, ...], expected: set[str]) -> None:
    model = build()
    assert found(model, by_name(model, words)) == expected


def test_tuning_norms_by_type_is_quiet_and_by_name_is_not() -> None:
    model = resnet()
    tune_norms_only(model)
    assert found(model, [parameter for parameter in model.parameters() if parameter.requires_grad]) == set()
    model = resnet()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bn" in name)
    assert found(model, [parameter for parameter in model.parameters() if parameter.requires_grad]) == {
        f"layer{i}.0.downsample.1.weight" for i in (2, 3, 4)
    }
