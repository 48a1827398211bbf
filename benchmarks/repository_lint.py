"""How long a lint of 20 timm models takes: a command for each, one process, two processes, and from the cache.

    OMP_NUM_THREADS=1 python benchmarks/repository_lint.py [--jobs 2] [--models 20]     writes benchmarks/results/repository_lint.csv

Every way starts with no cache of ours. The share is that of `--jobs 1`; load of other programs spoils it.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "repository_lint.csv"
RUN = [sys.executable, "-c", "import sys; from pl_normkit.cli import main; sys.exit(main(sys.argv[1:]))", "lint", "--format", "json"]
MODELS = [
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_b3",
    "mobilenetv3_large_100",
    "convnext_tiny",
    "convnextv2_atto",
    "regnety_016",
    "vgg16_bn",
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "deit3_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "mixer_s16_224",
    "resmlp_12_224",
    "nfnet_f0",
    "ghostnet_100",
]


def seconds(folder: Path, commands: Sequence[Sequence[str]]) -> float:
    """Findings give exit code 1, which is fine here; an error is not."""
    start = time.perf_counter()
    for words in commands:
        done = subprocess.run([*RUN, *words], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode > 1:
            raise RuntimeError(done.stderr)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--models", type=int, default=len(MODELS), help="how many of the 20")
    options = parser.parse_args()
    names, jobs = MODELS[: options.models], str(options.jobs)
    ways: dict[str, list[list[str]]] = {
        "--jobs 1": [["--jobs", "1", "--no-cache"]],
        f"--jobs {jobs}": [["--jobs", jobs, "--no-cache"]],
        f"--jobs {jobs}, writing the cache": [["--jobs", jobs]],
        "from the cache": [["--jobs", jobs]],
        "a command for each model": [[f"timm:{name}"] for name in names],
    }
    with tempfile.TemporaryDirectory() as folder:
        table = "\n".join(f'[tool.pl-normkit.models.{name}]\nmodel = "timm:{name}"\n' for name in names)
        Path(folder, "pyproject.toml").write_text(table, encoding="utf-8")
        measured = {way: seconds(Path(folder), commands) for way, commands in ways.items()}
    rows = [(way, len(names), f"{value:.1f}", f"{value / measured['--jobs 1']:.2f}") for way, value in measured.items()]
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["way", "models", "seconds", "share"])
        writer.writerows(rows)
    for way, _, spent, share in rows:
        print(f"{spent:>7} s  {share:>5}  {way}")


if __name__ == "__main__":
    main()
