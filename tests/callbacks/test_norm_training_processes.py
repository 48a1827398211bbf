"""Two processes with half of each batch train as one process with whole batches does, whatever acts on gradients or norms."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.callbacks.norm_training_ranks import CALLBACKS, trained
from tests.callbacks.processes import run_on_two_ranks

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


def test_two_ranks_are_one(tmp_path: Path) -> None:
    """Norms here are those of rows, so that halves of a batch see the statistics of the whole."""
    first, second = run_on_two_ranks("norm_training_ranks", tmp_path)
    assert first == second
    whole = {what: trained(what, devices=1) for what in CALLBACKS}
    for what, weights in whole.items():
        for name, values in weights.items():
            assert first[what][name] == pytest.approx(values, rel=1e-10, abs=1e-12), (what, name)
        assert what == "nothing" or weights != whole["nothing"]
