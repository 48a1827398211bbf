from __future__ import annotations

import json
from pathlib import Path

import pytest

from pl_normkit.cli import main
from pl_normkit.methods.weight_decay.measure import HISTORY_FILE, read_history, write_history

ADAMW = "torch.optim.AdamW(lr=1e-3, weight_decay=0.05)"


def test_lint_judges_the_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["lint", "timm:resnet18", "--optimizer", ADAMW, "--format", "json", "--select", "NK2"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert (code, sorted({finding["code"] for finding in findings})) == (1, ["NK201", "NK203", "NK207"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lint", "--optimizer", ADAMW], "an optimizer needs a model"),
        (["lint", "timm:resnet18", "--optimizer", "torch.optim.AdamX()"], "is no optimizer class"),
        (["lint", "timm:resnet18", "--optimizer", "AdamW(lr=-1)"], "does not take these options"),
        (["report", "nowhere"], "nothing was recorded"),
    ],
)
def test_bad_words_give_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (main(words), message in capsys.readouterr().err) == (2, True)


def test_report_draws_what_a_run_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = {"gamma_last": [(0, 4.0), (10, 2.0)]}
    write_history(history, tmp_path / HISTORY_FILE)
    assert read_history(tmp_path / HISTORY_FILE) == history
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "gamma_last: 4 at step 0 -> 2 at step 10"
    assert (tmp_path / "gamma_norms.png").read_bytes().startswith(b"\x89PNG")
