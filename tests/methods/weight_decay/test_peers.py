"""The sets of other libraries, compared with what those libraries make of the same model."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
import timm.optim
import torch
import transformers
from torch import nn

from pl_normkit.methods.weight_decay import param_groups
from tests.methods.weight_decay.models import build

TIMM = [
    "resnet18",
    "resnetv2_50",
    "convnext_atto",
    "convnextv2_atto",
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "mixer_s32_224",
    "maxvit_nano_rw_256",
    "efficientnet_b0",
    "mobilevit_xxs",
    "levit_128s",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "volo_d1_224",
    "coat_tiny",
    "pvt_v2_b0",
]
OTHERS = [
    "tv:resnet18",
    "tv:swin_t",
    "tv:vit_b_16",
    "tv:efficientnet_b0",
    "smp:Unet",
    "hf:bert",
    "hf:roberta",
    "hf:t5",
    "hf:gpt2",
    "hf:llama",
    "hf:vit",
]
SPECS = [*(f"timm:{name}" for name in TIMM), *OTHERS]


def decayed_by(model: nn.Module, groups: list[dict[str, Any]]) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for group in groups if group["weight_decay"] for parameter in group["params"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("spec", SPECS)
def test_the_sets_are_those_of_the_library(spec: str) -> None:
    model = build(spec)[0]
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    by_timm = timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=spared)
    by_transformers = set(transformers.Trainer.get_decay_parameter_names(None, model)) & {name for name, _ in model.named_parameters()}
    by_ndim = {name for name, parameter in model.named_parameters() if parameter.dim() >= 2}  # nanoGPT's line

    assert {
        "timm": decayed_by(model, by_timm),
        "transformers": by_transformers,
        "ndim": by_ndim,
    } == {peer: decayed_by(model, param_groups(model, 0.05, policy=peer)) for peer in ("timm", "transformers", "ndim")}


def test_thirty_models_are_compared() -> None:
    assert len(set(SPECS)) >= 30


def test_the_list_of_a_model_counts_inside_a_module_too() -> None:
    network = build("timm:vit_tiny_patch16_224")[0]
    module = nn.ModuleDict({"net": network, "head": nn.Linear(4, 2)})
    inside = decayed_by(module, param_groups(module, 0.05, policy="timm"))
    alone = decayed_by(network, param_groups(network, 0.05, policy="timm"))

    assert inside == {f"net.{name}" for name in alone} | {"head.weight"}
    assert not [name for name in alone if fnmatch.fnmatch(name, "*_token") or name == "pos_embed"]


def test_a_rule_of_another_library_takes_overrides_and_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("pl_normkit.graph.ModelGraph.from_model")
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    groups = param_groups(model, 0.1, torch.zeros(2, 4), policy="ndim", overrides={"1.weight": 0.5})

    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.05, 1), (0.0, 2)]
