"""One policy where a remedy finds nothing: the run goes on, and one warning names what was looked for."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import pytest

from pl_normkit.callbacks import AtrousRates, DropoutPlacement, GammaDecay, ModelAudit, ScaleEqualization
from pl_normkit.errors import NormkitWarning
from tests.callbacks.test_model_audit import RIGHT, Module, fit


@pytest.mark.parametrize("callback", [DropoutPlacement(), AtrousRates(), ScaleEqualization(), GammaDecay(weight_decay=0.0)])
def test_a_remedy_with_nothing_to_do_warns_once(callback: pl.Callback) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(Module(RIGHT, example=True), callback)
    said = [str(found.message) for found in seen if issubclass(found.category, NormkitWarning)]
    assert [text.startswith(f"{type(callback).__name__} changes nothing: it looked for ") for text in said] == [True]


def test_an_audit_that_may_fix_asks_for_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", NormkitWarning)
        fit(Module(RIGHT, example=True), ModelAudit(fix="safe"))
