from __future__ import annotations

from collections.abc import Callable

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from pl_normkit import audit
from pl_normkit.findings import Finding
from pl_normkit.methods.fusion_scale import equalize_scales, measure_fusion_scales
from tests.methods.fusion_scale.models import Nested, OwnDecoder, SumDecoder, images


def judge(model: nn.Module, x: Tensor, measure: bool = True) -> list[Finding]:
    report = audit(model, x, select=["NK301"], measure=measure)
    assert report.notes == []
    return list(report.findings)


def test_branches_far_apart_are_one_finding_with_the_resize_named() -> None:
    model, x = OwnDecoder(), images()[0]
    (finding,) = judge(model, x)
    (fusion,) = measure_fusion_scales(model, [x])

    assert finding.code == "NK301"
    assert "strongly different scales" in finding.message
    assert "bilinear 8x8 to 16x16" in finding.message
    assert [place.module for place in finding.places] == [""]
    assert [evidence.value for evidence in finding.evidence] == [fusion.ratio]
    assert "ScaleEqualization" in finding.advice


def test_real_models() -> None:
    x = torch.randn(2, 3, 64, 64)
    (finding,) = judge(smp.Segformer("resnet18", encoder_weights=None), x)
    assert [place.module for place in finding.places] == ["decoder"]
    assert finding.evidence[0].value > 4
    (finding,) = judge(smp.Unet("resnet18", encoder_weights=None), x)
    assert [place.module for place in finding.places] == ["decoder.blocks.2"]
    assert 2 < finding.evidence[0].value < 4
    assert "on different scales" in finding.message
    assert judge(smp.DeepLabV3Plus("resnet18", encoder_weights=None), x) == []


def trained() -> nn.Module:
    model = OwnDecoder()
    model(images()[0])
    return model


def frozen() -> nn.Module:
    model = OwnDecoder()
    model.fuse.requires_grad_(False)
    return model


def equalized(mode: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = OwnDecoder()
        equalize_scales(model, images(), mode=mode)  # type: ignore[arg-type]
        return model

    return build


class SameScales(OwnDecoder):
    def __init__(self) -> None:
        super().__init__(between=nn.BatchNorm2d(14))


@pytest.mark.parametrize(
    "build",
    [trained, frozen, equalized("explicit"), equalized("init"), SameScales, SumDecoder],
    ids=["trained", "frozen", "explicit", "init", "batch norm reads it", "sum"],
)
def test_silent_where_there_is_nothing_to_mend(build: Callable[[], nn.Module]) -> None:
    assert judge(build(), images()[0]) == []


@pytest.mark.parametrize(
    ("x", "measure"),
    [(images()[0], False), (torch.zeros(2, 3, 16, 16), True), (torch.randn(1, 3, 16, 16), True)],
    ids=["may not measure", "constant inputs", "one sample"],
)
def test_silent_without_data_to_judge_by(x: Tensor, measure: bool) -> None:
    assert judge(Nested(), x, measure) == []


def test_meta_models_are_not_judged() -> None:
    with torch.device("meta"):
        model = OwnDecoder()
    assert judge(model, torch.randn(2, 3, 16, 16)) == []
