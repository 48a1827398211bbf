"""Scale equalizers and atrous rates on TextureMosaic: pairs of runs of three architectures, five seeds each.

    python benchmarks/compare_segmentation.py          # the table of docs/segmentation.md; about 15 minutes of one core

Prints the table as Markdown and writes benchmarks/results/compare_segmentation.csv. Runs that a former call has trained are not trained
again: they lie in runs/compare.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from statistics import median

from pl_normkit.cli import main
from pl_normkit.recipes.paired_difference import paired_difference

RESULTS = Path(__file__).parent / "results" / "compare_segmentation.csv"
# UPerNet at full width would take as long as the others together.
ARCHITECTURES = {
    "DeepLabV3Plus": ("ScaleEqualization,AtrousRates", "{}"),
    "UPerNet": ("ScaleEqualization", "{decoder_channels: 64}"),
    "PSPNet": ("ScaleEqualization", "{}"),
}
SETTINGS = [
    "--model.encoder_name=resnet18",
    "--data=TextureMosaic",
    "--data.train_count=240",
    "--data.batch_size=8",
    "--data.crop_size=96",
    "--trainer.max_epochs=4",
    "--trainer.check_val_every_n_epoch=2",
]


def compare(architecture: str, callbacks: str, options: str, seeds: int) -> dict[str, object]:
    """Train the pairs of one architecture; a row of the table."""
    folder = Path("runs/compare") / f"textures-{architecture}"
    words = [f"--model.architecture={architecture}", f"--model.model_options={options}", *SETTINGS]
    code = main(["compare", "segmentation", "--with", callbacks, f"--seeds={seeds}", f"--out={folder}", *words])
    if code:
        raise SystemExit(code)
    with (folder / "runs.csv").open() as file:
        rows = {(int(row["seed"]), row["arm"]): row for row in csv.DictReader(file)}
    without, with_it = ([float(rows[seed, arm]["metric"]) for seed in range(seeds)] for arm in ("without", "with"))
    seconds = [[float(rows[seed, arm]["seconds"]) for seed in range(seeds)] for arm in ("without", "with")]
    found = paired_difference(without, with_it)
    return {
        "architecture": architecture,
        "with": callbacks,
        "mIoU without": f"{sum(without) / seeds:.3f}",
        "mIoU with": f"{sum(with_it) / seeds:.3f}",
        "difference": f"{found.mean:+.4f}",
        "95 % interval": f"{found.low:+.4f} to {found.high:+.4f}",
        "pairs": found.count,
        "time": f"{median(after / before for before, after in zip(*seconds, strict=True)):.2f}",
    }


def run() -> None:
    """Compare all and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    options = parser.parse_args()
    rows = [compare(name, *ARCHITECTURES[name], options.seeds) for name in options.architectures]
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    run()
