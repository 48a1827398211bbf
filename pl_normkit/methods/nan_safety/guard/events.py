"""What is kept of a bad step: its cause, a replay file, one dict per event. Reporting never ends a run. Derived here."""

from __future__ import annotations

__all__ = ["EventLog", "end_of_run"]

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from pl_normkit.errors import NonFiniteError, NormkitWarning
from pl_normkit.methods.nan_safety.diagnosis.first_bad import Diagnosis, Record
from pl_normkit.methods.nan_safety.diagnosis.replay import save_replay
from pl_normkit.methods.nan_safety.diagnosis.rerun import Batch, diagnose_batches
from pl_normkit.methods.nan_safety.guard.losses_seen import Seen

log = logging.getLogger(__name__)


class EventLog:
    """Names the first producer of each event, writes its replay file and keeps the event.

    Args:
        diagnose: run the batch of an event again.
        max_files: most replay files.
        save_weights: put the weights into replay files.

    Attributes:
        events: one dict per event: step, epoch, batch_index, ranks, first (a `Diagnosis`), samples, skipped and file.
        files: how many files were written.
    """

    def __init__(self, *, diagnose: bool, max_files: int, save_weights: bool) -> None:
        self.diagnose, self.max_files, self.save_weights = diagnose, max_files, save_weights
        self.events: list[dict[str, Any]] = []
        self.files = 0
        self._warned: set[str] = set()

    def find(
        self,
        module: nn.Module,
        seen: Sequence[Seen],
        context: Callable[[], AbstractContextManager[Any]],
        step: Callable[[Any], Tensor] | None = None,
    ) -> tuple[Diagnosis, Record | None, Batch | None]:
        """The diagnosis of a batch among `seen`, those with a bad loss first; kind "unknown" where it cannot be made."""
        chosen = [found for found in seen if found.is_bad()] or list(seen)
        batches = list({id(found.batch): found.batch for found in chosen if found.batch is not None}.values())
        if not self.diagnose or not batches:
            return Diagnosis("unknown", detail="not diagnosed"), None, batches[0] if batches else None
        try:
            return diagnose_batches(module, batches, context, step)
        except (Exception, SystemExit) as error:
            self.warn("diagnosis", 'an event could not be diagnosed; its cause is "unknown"', error)
            return Diagnosis("unknown", detail=f"the step could not be run again: {type(error).__name__}: {error}"[:300]), None, batches[0]

    def add(
        self,
        found: tuple[Diagnosis, Record | None, Batch | None],
        facts: Mapping[str, Any],
        *,
        folder: Path,
        module: nn.Module,
        gather: bool,
        skipped: bool = True,
    ) -> dict[str, Any]:
        """Keep an event and write its file. With `gather` called on every rank at once.

        Args:
            found: what `find` says.
            facts: step, epoch and rank.
            folder: where the file goes.
            module: whose weights go into the file, if they do.
            gather: learn what the other ranks found.
            skipped: whether an optimizer step was skipped.
        """
        diagnosis, record, batch = found
        of_ranks = _from_all_ranks(diagnosis) if gather else {int(facts["rank"]): diagnosis}
        producers = {rank: seen for rank, seen in of_ranks.items() if seen.kind != "unknown"} or of_ranks
        first = next(iter(producers.values()))
        event: dict[str, Any] = {"step": facts["step"], "epoch": facts["epoch"], "batch_index": batch.index if batch else -1}
        event |= {"ranks": list(producers), "first": first, "samples": first.samples, "skipped": skipped, "file": ""}
        if batch is not None and facts["rank"] in producers and self.files < self.max_files:
            event["file"] = self._save(folder, diagnosis, record, batch, facts, module)
        self.events.append(event)
        return event

    def _save(
        self, folder: Path, diagnosis: Diagnosis, record: Record | None, batch: Batch, facts: Mapping[str, Any], module: nn.Module
    ) -> str:
        known = {event["file"] for event in self.events}
        stem = f"step{facts['step']}_rank{facts['rank']}"
        path = next(
            path
            for count in range(len(known) + 1)
            if str(path := folder / (stem + (f"_{count + 1}" if count else "") + ".pt")) not in known
        )
        try:
            weights = module.state_dict() if self.save_weights else None
            save_replay(path, diagnosis, record, batch.values, batch.random_state, {**facts, "batch_index": batch.index}, weights)
        except Exception as error:
            self.warn("file", f"the replay file {path} could not be written", error)
            return ""
        self.files += 1
        return str(path)

    def warn(self, about: str, text: str, error: BaseException) -> None:
        """One warning for each thing that fails."""
        if about not in self._warned:
            self._warned.add(about)
            message = f"{text}: {type(error).__name__}: {error}; training goes on, and this is said once"
            try:
                warnings.warn(message, NormkitWarning, stacklevel=2)
            except NormkitWarning:  # warnings are errors here; a report still ends no run
                log.warning("%s", message)


def _from_all_ranks(diagnosis: Diagnosis) -> dict[int, Diagnosis]:
    """Called on every rank at once, on events only."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, diagnosis)
    return dict(enumerate(found))


def end_of_run(event: dict[str, Any], exceeded: str, *, stays: bool) -> NonFiniteError:
    """The error that ends a run after an event: its cause stays, a budget is exceeded, or the policy wants it."""
    lasting = "a parameter or optimizer state is not finite: every further step would be bad" if stays else ""
    return NonFiniteError(
        lasting or exceeded or "a training step is not finite; it was not made",
        where=", ".join(
            f"{name} {event[key]}" for name, key in (("step", "step"), ("batch", "batch_index"), ("ranks", "ranks")) if event[key] != -1
        ),
        evidence=str(event["first"]),
        fix=f"pl-normkit replay {event['file']}" if event["file"] else "see NaNGuard.events",
        silence="" if stays else 'NaNGuard(policy="skip", max_skips=None, max_skips_per_1000=None)',
    )
