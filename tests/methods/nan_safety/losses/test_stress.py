"""A training step on corner batches: what fails is reported with its batch, and nothing is left behind."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit import stress_step
from pl_normkit.auditing import audit_subject
from pl_normkit.findings import Severity
from pl_normkit.methods.nan_safety.losses.stress import StepCall
from pl_normkit.selection import Selection
from pl_normkit.subject import Subject


class Segmenter(pl.LightningModule):
    """A small network whose loss is chosen by name; it logs, counts its calls and has batch-norm statistics."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(4, 5, 1))
        self.loss = loss
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        logits = self.net(batch["image"])
        loss: Tensor = getattr(self, f"_{self.loss}")(logits, batch)
        self.log("loss", loss)
        return loss

    def _plain(self, logits: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(logits, batch["labels"])

    def _void(self, logits: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(logits, batch["labels"], ignore_index=255)

    def _void_guarded(self, logits: Tensor, batch: Any) -> Tensor:
        valid = (batch["labels"] != 255).sum().clamp_min(1)
        return F.cross_entropy(logits, batch["labels"], ignore_index=255, reduction="sum") / valid

    def _masked(self, logits: Tensor, batch: Any) -> Tensor:
        return logits.mean(1)[batch["mask"]].mean()

    def _contrast(self, logits: Tensor, batch: Any) -> Tensor:
        return logits.mean() / batch["image"].std(dim=(1, 2, 3)).mean()

    def _pooled(self, logits: Tensor, batch: Any) -> Tensor:
        return F.batch_norm(logits.mean((2, 3)), None, None, training=True).square().mean()

    def _rare(self, logits: Tensor, batch: Any) -> Tensor:
        """Raises where a class that it wants is not there."""
        return torch.stack([logits.mean(1)[batch["labels"] == label].mean() for label in batch["labels"].unique()]).log_softmax(0)[1]


def batch() -> dict[str, Tensor]:
    labels = torch.arange(2 * 8 * 8).view(2, 8, 8) % 5
    return {"image": torch.rand(2, 3, 8, 8), "labels": labels, "mask": labels > 1}


EXPECTED = {
    "void": ["batch['labels'] := 255 (ignored)"],
    "void_guarded": [],
    "masked": ["batch['mask'] := nothing"],
    "contrast": ["batch['image'] := its smallest value"],
    "pooled": ["one sample"],
    "rare": ["batch['labels'] := one class"],
}


@pytest.mark.parametrize("loss", EXPECTED)
def test_what_fails_is_found(loss: str) -> None:
    failures = stress_step(Segmenter(loss), batch())
    assert [failure.changed for failure in failures] == EXPECTED[loss]
    assert all(bool(failure.error) == (loss in ("pooled", "rare")) for failure in failures)


def test_the_batch_of_a_failure_fails() -> None:
    module = Segmenter("masked")
    (failure,) = stress_step(module, batch())
    assert failure.diagnosis is not None
    assert failure.diagnosis.source.split("/")[-1].startswith("test_stress.py:")
    assert not torch.isfinite(module._masked(module.net(failure.batch["image"]), failure.batch))


def test_nothing_is_left_behind() -> None:
    module, given = Segmenter("void"), batch()
    module.training_step = module.training_step  # type: ignore[method-assign]
    state = {name: value.clone() for name, value in module.state_dict().items()}
    kept = {name: value.clone() for name, value in given.items()}
    random = torch.get_rng_state()
    stress_step(module, given)
    assert (module.calls, module.training) == (0, True)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(value, kept[name]) for name, value in given.items())
    assert torch.equal(random, torch.get_rng_state())


def test_a_step_that_fails_on_the_real_batch_is_not_stressed() -> None:
    given = batch()
    given["mask"] = torch.zeros_like(given["mask"])
    (failure,) = stress_step(Segmenter("masked"), given)
    assert failure.changed == "the real batch"


def test_the_rule_reports_failures_with_their_batch() -> None:
    module = Segmenter("masked")
    subject = Subject(root=module, loss=module.net(batch()["image"]).mean(), loss_call=StepCall(module, batch()), measure=False)
    report = audit_subject(subject, Selection(["NK411"]))
    (finding,) = report.findings
    assert (finding.severity, finding.witness.changed) == (Severity.ERROR, ("batch['mask'] := nothing",))
    assert not finding.witness.arguments[0]["mask"].any()
    assert audit_subject(Subject(loss=torch.rand(3, requires_grad=True).sum()), Selection(["NK411"])).findings == []
