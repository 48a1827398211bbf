"""How much longer an audit takes than the export it starts with.

    python benchmarks/audit_overhead.py [--repeats 3]

For each model: `audit(model, inputs)` (trace and all default rules) over `torch.export.export(model, inputs, strict=False)`,
timed alternately in one process after a warm-up of both, on the meta device
(on the CPU where a model cannot be built there). The ratio of a model is the median of its pairs.
Targets: median over the models <= 1.10, largest <= 1.3.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import rich.progress
import torch

from pl_normkit import audit
from pl_normkit.specs import build_model

RESULTS = Path(__file__).parent / "results" / "audit_overhead.csv"
MODELS = {
    "timm:resnet50": 224,
    "timm:wide_resnet50_2": 224,
    "timm:densenet121": 224,
    "timm:vit_base_patch16_224": 224,
    "timm:swin_base_patch4_window7_224": 224,
    "timm:convnext_base": 224,
    "timm:efficientnet_b3": 288,
    "timm:regnety_032": 224,
    "smp:DeepLabV3Plus?encoder_name=resnet50": 512,
    "smp:Unet?encoder_name=resnet50": 512,
    "smp:UPerNet?encoder_name=resnet50": 512,
    "smp:Segformer?encoder_name=mit_b0": 512,
}


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds of one call: other processes on the machine do not count."""
    gc.collect()
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(spec: str, side: int, repeats: int) -> dict[str, object]:
    """One row: median seconds of each and the median ratio of the pairs."""
    model = build_model(spec).train()
    inputs = (torch.zeros(2, 3, side, side, device=next(model.parameters()).device),)

    def export() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, inputs, strict=False)

    def full_audit() -> object:
        report = audit(model, inputs)
        assert not report.notes, report.notes
        return report

    export()
    full_audit()
    pairs = []
    for turn in range(repeats):
        first, second = (export, full_audit) if turn % 2 == 0 else (full_audit, export)
        times = {first: seconds(first), second: seconds(second)}
        pairs.append((times[export], times[full_audit]))
    ratios = [audited / exported for exported, audited in pairs]
    return {
        "model": spec,
        "export_s": round(statistics.median(exported for exported, _ in pairs), 3),
        "audit_s": round(statistics.median(audited for _, audited in pairs), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "pairs": repeats,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }


def main() -> None:
    """Measure every model and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [spec for spec in MODELS if options.only in spec]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for spec in rich.progress.track(chosen, description="timing audits"):
        rows.append(measure(spec, MODELS[spec], options.repeats))
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    for row in rows:
        print(f"{row['model']:42} export {row['export_s']:.2f} s  audit {row['audit_s']:.2f} s  ratio {row['ratio']:.3f}")
    ratios = [float(str(row["ratio"])) for row in rows]
    print(f"median {statistics.median(ratios):.3f} (target 1.10), largest {max(ratios):.3f} (target 1.3); written to {options.output}")


if __name__ == "__main__":
    main()
