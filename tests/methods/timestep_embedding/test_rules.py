"""Which of NK801 to NK804 fire, with weights and without, on small networks and on real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pl_normkit import audit
from pl_normkit.auditing import fix_findings
from tests.methods.timestep_embedding.networks import NORMS, AdaptiveBlock, ContextBlock, OdeFunction, ResBlock, res_block
from tests.methods.timestep_embedding.test_find import unet


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def codes(model: nn.Module, inputs: Any) -> dict[str, list[str]]:
    findings = audit(model, inputs, select=["NK80", "NK803"]).findings
    return {finding.code: [place.module for place in finding.places] for finding in findings}


BOTH = ["norm2", "norm3"]
SHARED = {
    "batch": {"NK801": BOTH, "NK804": BOTH},
    "instance": {"NK801": BOTH},
    "group of 4": {"NK803": BOTH},
    "group of 16": {},
    "one group": {},
}


@pytest.mark.parametrize("padding", ["circular", "zeros"])
@pytest.mark.parametrize(("norm", "expected"), SHARED.items())
def test_a_shared_time(norm: str, expected: dict[str, list[str]], padding: str) -> None:
    assert codes(OdeFunction(NORMS[norm], padding_mode=padding), OdeFunction.inputs()) == expected


@pytest.mark.parametrize(("norm", "expected"), {**SHARED, "group of 2": {"NK802": BOTH}}.items())
def test_a_shared_time_without_weights(norm: str, expected: dict[str, list[str]]) -> None:
    with torch.device("meta"):
        model, inputs = OdeFunction(NORMS[norm]), OdeFunction.inputs()
    assert codes(model, inputs) == expected


@pytest.mark.parametrize(
    ("norm", "expected"),
    {"batch": {}, "instance": {"NK801": ["block2.0"]}, "group of 2": {"NK802": ["block2.0"]}, "group of 4": {"NK803": ["block2.0"]},
     "group of 16": {}, "one group": {}}.items(),
)  # fmt: skip
def test_a_time_for_each_sample(norm: str, expected: dict[str, list[str]]) -> None:
    assert codes(res_block(norm), ResBlock.inputs()) == expected


def test_a_time_that_does_not_arrive_is_no_finding() -> None:
    model = res_block("instance")
    nn.init.zeros_(model.temb_proj[1].weight)
    assert codes(model, ResBlock.inputs()) == {}


def test_scale_and_shift_and_contexts_are_silent() -> None:
    assert codes(AdaptiveBlock(), ResBlock.inputs()) == {}
    assert codes(ContextBlock(), torch.randn(2, 3, 8, 8)) == {}


def test_measured_evidence_names_both_modes() -> None:
    (finding,) = audit(OdeFunction(nn.BatchNorm2d), OdeFunction.inputs(), select=["NK804"]).findings
    training, evaluation = finding.evidence
    assert training.value < 1e-9 < 0.5 < evaluation.value
    assert training.is_measured


@pytest.mark.parametrize(("norm", "code"), [("instance", "NK801"), ("group of 2", "NK802"), ("group of 4", "NK803")])
def test_the_fix_ends_the_finding(norm: str, code: str) -> None:
    model, inputs = res_block(norm), ResBlock.inputs()
    assert code in codes(model, inputs)
    report = audit(model, inputs, select=[code])
    fix_findings(model, inputs, report.findings, allow_unsafe=True)
    assert codes(model, inputs) == {}


def test_batch_norm_is_fixed_as_well() -> None:
    model, inputs = OdeFunction(nn.BatchNorm2d), OdeFunction.inputs()
    fix_findings(model, inputs, audit(model, inputs, select=["NK804"]).findings, allow_unsafe=True)
    assert codes(model, inputs) == {}


def test_diffusers() -> None:
    inputs = (torch.randn(2, 1, 8, 8), torch.tensor([3, 7]))
    fired = codes(unet(), inputs)
    assert set(fired) == {"NK802", "NK803"}
    assert sorted(fired["NK802"] + fired["NK803"]) == sorted(
        f"{block}.norm2"
        for block in ("down_blocks.0.resnets.0", "down_blocks.1.resnets.0", "mid_block.resnets.0", "mid_block.resnets.1",
                      "up_blocks.0.resnets.0", "up_blocks.0.resnets.1", "up_blocks.1.resnets.0", "up_blocks.1.resnets.1")
    )  # fmt: skip
    assert codes(unet(resnet_time_scale_shift="scale_shift"), inputs) == {}


def test_few_channels_per_group_are_a_preview() -> None:
    model, inputs = res_block("group of 4"), ResBlock.inputs()
    assert audit(model, inputs).findings == []
    assert [finding.code for finding in audit(model, inputs, select=["NK803"]).findings] == ["NK803"]


def test_networks_without_a_time_are_silent() -> None:
    timm = pytest.importorskip("timm")
    for name in ("resnet10t", "seresnet18"):
        assert codes(timm.create_model(name), torch.randn(2, 3, 32, 32)) == {}


def test_a_norm_that_is_no_module_is_judged_by_its_settings() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.time = nn.Conv2d(3, 8, 3), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
            return nn.functional.group_norm(self.conv(x) + self.time(temb)[:, :, None, None], 4)

    (finding,) = audit(Functional(), ResBlock.inputs(), select=["NK8"]).findings
    assert (finding.code, [(evidence.value, evidence.is_measured) for evidence in finding.evidence]) == ("NK802", [(0.5, False)])
