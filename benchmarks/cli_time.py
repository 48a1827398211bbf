"""How long the command line takes to answer: `--help`, `rules`, `explain` alone, and `lint` over importing torch and the model's library.

    python benchmarks/cli_time.py [--repeats 5]     writes benchmarks/results/cli_time.csv

Each command runs in a process of its own; the best of the repeats is kept, since other load only adds time.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "cli_time.csv"
RUN = "import sys; from pl_normkit.cli import main; sys.exit(main({words!r}))"
PROGRAMS = {
    "python alone": "pass",
    "--help": RUN.format(words=["--help"]),
    "lint --help": RUN.format(words=["lint", "--help"]),
    "rules": RUN.format(words=["rules"]),
    "explain NK101": RUN.format(words=["explain", "NK101"]),
    "import torch, timm": "import torch, timm",
    "import torch, timm, torch.export and the export of resnet18": (
        "import torch, timm\n"
        "with torch.device('meta'):\n    model, x = timm.create_model('resnet18'), torch.zeros(2, 3, 224, 224)\n"
        "torch.export.export(model, (x,))"
    ),
    "lint timm:resnet18": RUN.format(words=["lint", "timm:resnet18"]),
}


def seconds(program: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    best = {name: float("inf") for name in PROGRAMS}
    for _ in range(repeats):
        for name, program in PROGRAMS.items():  # in turn, so that a change of the machine's load meets all alike
            best[name] = min(best[name], seconds(program))
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["program", "seconds"])
        writer.writerows((name, f"{value:.2f}") for name, value in best.items())
    for name, value in best.items():
        print(f"{value:6.2f} s  {name}")


if __name__ == "__main__":
    main()
