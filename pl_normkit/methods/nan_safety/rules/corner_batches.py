"""NK411: a training step that does not survive a batch that training will meet one day."""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Iterator

from pl_normkit.findings import Place, Severity, Witness
from pl_normkit.methods.nan_safety.losses.stable_forms import explain
from pl_normkit.methods.nan_safety.losses.stress import StepCall, Stressed, stress_step
from pl_normkit.rules import Mark, Observation, rule
from pl_normkit.subject import Needs, Subject


@rule(
    "NK411",
    "step-fails-on-a-corner-batch",
    mark=Mark.DERIVED,
    source="tests/methods/nan_safety/losses/test_stress.py",
    needs=(Needs.LOSS,),
)
def step_fails_on_a_corner_batch(subject: Subject) -> Iterator[Observation]:
    """
    What it does
        Runs the module's own training step on batches made from a real one (one sample, constant inputs, labels of one class, labels
        all ignored, empty masks) and reports what raises or is not finite. Runs only where it was asked for (`stress_step`).

    Why it hurts
        Such batches come: the last one of an epoch has one sample, a crop has no valid pixel. Hours into a run they end it.

    Evidence
        The batch, and the operation that was first not finite.

    Example
        ```python
        import torch

        class Masked(torch.nn.Linear):
            def training_step(self, batch, batch_idx):
                return self(batch["x"])[batch["mask"]].mean()
        ```

    Use instead
        ```python
        class Guarded(torch.nn.Linear):
            def training_step(self, batch, batch_idx):
                return self(batch["x"])[batch["mask"]].sum() / batch["mask"].sum().clamp_min(1)
        ```

    Fix and its safety
        Advice only.

    Source
        Derived: the failure itself, seen.
    """
    if isinstance(subject.loss_call, StepCall):
        call = subject.loss_call
        yield from map(_observation, stress_step(call.module, call.batch, batch_index=call.batch_index, context=call.context))


def _observation(failure: Stressed) -> Observation:
    found = failure.diagnosis
    if found is None:
        outcome = f"the training step raises {failure.error}"
        advice = "let the step survive it, or keep such batches out of training (drop_last=True for the last batch)"
        place, severity = Place(""), Severity.WARNING
    else:
        outcome = f"the training step is not finite ({found})"
        advice, place, severity = explain(found, None).advice, Place(found.module, found.source), Severity.ERROR
    witness = Witness((failure.batch,), (failure.changed,), outcome)
    return Observation(f"{outcome} on {failure.changed}", (place,), advice, severity=severity, cause=failure.changed, witness=witness)
