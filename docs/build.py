"""Writes docs/rules/: one page per rule from its docstring, and an index."""

from __future__ import annotations

from pathlib import Path

from pl_normkit.rules import Rule, load_rules

FOLDER = Path(__file__).parent / "rules"


def page(rule: Rule) -> str:
    preview = " Preview: off until selected." if rule.preview else ""
    head = f"# {rule.code} {rule.name}\n\nSeverity: {rule.severity.value}. Mark: {rule.mark.value} ({rule.source}).{preview}\n"
    sections = [f"\n## {title}\n\n{text}\n" for title, text in rule.sections().items()]
    silence = f'\n## Silence\n\n`ignore=["{rule.code}"]`, `--ignore {rule.code}`, or `ignore = ["{rule.code}"]` in `[tool.pl-normkit]`.\n'
    return head + "".join(sections) + silence


def index(rules: list[Rule]) -> str:
    rows = [
        f"| [{rule.code}]({rule.code}.md) | {rule.name} | {rule.mark.value} | {rule.fix_safety.value} | {rule.summary} |" for rule in rules
    ]
    return "\n".join(["# Rules", "", "| code | name | mark | fix | what it does |", "|---|---|---|---|---|", *rows, ""])


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    rules = list(load_rules().values())
    for rule in rules:
        (FOLDER / f"{rule.code}.md").write_text(page(rule))
    (FOLDER / "README.md").write_text(index(rules))


if __name__ == "__main__":
    main()
