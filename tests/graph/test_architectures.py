"""What a model is made of, counted by hand from its source, against what the graph names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

from pl_normkit.graph import Kind, ModelGraph
from tests.graph.networks import (
    AttentionBlock,
    Block,
    Classifier,
    Counting,
    Decoder,
    Down,
    Hierarchy,
    MixedRegions,
    Rotary,
    Shortcut,
    TiedLanguageModel,
    TwoClassifiers,
    TwoStreams,
    state_of,
    structure,
)

IMAGE = torch.zeros(2, 3, 16, 16)
FEATURES = torch.zeros(2, 8, 16, 16)


def _shared_block() -> nn.Module:
    block = Block()
    return Classifier(block, block, block)


# Counts by hand. Classifier: one stem norm, one head, one dropout. Block: two norms, one identity addition. Down: three
# norms (one on the shortcut), one projection addition. AttentionBlock: two layer norms, two identity additions.
TOYS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, int]]] = {
    "in place": (
        lambda: Classifier(Block(), Down(8, 16), Block(16), width=16),
        IMAGE,
        {"identity adds": 2, "projection adds": 1, "batch norms": 8, "heads": 1, "dropouts": 1},
    ),
    "shared block, run three times": (_shared_block, IMAGE, {"identity adds": 3, "batch norms": 7, "heads": 1, "dropouts": 1}),
    "checkpointed blocks": (
        lambda: Classifier(Block(inplace=False), Down(8, 16), width=16, checkpointed=True),
        IMAGE,
        {"identity adds": 1, "projection adds": 1, "batch norms": 6, "heads": 1, "dropouts": 1},
    ),
    "SyncBatchNorm": (
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(Classifier(Block())),
        IMAGE,
        {"identity adds": 1, "batch norms": 3, "heads": 1, "dropouts": 1},
    ),
    "group and instance norms": (
        lambda: nn.Sequential(Block(norm=lambda c: nn.GroupNorm(2, c)), Block(norm=nn.InstanceNorm2d)),
        torch.zeros(2, 8, 16, 16),
        {"identity adds": 2, "group norms": 2, "instance norms": 2},
    ),
    "tied weights": (
        TiedLanguageModel,
        torch.zeros(2, 7, dtype=torch.long),
        {"identity adds": 2, "layer norms": 3, "attentions": 1},
    ),
    "attention written out": (
        lambda: AttentionBlock(fused=False),
        torch.zeros(2, 7, 16),
        {"identity adds": 2, "layer norms": 2, "attentions": 1},
    ),
    "dict of a tensor and a tuple in, dict with a tuple out": (
        TwoStreams,
        {"image": IMAGE, "affine": (torch.ones(8, 1, 1), torch.zeros(8, 1, 1))},
        {"identity adds": 1, "batch norms": 3, "fusions": 1},
    ),
    "autocast and no_grad regions": (MixedRegions, IMAGE, {"identity adds": 3, "batch norms": 7}),
    "rotary embedding": (Rotary, torch.zeros(2, 7, 8), {}),
    "cascade over slices": (Hierarchy, torch.zeros(2, 12, 8, 8), {"fusions": 3}),
    "cross attention": (Decoder, (torch.zeros(2, 7, 8), torch.zeros(2, 5, 8)), {"identity adds": 1, "attentions": 1}),
    "batch norm on the shortcut": (lambda: Shortcut(nn.BatchNorm2d(8)), FEATURES, {"identity adds": 1, "batch norms": 4}),
    "pre-activation on the shortcut": (
        lambda: Shortcut(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))),
        FEATURES,
        {"projection adds": 1, "batch norms": 4},
    ),
    "separable shortcut": (
        lambda: Shortcut(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))),
        FEATURES,
        {"projection adds": 1, "batch norms": 4},
    ),
    "activation behind the shortcut's layer": (
        lambda: Shortcut(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())),
        FEATURES,
        {"fusions": 1, "batch norms": 3},
    ),
    "two classifiers averaged": (TwoClassifiers, IMAGE, {"batch norms": 1, "heads": 2, "dropouts": 1, "fusions": 1}),
    "forward that keeps state": (Counting, torch.zeros(2, 8, 4, 4), {"identity adds": 1, "batch norms": 2}),
}


@pytest.mark.parametrize("name", TOYS)
def test_toy_structure_is_as_counted_by_hand(name: str) -> None:
    build, example_inputs, expected = TOYS[name]
    assert structure(build(), example_inputs) == expected


# (identity, projection) additions, norms, heads and attention by hand from the variants' depths and blocks:
#   resnet18        4 stages of 2 blocks, stages 2-4 start with a projection; bn: stem 1 + 8*2 + 3
#   resnet50        16 bottlenecks, each of 4 stages starts with a projection; bn: stem 1 + 16*3 + 4
#   wide_resnet50_2 as resnet50
#   densenet121     no addition; bn: stem 1 + 58 layers*2 + 3 transitions + 1; 58 layers and 4 block ends concatenate
#   efficientnet_b0 repeats 1,2,2,3,3,4,1: all but the first of a stage add; bn: stem 1 + 2 + 15*3 + head 1
#   regnetx_002     depths 1,1,4,7; each stage starts with a projection; bn: stem 1 + 13*3 + 4
#   convnext_atto   12 blocks; ln: stem 1 + 12 + 3 downsamplings + head 1
#   vit_tiny        12 blocks of attention and MLP; class token, so no pooled head; ln: 24 + 1
#   swin_tiny       12 blocks; ln: patches 1 + 24 + 3 mergings + 1
#   mixer_s16       8 blocks of token and channel MLP; ln: 16 + 1
#   Unet            encoder resnet18 without head; bn: 20 + 5 decoder blocks*2; 4 skips concatenate
ARCHITECTURES: dict[str, dict[str, int]] = {
    "resnet18": {"identity adds": 5, "projection adds": 3, "batch norms": 20, "heads": 1},
    "resnet50": {"identity adds": 12, "projection adds": 4, "batch norms": 53, "heads": 1},
    "densenet121": {"batch norms": 121, "heads": 1},
    "efficientnet_b0": {"identity adds": 9, "batch norms": 49, "heads": 1},
    "regnetx_002": {"identity adds": 9, "projection adds": 4, "batch norms": 44, "heads": 1},
    "convnext_atto": {"identity adds": 12, "layer norms": 17, "heads": 1},
    "vit_tiny_patch16_224": {"identity adds": 24, "layer norms": 25, "attentions": 12},
    "swin_tiny_patch4_window7_224": {"identity adds": 24, "layer norms": 29, "attentions": 12, "heads": 1},
    "mixer_s16_224": {"identity adds": 16, "layer norms": 17, "heads": 1},
}
NAMED = ("identity adds", "projection adds", "batch norms", "layer norms", "heads", "attentions")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_timm_structure_is_as_counted_by_hand(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    counts = structure(model, torch.zeros(2, 3, 224, 224, device="meta"))

    assert {key: counts[key] for key in NAMED if key in counts} == ARCHITECTURES[name]


def test_unet_skips_are_fusions_and_its_encoder_is_residual() -> None:
    with torch.device("meta"):
        model = smp.Unet("resnet18", encoder_weights=None)

    expected = {"identity adds": 5, "projection adds": 3, "batch norms": 30, "fusions": 4}
    assert structure(model, torch.zeros(2, 3, 64, 64, device="meta")) == expected


def test_compiled_module_is_read_through_to_the_original() -> None:
    model = Classifier(Block())
    expected = structure(model, IMAGE)

    assert structure(torch.compile(model, backend="eager"), IMAGE) == expected


def test_model_with_compiled_part_is_read() -> None:
    model = Classifier(Block())
    expected = structure(model, IMAGE)
    model.blocks[0].compile(backend="eager")

    assert structure(model, IMAGE) == expected


def test_state_comparison_sees_every_kind_of_change() -> None:
    model = Counting()
    before = state_of(model)
    changes: list[Callable[[], object]] = [
        model.eval,
        lambda: setattr(model, "calls", 1),
        lambda: model.seen.add_(1),
        lambda: model.block.first[0].weight.requires_grad_(False),
        lambda: torch.rand(1),
    ]
    for change in changes:
        change()
        after = state_of(model)
        assert after != before
        before = after


def test_module_of_shared_and_tied_parts_is_the_first_name() -> None:
    graph = ModelGraph.from_model(TiedLanguageModel(), torch.zeros(2, 7, dtype=torch.long))
    weights = [node for node in graph.nodes if node.kind is Kind.WEIGHT]

    assert (weights[0].parameters, weights[-1].parameters) == (("embedding.weight",), ("embedding.weight",))
    assert (weights[0].module, weights[-1].module) == ("embedding", "output")


class Routed(nn.Module):
    """Hands the tokens that a gate chooses to a layer: how many is known only once values are."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.expert = nn.Linear(8, 1), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = torch.nonzero(self.gate(x).flatten() > 0).flatten()
        return x.index_add(0, chosen, self.expert(x[chosen]).relu())


def test_sizes_that_depend_on_values_are_numbers() -> None:
    graph = ModelGraph.from_model(Routed(), torch.zeros(6, 8))
    assert {type(size) for node in graph.nodes for size in node.shape} == {int}
    assert [node.shape[1:] for node in graph.nodes if node.module == "expert"] == [(8,)]


class Aliased(nn.Module):
    """One block under two names, called by the second (monai's DynUNet builds its skip layers so)."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.wrapper = nn.Sequential(self.block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wrapper(x)


def test_module_reached_under_an_alias_is_named_as_named_modules_does() -> None:
    model = Aliased()
    known = dict(model.named_modules())

    assert {node.module for node in ModelGraph.from_model(model, FEATURES).nodes if node.module} <= set(known)
