"""Scale equalizers and atrous rates on TextureMosaic: pairs of runs of three architectures, five seeds for each comparison.

    python benchmarks/compare_segmentation.py          # the table of docs/segmentation.md; about half an hour of one core

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
# Narrow decoders where they are most of the time. AtrousRates acts on ASPP alone, which DeepLab has.
COMPARISONS = (
    ("DeepLabV3Plus", "{decoder_channels: 64}", "AtrousRates"),
    ("PSPNet", "{}", "ScaleEqualization"),
    ("DeepLabV3Plus", "{decoder_channels: 64}", "ScaleEqualization,AtrousRates"),
    ("UPerNet", "{decoder_channels: 64}", "ScaleEqualization"),
)
SETTINGS = [
    "--model.encoder_name=resnet18",
    "--data=TextureMosaic",
    "--data.train_count=240",
    "--data.batch_size=8",
    "--data.crop_size=96",
    "--trainer.max_epochs=4",
    "--trainer.check_val_every_n_epoch=2",
]


def compare(architecture: str, options: str, callbacks: str, seeds: int) -> dict[str, object]:
    """Train the pairs of one comparison; a row of the table."""
    folder = Path("runs/compare") / f"textures-{architecture}-{callbacks.replace(',', '-')}"
    words = [f"--model.architecture={architecture}", f"--model.model_options={options}", *SETTINGS]
    code = main(["compare", "segmentation", "--with", callbacks, f"--seeds={seeds}", f"--out={folder}", *words])
    if code:
        raise SystemExit(code)
    with (folder / "runs.csv").open() as file:
        rows = {(int(row["seed"]), row["arm"]): row for row in csv.DictReader(file)}
    arms = ("without", callbacks.replace(",", "+"))
    without, with_it = ([float(rows[seed, arm]["val_miou"]) for seed in range(seeds)] for arm in arms)
    seconds = [[float(rows[seed, arm]["seconds"]) for seed in range(seeds)] for arm in arms]
    found = paired_difference(without, with_it)
    return {
        "architecture": architecture,
        "with": callbacks,
        "mIoU without": f"{sum(without) / seeds:.3f}",
        "mIoU with": f"{sum(with_it) / seeds:.3f}",
        "difference": f"{found.mean:+.3f}",
        "95 % interval": f"{found.low:+.3f} to {found.high:+.3f}",
        "pairs": found.count,
        "seconds without": f"{median(seconds[0]):.0f}",
        "seconds with": f"{median(seconds[1]):.0f}",
        "time with / without": f"{median(after / before for before, after in zip(*seconds, strict=True)):.2f}",
    }


def run() -> None:
    """Compare all and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", type=int, nargs="+", choices=range(len(COMPARISONS)), default=range(len(COMPARISONS)), metavar="N")
    options = parser.parse_args()
    rows = [compare(*COMPARISONS[index], options.seeds) for index in options.only]
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    run()
