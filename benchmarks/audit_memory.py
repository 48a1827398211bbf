"""Peak memory of an audit of models too large to build on most machines, on the meta device.

    python benchmarks/audit_memory.py

Each model is audited in a fresh process; `peak_mb` is that process's ru_maxrss, imports included. Target: below 1500.
"""

from __future__ import annotations

import csv
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import rich.progress

RESULTS = Path(__file__).parent / "results" / "audit_memory.csv"
MODELS = ("timm:resnet50", "timm:vit_giant_patch14_224", "timm:vit_gigantic_patch14_224", "timm:eva02_enormous_patch14_clip_224")


def peak_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


def audit_here(spec: str) -> dict[str, object]:
    """Audit `spec` in this process and say what it cost."""
    import torch

    from pl_normkit import audit
    from pl_normkit.inputs import parse_inputs
    from pl_normkit.specs import build_model

    model = build_model(spec)
    before = peak_mb()
    report = audit(model, parse_inputs([], model))
    assert not report.notes, report.notes
    return {
        "model": spec,
        "parameters_m": round(sum(parameter.numel() for parameter in model.parameters()) / 1e6),
        "peak_before_audit_mb": round(before),
        "peak_mb": round(peak_mb()),
        "torch": torch.__version__,
    }


def main() -> None:
    """Measure every model in its own process and write the table."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    rows = []
    for spec in rich.progress.track(MODELS, description="measuring memory"):
        command = [sys.executable, str(Path(__file__).resolve()), spec]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        rows.append(json.loads(finished.stdout.splitlines()[-1]))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(f"{row['model']:44} {row['parameters_m']} M parameters, peak {row['peak_mb']} MB")
    print(f"largest {max(row['peak_mb'] for row in rows)} MB (target 1500); written to {RESULTS}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(audit_here(sys.argv[1])))
    else:
        main()
