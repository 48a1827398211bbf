"""Audits the architectures of transformers, diffusers, monai, torchaudio and torchvision (video, detection) and compares them with
counts by hand.

    python benchmarks/zoo_libraries.py [--only transformers.bert] [--output benchmarks/results/zoo_libraries.csv] [--known]

Every architecture is built on the meta device with two layers, its other sizes as its configuration has them (a vocabulary of 2,000 at
most), and audited with every rule, previews included. The CSV says for each: whether it was traced, residual additions, fusions, heads
and norms as read; the additions that `zoo_truth.py` derives by hand from the configuration; how many of the parameters whose role
`zoo_truth.py` knows by name were read so; findings by code; seconds; what crashed. `--known` leaves out what has no count by hand.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import rich.progress
import torch
from torch import nn
from zoo import key_of, read_counts, read_findings, read_table, write_table
from zoo_architectures import Case, Inputs, cases
from zoo_truth import ROLES, expected_adds, is_counted

from pl_normkit.graph.export import call_arguments
from pl_normkit.methods.weight_decay.find import read_graph
from pl_normkit.rules import Subject, load_rules

RESULTS = Path(__file__).parent / "results" / "zoo_libraries.csv"
SECONDS = 120


class TooLongError(BaseException):
    """No `Exception`, so that nobody takes it for a failed trace."""


def _too_long(*_: Any) -> None:
    raise TooLongError(f"longer than {SECONDS} s")


class LeftOutError(Exception):
    """An architecture that is not described here: it does not build, or is called otherwise."""


def read_case(case: Case, codes: list[str]) -> dict[str, Any]:
    """One row of the table; raises LeftOutError."""
    row: dict[str, Any] = {"family": case.library, "model": case.name, "form": "shipped", "crash": "", "traced": "no"}
    started = time.perf_counter()
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, inputs = build(case)
            subject = Subject(model=model.train(), example_inputs=inputs, measure=False)
            found, graph = read_findings(subject, codes)
            if (graph is None or graph.unseen) and (reason := why_not_called(model, inputs)):
                raise LeftOutError(reason)
        row |= found
        if graph is not None:
            row |= {
                **read_counts(graph),
                **read_adds(case, model, graph),
                **read_roles(model, graph),
                "traced": "part" if graph.unseen else "yes",
            }
    except TooLongError as error:
        row["crash"] = f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def build(case: Case) -> tuple[nn.Module, Inputs]:
    """The model and what it is called with."""
    try:
        model = case.build()
        with torch.device(next(model.parameters()).device):
            return model, case.inputs(model)
    except Exception as error:
        raise LeftOutError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def why_not_called(model: nn.Module, inputs: Inputs) -> str:
    """The error of a forward pass in eval mode, "" where it runs or only asks the meta device for values."""
    args, kwargs = call_arguments(inputs)
    try:
        with torch.no_grad():
            model.eval()(*args, **kwargs)
    except Exception as error:
        return "" if "meta" in str(error) else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def read_adds(case: Case, model: nn.Module, graph: Any) -> dict[str, Any]:
    expected = expected_adds(case.library, case.name, model)
    kinds = Counter(add.kind for add in graph.residual_adds)
    if expected is None:
        return {}
    is_right = expected == (kinds["identity"], kinds["projection"]) if isinstance(expected, tuple) else expected == sum(kinds.values())
    return {"adds_by_hand": "+".join(map(str, expected)) if isinstance(expected, tuple) else expected, "adds_right": int(is_right)}


def read_roles(model: nn.Module, graph: Any) -> dict[str, Any]:
    """How many parameters that the forward pass reads, and whose name tells its role, were read so; and those that were not."""
    roles = read_graph(model, graph).roles
    known = {
        name: (role, wanted)
        for name, role in roles.items()
        if (wanted := _known_role(name)) and name in {n for node in graph.nodes for n in node.parameters}
    }
    wrong = [f"{name}={role}" for name, (role, wanted) in known.items() if str(role) not in wanted]
    return {"roles_by_hand": len(known), "roles_wrong": len(wrong), "wrong_roles": " ".join(wrong[:40])}


def _known_role(name: str) -> tuple[str, ...] | None:
    return next((wanted for pattern, wanted in ROLES if re.search(pattern, name)), None)


MORE = ["traced", "adds_by_hand", "adds_right", "roles_by_hand", "roles_wrong", "wrong_roles"]


def main() -> int:
    """Read the architectures; exit status 1 when anything crashed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a pattern of LIBRARY.NAME: read these, keep the other rows of the table")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--known", action="store_true", help="only those whose additions were counted by hand")
    parser.add_argument("--summary", action="store_true", help="read nothing; say what the table holds")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    signal.signal(signal.SIGALRM, _too_long)
    codes = sorted(load_rules())
    rows = read_table(options.output) if options.only or options.summary or options.known else {}
    left_out: list[str] = []
    chosen = [] if options.summary else [case for case in cases() if re.search(options.only, f"{case.library}.{case.name}")]
    for case in rich.progress.track(chosen, description="reading the libraries"):
        if not options.known or is_counted(case.library, case.name):
            try:
                row = read_case(case, codes)
            except LeftOutError as error:
                left_out.append(f"{case.library}.{case.name}: {error}")
                continue
            rows[key_of(row)] = row
            write_table(options.output, rows, codes, MORE)
    print(f"{len(left_out)} left out, which do not build here or are called otherwise:", *left_out, sep="\n  ")
    return summarize(list(rows.values()), codes)


def summarize(rows: list[dict[str, Any]], codes: list[str]) -> int:
    """Print shares, and what is wrong; 1 where something crashed."""
    seen = [row for row in rows if row["traced"] != "no"]
    counted = [row for row in seen if row.get("adds_right") not in ("", None)]
    right = [row for row in counted if int(row["adds_right"])]
    known, wrong = (sum(int(row.get(name) or 0) for row in seen) for name in ("roles_by_hand", "roles_wrong"))
    print(f"{len(rows)} architectures; traced {len(seen)}, whole {sum(row['traced'] == 'yes' for row in rows)}")
    print(f"residual additions as counted by hand: {len(right)} of {len(counted)}")
    print(f"roles as their names say: {known - wrong} of {known}")
    print("architectures with a finding:", {code: count for code in codes if (count := sum(int(row.get(code) or 0) > 0 for row in seen))})
    for row in counted:
        if row not in right:
            print(f"  {row['family']}.{row['model']}: {row['identity_adds']}+{row['projection_adds']}, by hand {row['adds_by_hand']}")
    for row in rows:
        if row["crash"]:
            print(f"  {row['family']}.{row['model']}: {row['traced']} {row['crash'][:300]}")
    return int(any("failed with" in row["crash"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
