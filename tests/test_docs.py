from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from pl_normkit.rules import Rule, load_rules

DOCS = Path(__file__).parents[1] / "docs"
SPEC = importlib.util.spec_from_file_location("build_docs", DOCS / "build.py")
assert SPEC is not None
assert SPEC.loader is not None
build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)


@pytest.mark.parametrize("rule", load_rules().values(), ids=lambda rule: rule.code)
def test_the_page_is_what_the_docstring_says(rule: Rule) -> None:
    """`make docs` writes the pages."""
    assert (DOCS / "rules" / f"{rule.code}.md").read_text() == build.page(rule)


def test_the_index_names_every_rule() -> None:
    assert (DOCS / "rules" / "README.md").read_text() == build.index(list(load_rules().values()))
