"""`pl-normkit lint --loss` and `pl-normkit replay`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pl_normkit.cli import main
from pl_normkit.methods.nan_safety.diagnosis.first_bad import diagnose
from pl_normkit.methods.nan_safety.diagnosis.replay import RandomState, save_replay

LOSSES = """
import torch

def bad(pred, target):
    return torch.sqrt((pred - target).square().mean())

def good(pred, target):
    return (pred - target).square().mean()

def ratio(pred, target):
    return (pred / target).mean()

def pair():
    return torch.zeros(3), torch.zeros(3)
"""


@pytest.fixture
def losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "nan_commands_fixture.py").write_text(LOSSES)
    monkeypatch.chdir(tmp_path)
    return "nan_commands_fixture"


@pytest.mark.parametrize(("words", "code"), [(["bad"], 1), (["good"], 0), (["bad", "--example", "{}:pair"], 1), (["missing"], 2)])
def test_lint_loss(losses: str, words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    name, *rest = words
    assert main(["lint", "--loss", f"{losses}:{name}", *(word.format(losses) for word in rest)]) == code
    out = capsys.readouterr().out
    assert ("NK401" in out) == (code == 1)
    assert ("nan_commands_fixture.py:5" in out) == (code == 1)


def test_the_witness_is_shown_and_its_script_written(losses: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", "--loss", f"{losses}:bad"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "witness pred := target" in out
    assert "python bad_witness.py" in out
    assert {path.name for path in Path.cwd().glob("bad_witness*")} == {"bad_witness.py", "bad_witness.pt"}
    assert main(["lint", "--loss", f"{losses}:good"]) == 0
    assert not list(Path.cwd().glob("good_witness*"))


def test_the_users_world_on_the_command_line(losses: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["lint", "--loss", f"{losses}:ratio", "--fail-on", "warning"]
    assert main(words) == 1
    assert main([*words, "--domain", "target=0.1:80"]) == 0
    assert main([*words, "--fixed", "target", "--search-seconds", "0.5"]) == 0
    capsys.readouterr()
    assert main([*words, "--domain", "target=positive"]) == 2
    assert "NAME=LOW:HIGH" in capsys.readouterr().err


def test_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Linear(2, 1)
    diagnosis, record = diagnose(lambda: (net(torch.ones(1, 2)) * 0).log().sum(), net, None)
    save_replay(tmp_path / "event.pt", diagnosis, record, None, RandomState.now(), {"step": 1})
    assert main(["replay", str(tmp_path / "event.pt")]) == 0
    assert "torch.Tensor.log" in capsys.readouterr().out
    assert main(["replay", str(tmp_path / "none.pt")]) == 2
