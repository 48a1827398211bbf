"""Atrous rates: the table, ASPP found by structure, the fix and the rules, on toys and on real networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3Decoder
from torch import Tensor, nn
from torch.nn import functional as F

from pl_normkit import audit
from pl_normkit.auditing import fix_findings
from pl_normkit.errors import ConfigError, NormkitWarning, NothingMatchedError
from pl_normkit.methods.atrous_rates import (
    atrous_rates,
    find_aspps,
    fit_atrous_rates,
    output_stride,
    set_atrous_rates,
    valid_tap_share,
)

CODES = ["NK501", "NK502", "NK503"]

# The rule for the rates.

TABLE = {
    224: (5, 2, 6, 3),
    256: (5, 3, 7, 4),
    384: (8, 4, 11, 5),
    512: (11, 5, 14, 7),
    513: (11, 6, 14, 7),
    640: (13, 7, 18, 9),
    769: (16, 8, 21, 11),
    896: (19, 9, 25, 12),
    1024: (21, 11, 28, 14),
}
"""Crop -> r at output stride 8 and 16 with c = 1/6, then with c = 0.22."""
CELLS = [
    (crop, stride, c, r)
    for crop, row in TABLE.items()
    for (stride, c), r in zip([(8, 1 / 6), (16, 1 / 6), (8, 0.22), (16, 0.22)], row, strict=True)
]


@pytest.mark.parametrize(("crop", "stride", "c", "r"), [*CELLS, (128, 1, 1 / 6, 21), (256, 1, 1 / 6, 43)])
def test_every_cell_of_the_table(crop: int, stride: int, c: float, r: int) -> None:
    assert atrous_rates(crop, stride, c=c) == (r, 2 * r, 3 * r)


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([1, 4, 8, 16, 32]), st.floats(0.01, 3))
def test_no_rate_is_ever_dead(height: int, width: int, stride: int, c: float) -> None:
    side = -(-min(height, width) // stride)
    if side <= 3:
        with pytest.raises(ConfigError, match="no three atrous rates fit"):
            atrous_rates((height, width), stride, c=c)
    else:
        r, _, largest = atrous_rates((height, width), stride, c=c)
        assert 1 <= r <= largest == 3 * r <= side - 1


def test_the_short_side_counts() -> None:
    assert atrous_rates((512, 1024), 16) == atrous_rates((1024, 512), 16) == atrous_rates(512, 16)


@pytest.mark.parametrize(
    ("size", "stride", "c"),
    [
        (0, 8, 0.2),
        ((8,), 8, 0.2),
        ("512", 8, 0.2),
        (512.0, 8, 0.2),
        (True, 8, 0.2),
        (512, 0, 0.2),
        (512, 8.0, 0.2),
        (512, 8, 0),
        (512, 8, None),
    ],
)
def test_bad_arguments(size: Any, stride: Any, c: Any) -> None:
    with pytest.raises(ConfigError):
        atrous_rates(size, stride, c=c)


@pytest.mark.parametrize(
    ("side", "cells", "stride"),
    [(513, 33, 16), (513, 65, 8), (512, 32, 16), (64, 4, 16), (65, 5, 16), (65, 9, 8), (128, 128, 1), (90, 30, 3), (7, 1, 8)],
)
def test_the_stride_of_a_map(side: int, cells: int, stride: int) -> None:
    assert output_stride(side, cells) == stride


# What a rate leaves of a kernel.


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (64, 64), (65, 65), (32, 65)])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 1)])
def test_the_share_of_valid_taps_is_that_of_a_convolution_of_ones(size: tuple[int, int], kernel: tuple[int, int]) -> None:
    ones = torch.ones(1, 1, *size, dtype=torch.float64)
    weight = torch.ones(1, 1, *kernel, dtype=torch.float64) / (kernel[0] * kernel[1])
    for rate in (1, 6, 12, 31, 32, 36):
        padding = tuple(rate * (k - 1) // 2 for k in kernel)
        counted = float(F.conv2d(ones, weight, padding=padding, dilation=rate).mean())
        assert counted == pytest.approx(valid_tap_share(rate, size, kernel), abs=1e-12)


@pytest.mark.parametrize(("side", "rate"), [(32, 36), (32, 32), (32, 31), (8, 7), (8, 8), (8, 1)])
def test_eight_taps_get_no_gradient_exactly_where_the_rate_reaches_the_side(side: int, rate: int) -> None:
    conv = nn.Conv2d(1, 1, 3, padding=rate, dilation=rate, bias=False)
    conv(torch.rand(2, 1, side, side) + 0.5).sum().backward()
    assert conv.weight.grad is not None
    assert int((conv.weight.grad != 0).sum()) == (1 if rate >= side else 9)


# ASPP by structure.


class Branch(nn.Module):
    """A dilated convolution in one of the forms people write."""

    def __init__(self, form: str, rate: int) -> None:
        super().__init__()
        mode = form if form in ("reflect", "circular", "replicate") else "zeros"
        padding: Any = "same" if form == "same" else rate
        groups = {"separable": 8, "grouped": 4}.get(form, 1)
        self.reduce = nn.Conv2d(8, 8, 1) if form == "reduced" else nn.Identity()
        self.conv = nn.Conv2d(8, 8, 3, padding=padding, dilation=rate, groups=groups, padding_mode=mode)
        self.point = nn.Conv2d(8, 8, 1) if form == "separable" else nn.Identity()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.point(self.conv(self.reduce(x)))))


class Toy(nn.Module):
    """A strided stem, a dilated encoder layer, an ASPP of `rates` with the usual 1x1 and pooled branches, and a head."""

    def __init__(self, rates: tuple[int, ...] = (12, 24, 36), form: str = "plain", join: str = "concat", stride: int = 8) -> None:
        super().__init__()
        self.join = join
        self.stem = nn.Conv2d(3, 8, stride, stride)
        self.encoder = nn.Conv2d(8, 8, 3, padding=4, dilation=4)
        self.point = nn.Conv2d(8, 8, 1)
        self.branches = nn.ModuleList(Branch(form, rate) for rate in rates)
        self.head = nn.Conv2d(8 * (len(rates) + 2) if join == "concat" else 8, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.encoder(self.stem(image)))
        pooled = F.interpolate(x.mean((2, 3), keepdim=True), x.shape[2:])
        parts = [self.point(x), *(branch(x) for branch in self.branches), pooled]
        joined = torch.cat(parts, 1) if self.join == "concat" else sum(parts[1:], parts[0])
        return F.interpolate(self.head(joined), image.shape[2:])


def toy(*arguments: Any, **options: Any) -> Toy:
    torch.manual_seed(0)
    return Toy(*arguments, **options).eval()


def rates_of(model: nn.Module, size: int = 96) -> list[tuple[int, ...]]:
    return [aspp.rates for aspp in find_aspps(model, torch.zeros(2, 3, size, size, device="meta"))]


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


# The rules: each ASPP gets one verdict.

VERDICTS = [
    ((12, 24, 36), 16, 512, ["NK501"]),
    ((12, 24, 36), 16, 64, ["NK501"]),
    ((6, 12, 18), 8, 512, ["NK501"]),
    ((12, 24, 36), 16, 1024, []),  # rates of stride 8, but they happen to fit
    ((6, 12, 18), 16, 512, []),
    ((12, 24, 36), 8, 512, []),
    ((12, 24, 36), 8, 384, []),
    ((12, 24, 36), 8, 320, ["NK503"]),
    ((12, 24, 36), 8, 256, ["NK502"]),
    ((6, 12, 18), 16, 1024, ["NK503"]),
    ((5, 10, 40), 8, 256, ["NK502"]),
    ((5, 10, 31), 8, 256, []),  # no triple (r, 2r, 3r): only a dead branch is judged
    ((6, 12, 18, 24), 8, 512, []),  # DeepLab v2's own four
    *(((r, 2 * r, 3 * r), stride, crop, []) for crop, stride, _, r in CELLS[::3]),
]


@pytest.mark.parametrize(("rates", "stride", "crop", "codes"), VERDICTS)
def test_verdicts(rates: tuple[int, ...], stride: int, crop: int, codes: list[str]) -> None:
    with torch.device("meta"):
        model = Toy(rates, stride=stride)
    findings = audit(model, torch.zeros(2, 3, crop, crop, device="meta"), select=CODES).findings
    assert [finding.code for finding in findings] == codes
    for finding in findings:
        assert [place.module for place in finding.places] == [f"branches.{k}.conv" for k in range(len(rates))]


@pytest.mark.parametrize("form", ["replicate", "circular"])
def test_a_branch_that_pads_with_the_map_itself_is_not_dead(form: str) -> None:
    model = toy((5, 10, 12), form)
    assert [aspp.dead for aspp in find_aspps(model, torch.zeros(2, 3, 96, 96))] == [()]
    assert len(find_aspps(toy((5, 10, 12)), torch.zeros(2, 3, 96, 96))[0].dead) == 1


def test_a_finding_says_what_it_saw_and_marks_its_advice_as_derived() -> None:
    (finding,) = audit(toy((12, 24, 36), stride=16), torch.zeros(2, 3, 256, 256), select=["NK501"]).findings
    assert finding.message == (
        "ASPP rates (12, 24, 36) belong to output stride 8, and it reads a 16x16 feature map (input 256x256, output stride 16)"
    )
    assert [round(item.value, 4) for item in finding.evidence] == [0.25, 0.1111, 0.1111]
    assert finding.advice.startswith("Use (3, 6, 9) for this input (derived: centre rule)")


@pytest.mark.parametrize(("crop", "code"), [(128, "NK501"), (24, "NK501")])
def test_the_fix_mends_what_can_be_mended(crop: int, code: str) -> None:
    model, image = toy(stride=4, form="separable"), torch.zeros(2, 3, crop, crop)
    (finding,) = (findings := audit(model, image, select=CODES).findings)
    assert finding.code == code
    assert not fix_findings(model, image, findings)  # unsafe, and not asked for
    assert bool(fix_findings(model, image, findings, allow_unsafe=True)) is (crop > 12)
    assert not audit(model, image, select=CODES).findings


def test_no_fix_is_offered_where_no_live_rates_exist() -> None:
    (finding,) = audit(toy(), torch.zeros(2, 3, 24, 24), select=CODES).findings
    assert (finding.fix_safety, finding.advice.partition(":")[0]) == ("display", "Train on larger crops or at a smaller output stride")
