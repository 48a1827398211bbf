"""A user's package in the working directory, and the command line run on it."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pl_normkit.cli import main

USER_MODULE = """
import os
import sys

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return x + self.conv2(self.bn2(self.drop(self.conv1(self.bn1(x).relu()))).relu())


def build(drop=0.3):
    return nn.Sequential(nn.Conv2d(3, 4, 3), Block(drop), Block(drop))


class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


def fails():
    raise ValueError("width must be even")


def gives_nothing():
    return None


def leaves():
    sys.exit(0)


def leaves_at_once():
    os._exit(0)


def interrupts():
    raise KeyboardInterrupt


class Leaving(nn.Module):
    def forward(self, x):
        sys.exit(0)


def loss(prediction, target):
    return (prediction - target).square().mean()


def leaving_loss(prediction, target):
    sys.exit(0)


def empty_loaders():
    return [], []


def raising_loaders():
    def batches():
        raise OSError("disk gone")
        yield

    return batches(), batches()


def build_and_print():
    print("::error::from the user's module")
    model = build(0.0)
    model.add_module("odd\\udcff\\n::error::name", nn.Dropout())
    return model
"""


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "userpkg").mkdir()
    (tmp_path / "userpkg" / "models.py").write_text(USER_MODULE)
    (tmp_path / "userpkg" / "leaving.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "userpkg"]:
        del sys.modules[name]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_main(*words: str) -> Result:
        try:
            code = main(words)
        except SystemExit as stop:  # argparse's own way out
            code = int(stop.code or 0)
        return Result(code, *capsys.readouterr())

    return run_main
