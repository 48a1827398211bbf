"""Every timm family and every smp architecture is audited without a crash (`make zoo`; minutes, not seconds)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import zoo

from pl_normkit.rules import load_rules

CASES = {f"{case.family}/{case.name}": case for case in (*zoo.timm_cases(), *zoo.smp_cases()) if case.form == "shipped"}


def test_zoo_holds_every_family_and_architecture() -> None:
    import segmentation_models_pytorch as smp
    from timm.models._registry import _module_to_models

    families = {case.family for case in CASES.values()}

    assert families == {f"timm.{name}" for name in _module_to_models} | {f"smp.{name}" for name in smp.MODEL_ARCHITECTURES_MAPPING}


@pytest.mark.zoo
@pytest.mark.parametrize("name", CASES)
def test_family_is_audited_without_a_crash(name: str) -> None:
    row = zoo.read_case(CASES[name], sorted(load_rules()))

    assert row is not None
    assert row["crash"] == ""
    assert row["operations"] > 0
