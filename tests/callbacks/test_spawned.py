"""Callbacks are sent to spawned processes (`ddp_spawn`), so each must survive pickling."""

from __future__ import annotations

import pickle

import pytest

import pl_normkit.callbacks as callbacks
from tests.callbacks.test_model_audit import RIGHT, Module, fit

NEEDED = ("NormPlacement", "NormSchedule", "SwapNorms")  # have arguments without a default


@pytest.mark.parametrize("name", sorted(set(callbacks.__all__) - set(NEEDED)))
def test_a_new_callback_can_be_sent_to_another_process(name: str) -> None:
    callback = getattr(callbacks, name)()
    assert type(pickle.loads(pickle.dumps(callback))) is type(callback)


def test_so_can_one_that_has_run() -> None:
    used = [callbacks.NaNGuard(), callbacks.ModelAudit(), callbacks.GammaDecay(weight_decay=0.1), callbacks.GradientHealth()]
    fit(Module(RIGHT, example=True), *used)
    sent = pickle.loads(pickle.dumps(used))
    assert [type(callback) for callback in sent] == [type(callback) for callback in used]
    assert sent[0].budget.steps == used[0].budget.steps == 2
