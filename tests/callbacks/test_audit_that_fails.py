"""What goes wrong while `ModelAudit` looks at a step costs the run nothing but what it would have been told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit import audit
from pl_normkit.callbacks import ModelAudit
from tests.callbacks.test_audit_of_the_step import Net


class Validated(Net):
    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


def weights_after(folder: Path, *callbacks: Any) -> list[Tensor]:
    torch.manual_seed(0)
    module = Validated()
    batches = DataLoader(TensorDataset(torch.randn(16, 6), torch.randint(0, 3, (16,))), 4)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=list(callbacks), default_root_dir=folder, **quiet).fit(module, batches, batches)
    return list(module.state_dict().values())


def fail(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("made to fail")


@pytest.mark.filterwarnings("ignore:.*was not read")  # one warning is what such a run gets
@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ("recorder.broadcasts", "the first step was not read"),
        ("recorder.misread_divergences", "the first step was not read"),
        ("recorder._largest", "the first step was not read"),
        ("recorder._is_cut", "the first step was not read"),
        ("recorder._modal", "the first validation batch was not read"),
        ("watch.ForwardWatch._see", "the first step was not read"),
        ("watch.ForwardWatch._keep_output", "the first step was not read"),
        ("watch.ForwardWatch._mark_inputs", "the first step was not read"),
    ],
)
def test_a_failure_in_reading_leaves_the_run_as_it_is(broken: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = weights_after(tmp_path)
    monkeypatch.setattr(f"pl_normkit.first_step.{broken}", fail)
    callback = ModelAudit(config=False)
    actual = weights_after(tmp_path, callback)
    assert [torch.equal(one, other) for one, other in zip(expected, actual, strict=True)] == [True] * len(expected)
    assert callback.report is not None
    notes = [str(note) for note in callback.report.failures]
    assert any(what in note and "ZeroDivisionError: made to fail" in note for note in notes)
    assert torch._C._len_torch_function_stack() == 0
    assert not nn.modules.module._global_forward_hooks


def test_an_audit_by_hand_says_what_it_could_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pl_normkit.first_step.recorder.broadcasts", fail)
    model, x = nn.Sequential(nn.Linear(6, 3)), torch.randn(4, 6)
    report = audit(model, x, loss=model(x).square().mean())
    assert [str(note).partition(" Please")[0] for note in report.failures] == ["the step was not read: ZeroDivisionError: made to fail."]
