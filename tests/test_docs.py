from __future__ import annotations

import ast
import doctest
import importlib.util
import inspect
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pl_normkit
from pl_normkit import callbacks
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


PAGES = sorted(DOCS.rglob("*.md"))
TUTORIALS = [DOCS / name for name in ("index.md", "first_audit.md", "model_audit.md", "dropout_placement.md")]
TUTORIALS += sorted((DOCS / "howto").glob("*.md"))


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of the libraries whose models the pages build
def test_code_of_a_page_runs(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In order, from a file, so that findings have lines."""
    script = tmp_path / f"{page.stem}.py"
    script.write_text("\n".join(blocks(page.read_text())))
    runpy.run_path(str(script))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_site_lists_every_page_once() -> None:
    text = (DOCS.parent / "mkdocs.yml").read_text()
    listed = re.findall(r": (\S+\.md)$|- (\S+\.md)$", text, flags=re.MULTILINE)
    named = [first or second for first, second in listed]
    assert len(set(named)) == len(named)
    expected = {str(page.relative_to(DOCS)) for page in PAGES if page.parent.name != "rules"} | {"rules/README.md"}
    assert set(named) == expected


def test_the_table_of_callbacks_has_a_row_for_each() -> None:
    rows = re.findall(r"^\| \[`(\w+)`\]\((\w+\.md)\)(.*)$", (DOCS / "before_you_use_it.md").read_text(), flags=re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == sorted(callbacks.__all__)
    assert {cells.count("|") for _, _, cells in rows} == {9}


def test_every_paper_of_a_room_is_in_the_bibliography() -> None:
    rooms = (DOCS.parent / "pl_normkit/methods").glob("*/__init__.py")
    numbers = {
        number for room in rooms for number in re.findall(r"arXiv (\d{4}\.\d{5})", ast.get_docstring(ast.parse(room.read_text())) or "")
    }
    assert len(numbers) >= 10
    assert numbers <= set(re.findall(r"eprint = \{(.*)\}", (DOCS / "citing.md").read_text()))


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
