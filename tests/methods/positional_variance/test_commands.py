"""`pl-normkit lint MODEL --loaders MODULE:NAME`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from timm.data import Mixup

from pl_normkit.cli import main
from pl_normkit.rules import Loaders
from tests.methods.positional_variance.test_rules import loader, normalised, timm_loader

MODEL = "timm:vit_tiny_patch16_224?img_size=64&depth=1"


def make() -> Any:
    return timm_loader(re_prob=0.25), loader(normalised())


def make_three() -> Any:
    return (*make(), [Mixup(0.8)])


def make_loaders() -> Any:
    return Loaders(*make())


def make_one() -> Any:
    return loader(normalised())


def fail() -> Any:
    raise FileNotFoundError("no such folder: data")


@pytest.mark.parametrize(
    ("name", "options", "codes", "measured"),
    [
        ("make", ["--select", "NK7"], ["NK702"], 0),
        ("make_three", ["--select", "NK7"], ["NK701", "NK702"], 0),
        ("make_loaders", ["--select", "NK702", "--real"], ["NK702"], 1),
    ],
)
def test_lint_judges_the_loaders(name: str, options: list[str], codes: list[str], measured: int, capsys: Any) -> None:
    words = ["lint", MODEL, "--input", "3,64,64", "--loaders", f"{__name__}:{name}", "--format", "json", *options]
    assert main(words) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [finding["code"] for finding in findings] == codes
    assert sum(item["is_measured"] for finding in findings for item in finding["evidence"]) == measured


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loaders", f"{__name__}:make"], "loaders are judged for a model"),
        ([MODEL, "--input", "3,64,64", "--loaders", f"{__name__}:make_one"], "gives no loaders\n  seen: a DataLoader"),
        ([MODEL, "--input", "3,64,64", "--loaders", f"{__name__}:fail"], "failed\n  seen: FileNotFoundError: no such folder: data"),
        ([MODEL, "--input", "3,64,64", "--loaders", f"{__name__}:maker"], "has no 'maker'"),
    ],
)
def test_loaders_that_are_none(words: list[str], message: str, capsys: Any) -> None:
    assert main(["lint", *words]) == 2
    assert message in capsys.readouterr().err
