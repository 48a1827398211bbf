"""What every fit ends with."""

from types import SimpleNamespace

from lightning.pytorch.callbacks import Callback
from rich.console import Console

from pl_normkit.findings import Evidence, Finding, FixSafety, Place, Severity
from pl_normkit.recipes.outcome import print_findings
from pl_normkit.report import Report


class _Judge(Callback):
    def __init__(self, *findings: Finding) -> None:
        self.report = Report(list(findings))


def _finding(code: str, module: str, value: float) -> Finding:
    return Finding(code, "name", Severity.NOTE, f"it is {value}", (Place(module),), (Evidence("share", value, ""),), "", FixSafety.DISPLAY)


def test_two_callbacks_that_find_the_same_tell_it_once_as_it_was_last() -> None:
    callbacks = [_Judge(_finding("NK313", "loss", 0.25), _finding("NK201", "bn", 1.0)), _Judge(_finding("NK313", "loss", 0.75))]
    console = Console(record=True, width=200)
    print_findings(SimpleNamespace(callbacks=callbacks), console)  # type: ignore[arg-type]
    assert console.export_text().splitlines() == [
        "findings:   2",
        "  NK313 name (note): it is 0.75 at loss",
        "  NK201 name (note): it is 1.0 at bn",
    ]
