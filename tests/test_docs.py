from __future__ import annotations

import doctest
import importlib.util
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pl_normkit
from pl_normkit.rules import Rule, load_rules

DOCS = Path(__file__).parents[1] / "docs"
SPEC = importlib.util.spec_from_file_location("build_docs", DOCS / "build.py")
assert SPEC is not None
assert SPEC.loader is not None
build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)


DOCUMENTS = build.documents()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_make_docs_writes_is_committed(path: Path) -> None:
    assert path.read_text() == DOCUMENTS[path]


def test_no_page_outlives_its_rule() -> None:
    assert set((DOCS / "rules").glob("*.md")) == {path for path in DOCUMENTS if path.parent.name == "rules"}


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("rule", load_rules().values(), ids=lambda rule: rule.code)
def test_examples_of_a_rule_are_code_that_runs(rule: Rule) -> None:
    """In order, as a reader would type them: `Use instead` may use what `Example` has defined."""
    names: dict[str, Any] = {}
    for title in ("Example", "Use instead"):
        found = blocks(rule.sections()[title])
        assert found, f"{title} holds no fenced code"
        for block in found:
            exec(compile(block, f"{rule.code} {title}", "exec"), names)


EXPORTED = [getattr(pl_normkit, name) for name in sorted(pl_normkit._homes())]
FUNCTIONS = [value for value in EXPORTED if inspect.isfunction(value)]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_examples_of_the_front_door_run(function: Callable[..., Any]) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs=dict(function.__globals__))
    assert example.examples, "there is no >>> example"
    outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(example)
    assert outcome.failed == 0
