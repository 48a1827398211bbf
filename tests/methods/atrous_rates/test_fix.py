"""ASPP found by structure and given rates, on toys and on real networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3Decoder
from torch import Tensor, nn
from torch.nn import functional as F

from pl_normkit import audit
from pl_normkit.errors import ConfigError, NormkitWarning, NothingMatchedError
from pl_normkit.methods.atrous_rates import atrous_rates, find_aspps, set_atrous_rates
from pl_normkit.methods.atrous_rates.fix import fit_atrous_rates
from tests.methods.atrous_rates.networks import Toy, rates_of, toy

CODES = ["NK501", "NK502", "NK503"]
FORMS = ["plain", "separable", "grouped", "reduced", "same", "reflect", "circular", "replicate"]


@pytest.mark.parametrize("form", FORMS)
def test_post_hoc_rates_are_the_constructors(form: str) -> None:
    """Bit for bit, with keys and parameter objects kept, again from where it stands, and undone."""
    model, expected = toy((3, 6, 9), form), toy((2, 4, 6), form)
    image = torch.randn(1, 3, 96, 96)
    before, parameters = model(image), {name: id(p) for name, p in model.named_parameters()}
    changes = set_atrous_rates(model, 96)
    assert [change.module for change in changes.made] == [f"branches.{k}.conv" for k in range(3)]
    assert torch.equal(expected(image), model(image))
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert not set_atrous_rates(model, 96)
    assert model.encoder.dilation == (4, 4)
    changes.undo()
    assert torch.equal(before, model(image))
    assert rates_of(model) == [(3, 6, 9)]


@pytest.mark.parametrize("join", ["concat", "sum"])
def test_both_ways_to_join(join: str) -> None:
    model = toy((3, 6, 9), join=join)
    set_atrous_rates(model, 96)
    assert rates_of(model) == [(2, 4, 6)]


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.one, self.three, self.five = (nn.Conv2d(8, 8, k, padding=k // 2) for k in (1, 3, 5))
        self.cascade = nn.Sequential(*(nn.Conv2d(24, 24, 3, padding=d, dilation=d) for d in (2, 4, 8)))

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        return self.cascade(torch.cat([self.one(x), self.three(x), self.five(x)], 1))


def test_other_convolutions_are_no_aspp() -> None:
    """Inception has parallel convolutions of one rate, a cascade has rates that do not stand side by side."""
    assert rates_of(Inception(), 64) == []
    with pytest.raises(NothingMatchedError, match="the model has no ASPP"):
        set_atrous_rates(Inception(), 64)


def test_the_largest_rate_stays_on_its_branch() -> None:
    """Branches may be listed in any order; weights trained at the largest rate keep the largest."""
    model = toy((9, 3, 6))
    set_atrous_rates(model, 96)
    assert [branch.conv.dilation[0] for branch in model.branches] == [6, 2, 4]


def test_a_plain_3x3_beside_three_rates_is_left_alone() -> None:
    model = toy((1, 3, 6, 9))
    for _ in range(2):
        set_atrous_rates(model, 48)  # 6 cells: (1, 2, 3)
        assert [branch.conv.dilation[0] for branch in model.branches] == [1, 1, 2, 3]


def test_four_rates_need_rates() -> None:
    model = toy((2, 4, 6, 8))
    with pytest.raises(NothingMatchedError, match="4 dilated branches, and the rule is for three"):
        set_atrous_rates(model, 96)
    with pytest.raises(NothingMatchedError, match="4 dilated branches, not 3"):
        set_atrous_rates(model, 96, rates=(1, 2, 3))
    set_atrous_rates(model, 96, rates=(1, 3, 5, 7))
    assert [branch.conv.dilation[0] for branch in model.branches] == [1, 3, 5, 7]


@pytest.mark.parametrize("rates", [(6, 3, 9), (3, 3, 3), (0, 1, 2), (1.0, 2.0, 3.0), (), 6])
def test_bad_rates_touch_nothing(rates: Any) -> None:
    model = toy()
    with pytest.raises(ConfigError, match="atrous rates must be rising"):
        set_atrous_rates(model, 96, rates=rates)
    assert rates_of(model) == [(12, 24, 36)]


def test_a_rate_that_is_dead_on_the_crop_is_warned_about() -> None:
    with pytest.warns(NormkitWarning, match=r"atrous rate 12 of branches\.2\.conv is dead: the feature map has 12 cells"):
        set_atrous_rates(toy((1, 2, 3)), 96, rates=(5, 11, 12))


def test_a_map_too_small_is_refused_before_anything_is_touched() -> None:
    model = toy()
    with pytest.raises(ConfigError, match="its short side is 3 cells"):
        set_atrous_rates(model, 24)
    assert rates_of(model) == [(12, 24, 36)]


def test_rates_written_as_function_calls_are_named() -> None:
    class Functional(Toy):
        def forward(self, image: Tensor) -> Tensor:
            x = self.stem(image)
            parts = [F.conv2d(x, branch.conv.weight, padding=d, dilation=d) for branch, d in zip(self.branches, (2, 4, 6), strict=True)]
            return torch.cat(parts, 1)

    with pytest.raises(NothingMatchedError, match="is a function call; change the rate in the code"):
        set_atrous_rates(Functional(), 96)


class Padded(nn.Module):
    """Pads before its convolution, as much as its dilation asks for (or as a fixed number says)."""

    def __init__(self, rate: int, fixed: int | None = None) -> None:
        super().__init__()
        self.conv = PaddedConv(8, 8, 3, dilation=rate)
        self.conv.fixed = fixed

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class PaddedConv(nn.Conv2d):
    fixed: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        pad = self.fixed or self.dilation[0]
        return F.conv2d(F.pad(x, (pad,) * 4), self.weight, self.bias, dilation=self.dilation)


@pytest.mark.parametrize("fixed", [False, True])
def test_convolutions_that_pad_themselves(fixed: bool) -> None:
    """One that follows its dilation is edited; one that does not is left as it was, with an error."""
    model = toy((3, 6, 9))
    model.branches = nn.ModuleList(Padded(rate, rate if fixed else None) for rate in (3, 6, 9))
    if not fixed:
        set_atrous_rates(model, 96)
        assert rates_of(model) == [(2, 4, 6)]
        return
    with pytest.raises(Exception, match=r"size of a feature map|cannot be read"):
        set_atrous_rates(model, 96)
    assert rates_of(model) == [(3, 6, 9)]


def test_a_compiled_model_is_edited_through() -> None:
    model = toy((3, 6, 9))
    assert set_atrous_rates(torch.compile(model, backend="eager"), 96).made[0].module == "branches.0.conv"  # type: ignore[arg-type]
    assert rates_of(model) == [(2, 4, 6)]


# Real networks.

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], int]] = {
    "smp DeepLabV3": (lambda: smp.DeepLabV3("resnet18", encoder_weights=None), tuple(f"decoder.aspp.convs.{k}.0" for k in (1, 2, 3)), 8),
    "smp DeepLabV3Plus": (
        lambda: smp.DeepLabV3Plus("mobilenet_v2", encoder_weights=None),
        tuple(f"decoder.aspp.0.convs.{k}.0.0" for k in (1, 2, 3)),
        16,
    ),
    "torchvision mobilenet": (
        lambda: torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None),
        tuple(f"classifier.0.convs.{k}.0" for k in (1, 2, 3)),
        16,
    ),
    "torchvision resnet50": (
        lambda: torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None),
        tuple(f"classifier.0.convs.{k}.0" for k in (1, 2, 3)),
        8,
    ),
}


def mobilevit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileViTConfig(
        hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64], num_attention_heads=2, output_stride=16
    )
    return transformers.MobileViTForSemanticSegmentation(config)


NETWORKS["transformers MobileViT"] = (mobilevit, tuple(f"segmentation_head.aspp.convs.{k}.convolution" for k in (1, 2, 3)), 16)


@pytest.mark.parametrize("name", NETWORKS)
def test_real_networks(name: str) -> None:
    build, paths, stride = NETWORKS[name]
    with torch.device("meta" if "MobileViT" not in name else "cpu"):
        model = build()
    dilated = {path: m.dilation for path, m in model.named_modules() if isinstance(m, nn.Conv2d) and path not in paths}
    images = torch.zeros(2, 3, 128, 128, device="meta")
    (found,) = find_aspps(model, images)
    assert (tuple(branch.module for branch in found.branches), found.output_stride) == (paths, stride)
    changes = fit_atrous_rates(model, images)
    assert [(change.module, change.what) for change in changes.made] == [
        (path, f"atrous rate {rate}") for path, rate in zip(paths, atrous_rates(128, stride), strict=True)
    ]
    assert {path: m.dilation for path, m in model.named_modules() if isinstance(m, nn.Conv2d) and path not in paths} == dilated
    assert not audit(model, images, select=CODES).findings


@pytest.mark.parametrize("separable", [False, True])
def test_smp_decoders_get_the_output_of_their_constructor(separable: bool) -> None:
    options = {"in_channels": 16, "out_channels": 8, "aspp_separable": separable, "aspp_dropout": 0.5}
    model = DeepLabV3Decoder(atrous_rates=(12, 24, 36), **options).eval()
    expected = DeepLabV3Decoder(atrous_rates=(3, 6, 9), **options).eval()
    expected.load_state_dict(copy.deepcopy(model.state_dict()))
    features = torch.randn(1, 16, 16, 16)
    set_atrous_rates(model, 16, rates=(3, 6, 9), example_inputs=([torch.zeros(2, 16, 16, 16)],))
    assert torch.equal(expected([features]), model([features]))


@pytest.mark.zoo
@pytest.mark.parametrize("architecture", ["DeepLabV3", "DeepLabV3Plus"])
def test_smp_networks_get_the_output_of_their_constructor(architecture: str) -> None:
    build = getattr(smp, architecture)
    model = build("resnet18", encoder_weights=None).eval()
    rates = atrous_rates(256, model.encoder.output_stride)
    expected = build("resnet18", encoder_weights=None, decoder_atrous_rates=rates).eval()
    expected.load_state_dict(model.state_dict())
    set_atrous_rates(model, 256)
    image = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        assert torch.equal(expected(image), model(image))
