"""What the search found, as witnesses that the rules attach to their findings, and the script that shows one in a fresh process."""

from __future__ import annotations

__all__ = ["Shown", "Witnesses", "in_user_code", "witnesses"]

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pl_normkit.findings import Place, Severity, Witness
from pl_normkit.methods.nan_safety.losses.loss_call import SEED, LossCall
from pl_normkit.methods.nan_safety.losses.search import Hit, Search, search
from pl_normkit.methods.nan_safety.losses.stable_forms import Explanation, explain
from pl_normkit.subject import Subject

SCRIPT = '''"""{words}."""
from pathlib import Path
import torch
{imports}
positional, keywords = torch.load(Path(__file__).with_suffix(".pt"))
torch.manual_seed({seed})
{called}
print("loss", value.item())
leaves = [leaf for leaf in torch.utils._pytree.tree_leaves((positional, keywords)) if getattr(leaf, "requires_grad", False)]
for gradient in torch.autograd.grad(value, leaves, allow_unused=True):
    print("gradient", "unused" if gradient is None else f"not finite in {{int((~torch.isfinite(gradient)).sum())}} of {{gradient.numel()}}")
'''
OUTCOMES = {"value": "the loss is not finite", "gradient": "the loss is finite and its gradient is not"}


@dataclass(frozen=True)
class Shown:
    """A place that is shown to fail."""

    explanation: Explanation
    place: Place
    severity: Severity
    witness: Witness

    @property
    def message(self) -> str:
        return f"{self.witness.outcome} when {' and '.join(self.witness.changed) or 'called on the example itself'}"


@dataclass(frozen=True)
class Witnesses:
    """Everything that one search showed, and what is to be said of a suspicion that it did not bear out."""

    shown: Sequence[Shown]
    otherwise: str

    def of(self, code: str) -> list[Shown]:
        return [shown for shown in self.shown if shown.explanation.code == code]


def witnesses(subject: Subject) -> Witnesses | None:
    """The outcome of the search on the subject's loss; None where it is only known by the graph of one call."""
    if not isinstance(subject.loss_call, LossCall):
        return None
    call = subject.loss_call
    found = _searched(call)
    shown = [_shown(call, hit, number) for number, hit in enumerate(_one_per_explanation(call, found.hits), 1)]
    return Witnesses(shown, _otherwise(found))


def _searched(call: LossCall) -> Search:
    """The search, with a progress bar where it may take longer than a second and somebody looks."""
    if call.seconds <= 1 or not sys.stderr.isatty():
        return search(call)
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("searching", total=1.0)
        return search(call, lambda share: bar.update(task, completed=share))


def _otherwise(found: Search) -> str:
    if any(not hit.changed for hit in found.hits):
        return "not looked for, since the example itself is not finite"
    return "not triggered within the search" + ("" if found.is_complete else ", which ran out of time")


def _one_per_explanation(call: LossCall, hits: Sequence[Hit]) -> Iterator[Hit]:
    """The first hit of each rule and line: value and gradient of one operation are one cause."""
    seen: set[tuple[str, str, str]] = set()
    for hit in hits:
        explanation = explain(hit.diagnosis, hit.record, call.autocast)
        key = (explanation.code, explanation.operation, hit.diagnosis.source)
        if key not in seen:
            seen.add(key)
            yield hit


def _shown(call: LossCall, hit: Hit, number: int) -> Shown:
    explanation = explain(hit.diagnosis, hit.record, call.autocast)
    place = in_user_code(Place(hit.diagnosis.module or "loss", hit.diagnosis.source))
    source = f" at {place.source}" if place.source else ""
    outcome = f"{OUTCOMES[hit.outcome]} ({explanation.operation}{source})"
    witness = Witness(hit.arguments.plain(), hit.changed, outcome)
    shown = Shown(explanation, place, Severity.WARNING if hit.arguable else Severity.ERROR, witness)
    if call.folder is None or not call.import_lines:
        return shown
    name = call.name.rpartition(":")[2].rpartition(".")[2]
    path = call.folder / f"{name}_witness{'' if number == 1 else f'_{number}'}.py"
    _write(call, hit, shown, path)
    return replace(shown, witness=replace(witness, script=_short(path)))


def in_user_code(place: Place) -> Place:
    """`place` without a line of this package, which is what a loss typed at a prompt seems to stand at."""
    return replace(place, source="") if re.search(r"(^|/)pl_normkit/\w+\.py:\d+$", place.source) else place


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _write(call: LossCall, hit: Hit, shown: Shown, path: Path) -> None:
    """The arguments beside a script of about ten lines."""
    positional, keywords, _ = hit.arguments.fresh()
    called = "value = loss(*positional, **keywords).sum()"
    if call.autocast is not None:
        called = f'with torch.autocast("cpu", dtype={call.autocast}):\n    {called}'
    words = shown.message.replace("\\", "/").replace('"', "'")
    text = SCRIPT.format(words=words, imports=call.import_lines, seed=SEED, called=called)
    torch.save((positional, keywords), path.with_suffix(".pt"))
    path.write_text(text)
