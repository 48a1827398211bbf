"""docs/wiring.md shows a real output of every message of the room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from pl_normkit.methods import wiring
from pl_normkit.rules import load_rules
from tests.methods.wiring.outputs import SHOWN, output

ROOM = Path(wiring.__file__).parent
PAGE = (Path(__file__).parents[3] / "docs" / "wiring.md").read_text()


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_the_page_shows_what_is_said(name: str) -> None:
    assert output(name) in PAGE


def test_every_rule_is_shown() -> None:
    codes = {rule.code: rule.name for rule in load_rules().values() if rule.code.startswith("NK0")}
    assert [code for code, name in codes.items() if f"\n{code} {name}: " not in PAGE] == []


def messages(tree: ast.Module) -> Iterator[ast.expr]:
    """What observations are made with, and the texts that become a part of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Observation", "_observation"):
            yield node.args[2 if getattr(node.func, "id", "") == "_observation" else 0]
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("why", "message", "verb"):
            yield node.value
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Mixing":
            yield node.args[2]
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            yield node.value.elts[0]


@pytest.mark.parametrize("file", ["rules.py", "mode_rules.py", "input_rules.py", "preview_rules.py", "unlearned.py", "mixing.py"])
def test_every_message_is_shown(file: str) -> None:
    texts = [
        part.value
        for message in messages(ast.parse((ROOM / file).read_text()))
        for part in ast.walk(message)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]
    assert texts
    assert [text for text in texts if text.strip().lower() not in PAGE.lower()] == []
