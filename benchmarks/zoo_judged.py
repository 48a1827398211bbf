"""How many findings on the swept models are right, of those that were judged by hand in `zoo_judged.csv`.

    python benchmarks/zoo_judged.py

One line of `zoo_judged.csv` is one rule on one architecture: in which forms it fired (as shipped, with dropout switched on), whether that
is right, why, and the line of the library that shows it. `now` says whether the sweep still finds it: what was judged wrong was fixed and
stays in the list. The tables of `zoo.py` and `zoo_libraries.py` are held against the list: a finding that nobody judged is named, and the
exit status is 1.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from pl_normkit.rules import load_rules

HERE = Path(__file__).parent
TABLES = [HERE / "results" / name for name in ("zoo.csv", "zoo_libraries.csv")]
Key = tuple[str, str, str]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def found() -> Iterator[tuple[Key, str]]:
    """Rule, library and architecture of each finding in the tables, and the form it was found in."""
    codes = load_rules()
    for path in TABLES:
        for row in read(path):
            for code in codes:
                if row.get(code) not in (None, "", "0"):
                    yield (code, row["family"], row["model"]), row["form"]


def main() -> int:
    judged = {(row["rule"], row["library"], row["model"]): row for row in read(HERE / "zoo_judged.csv")}
    findings = set(found())
    rules = load_rules()
    for name, is_preview in (("default", False), ("preview", True)):
        lines = [row for key, row in judged.items() if rules[key[0]].preview is is_preview]
        for when, chosen in (("at first", lines), ("now", [row for row in lines if row["now"] == "found"])):
            count = sum(len(row["forms"].split("+")) for row in chosen)
            right = sum(len(row["forms"].split("+")) for row in chosen if row["judged"] == "right")
            print(f"{name} findings, {when}: {right} of {count} right ({right / count:.1%}), {len(chosen)} of a rule on an architecture")
    missing = sorted(
        f"{code} {library} {model} ({form})"
        for (code, library, model), form in findings
        if form not in judged.get((code, library, model), {"forms": ""})["forms"].split("+")
    )
    gone = sorted(key for key, row in judged.items() if row["now"] == "found" and not any(seen == key for seen, _ in findings))
    for text in missing:
        print(f"  not judged: {text}")
    for key in gone:
        print(f"  judged, and no longer found: {' '.join(key)}")
    return int(bool(missing or gone))


if __name__ == "__main__":
    sys.exit(main())
