"""One verdict for each ASPP, and fixes where it has three branches."""

from __future__ import annotations

import pytest
import torch

from pl_normkit import audit
from pl_normkit.auditing import fix_findings
from pl_normkit.methods.atrous_rates import find_aspps
from tests.methods.atrous_rates.networks import CELLS, Toy, toy

CODES = ["NK501", "NK502", "NK503"]

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
