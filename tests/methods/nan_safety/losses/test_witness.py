"""A witness is what it says, and its script shows it in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pl_normkit import audit_loss
from pl_normkit.errors import DataError
from pl_normkit.findings import Finding
from pl_normkit.report import Report

LOSSES = """
import torch
import torch.nn.functional as F

def rmse(pred, target):
    return F.mse_loss(pred, target).sqrt()

def bce(pred, target):
    return -(target * pred.sigmoid().log()).mean()

def masked(pred, target, mask):
    return F.l1_loss(pred[mask], target[mask])

def keywords(*, z):
    return z["logits"].softmax(1).log().mean()

def keywords_example():
    return {"z": {"logits": torch.rand(3, 4)}}

class Holder:
    class Noisy(torch.nn.Module):
        def forward(self, pred, target):
            return ((pred - target) / (pred.std(0) * torch.rand(()))).square().mean()
"""
NAMES = ("rmse", "bce", "masked", "keywords", "Holder.Noisy")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nan_witness_fixture.py").write_text(LOSSES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def errors(name: str, folder: Path) -> list[Finding]:
    return list(audit_loss(f"nan_witness_fixture:{name}", folder=folder).at_least("warning"))


def test_scripts_come_to_the_same_end_in_a_fresh_process(folder: Path) -> None:
    found = [finding for name in NAMES for finding in errors(name, folder)]
    assert {finding.witness.script for finding in found} >= {f"{name.split('.')[-1]}_witness.py" for name in NAMES}
    code = "import runpy, sys\nfor script in sys.argv[1:]:\n    print('==')\n    runpy.run_path(script)"
    scripts = [finding.witness.script for finding in found]
    result = subprocess.run([sys.executable, "-c", code, *scripts], capture_output=True, text=True, check=False, cwd=folder)
    assert result.returncode == 0, result.stderr
    outputs = result.stdout.split("==\n")[1:]
    assert len(outputs) == len(found)
    for finding, output in zip(found, outputs, strict=True):
        loss, *gradients = output.splitlines()
        if finding.witness.outcome.startswith("the loss is not finite"):
            assert loss.split()[1] in ("nan", "inf", "-inf")
        else:
            assert torch.isfinite(torch.tensor(float(loss.split()[1])))
            assert any(not line.startswith("gradient not finite in 0 of") for line in gradients)


def test_a_script_is_short(folder: Path) -> None:
    errors("rmse", folder)
    lines = (folder / "rmse_witness.py").read_text().splitlines()
    assert len(lines) <= 13
    assert "pred := target" in lines[0]


def test_what_cannot_be_imported_has_a_witness_and_no_script(folder: Path) -> None:
    (finding,) = audit_loss(lambda pred, target: (pred - target).square().mean().sqrt(), folder=folder).findings
    assert finding.witness.script == ""
    assert not list(folder.glob("*.pt"))


def test_a_folder_that_is_not_there_is_said(folder: Path) -> None:
    with pytest.raises(DataError):
        audit_loss("nan_witness_fixture:rmse", folder=folder / "none")


def test_every_form_of_the_report_shows_the_witness(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(errors("rmse", folder))
    report.print()
    for text in (" ".join(capsys.readouterr().out.split()), report.to_json(), report.to_sarif(), report.to_github(), report.to_html()):
        assert "pred := target" in text


def test_a_suspicion_that_the_search_does_not_bear_out_is_a_note() -> None:
    example = (1 + torch.rand(4)).requires_grad_()
    (finding,) = audit_loss(lambda x: (x.abs() + 0.0).sqrt().mean(), example, domain={"x": (1.0, 2.0)}).findings
    assert (str(finding.severity), finding.witness) == ("note", None)
    assert finding.message.endswith("not triggered within the search")
