"""What `import pl_normkit` costs on top of `import torch`, in fresh processes run in turns. Writes results/import_time.csv.

    python benchmarks/import_time.py [--rounds 15]

Each round runs both imports in a random order; the ratio of a round is free of what the machine does in the long run.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import random
import statistics
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "import_time.csv"
TARGET = 1.15
IMPORTS = {"torch": "import torch", "both": "import torch, pl_normkit"}
TIMED = (
    "import time; wall, cpu = time.perf_counter(), time.process_time(); {}; print(time.perf_counter() - wall, time.process_time() - cpu)"
)


def seconds(statement: str) -> tuple[float, float]:
    """Wall-clock and processor seconds that `statement` takes in a fresh process, its start not counted."""
    command = [sys.executable, "-c", TIMED.format(statement)]
    wall, cpu = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(wall), float(cpu)


def measure(rounds: int) -> list[dict[str, float]]:
    rows = []
    for number in range(-1, rounds):  # the first round only warms the file cache
        order = random.sample(sorted(IMPORTS), k=len(IMPORTS))
        taken = {name: seconds(IMPORTS[name]) for name in order}
        if number >= 0:
            (torch_wall, torch_cpu), (both_wall, both_cpu) = taken["torch"], taken["both"]
            row = {"torch_s": torch_wall, "both_s": both_wall, "ratio": both_wall / torch_wall, "cpu_ratio": both_cpu / torch_cpu}
            rows.append({"round": number, **row})
            print(f"round {number}: torch {torch_wall:.3f} s, with pl_normkit {both_wall:.3f} s, processor ratio {row['cpu_ratio']:.3f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rows = measure(parser.parse_args().rounds)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "machine"])
        writer.writeheader()
        writer.writerows({**row, "machine": machine} for row in rows)
    ratio = statistics.median(row["ratio"] for row in rows)
    cpu_ratio = statistics.median(row["cpu_ratio"] for row in rows)
    print(f"import torch, pl_normkit over import torch, median of {len(rows)} rounds: wall {ratio:.3f}, processor {cpu_ratio:.3f}")
    print(f"target {TARGET}: {'met' if ratio <= TARGET else 'missed'}; written to {RESULTS}")


if __name__ == "__main__":
    main()
