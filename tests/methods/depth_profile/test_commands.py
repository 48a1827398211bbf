"""`pl-normkit profile`: the table, JSON, the picture, and one message for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pl_normkit.cli import main

SPEC = "timm:vit_tiny_patch16_224?img_size=32&embed_dim=16&depth=2&num_heads=2"


def test_it_prints_the_table_and_writes_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile.png"
    assert main(["profile", SPEC, "--input", "3,32,32", "--eval", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["blocks.0", "blocks.0", "blocks.1", "blocks.1"]
    assert out.read_bytes().startswith(b"\x89PNG")


def test_json_is_the_same_in_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for _ in range(2):
        assert main(["profile", SPEC, "--input", "3,32,32", "--json"]) == 0
        outputs.append(json.loads(capsys.readouterr().out))
    assert len(outputs[0]["additions"]) == 4
    assert outputs[0] == outputs[1]


def test_a_model_without_residual_additions_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "torchvision:alexnet", "--input", "3,64,64"]) == 2
    assert "no residual addition was found" in capsys.readouterr().err
