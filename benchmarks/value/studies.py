"""Remedies that scripts of their own have measured: rows of docs/value.md from whatever their CSVs hold."""

from __future__ import annotations

__all__ = ["Study", "read_studies"]

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Rows = Sequence[Mapping[str, str]]
Values = Mapping[str, float]
"""Seed -> value."""


@dataclass(frozen=True)
class Study:
    """One table of the page.

    Attributes:
        remedy: what was tried, and `page` where it is explained.
        setting: data, network, optimizer, in a sentence.
        metric: what is compared.
        command: what writes the CSV.
        arms: name -> its value by seed.
        contrasts: pairs (arm, against).
        seconds: of processor time, or wall time, as the script counts.
        limits: what the result does not say.
    """

    remedy: str
    page: str
    setting: str
    metric: str
    command: str
    arms: Mapping[str, Values]
    contrasts: Sequence[tuple[str, str]]
    seconds: float
    limits: str = ""


def read_studies(results: Path) -> list[Study]:
    """Those whose CSV is there and holds a contrast."""
    made = [*_timestep(_read(results / "timestep_toy.csv")), *_boxes(_read(results / "box_supervision.csv"))]
    made += [*_diffusion(_read(results / "compare_diffusion_time.csv")), *_depth(_read(results / "depth.csv"))]
    return [study for study in made if study.contrasts]


def _read(path: Path) -> Rows:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _by_arm(rows: Sequence[tuple[str, str, str]]) -> dict[str, dict[str, float]]:
    """From (arm, seed, value)."""
    arms: dict[str, dict[str, float]] = {}
    for arm, seed, value in rows:
        arms.setdefault(arm, {})[seed] = float(value) if value else math.nan
    return arms


def _timestep(rows: Rows) -> list[Study]:
    rows = [row for row in rows if "seed" in row]  # an older file holds means alone
    arms = _by_arm([(f"{row['time']} time, {row['norm']}: {row['injection']}", row["seed"], row["loss"]) for row in rows])
    asked = [
        ("shared", "batch", "positional"),
        ("shared", "instance", "positional"),
        ("per sample", "instance", "positional"),
        ("shared", "batch", "after norm"),
        ("shared", "group, 2 channels", "positional"),
        ("per sample", "batch", "positional"),
        ("per sample", "layer", "positional"),
    ]
    pairs = [(f"{time} time, {norm}: {injection}", f"{time} time, {norm}: scalar") for time, norm, injection in asked]
    return [
        Study(
            "TimestepEmbedding (NK801), a toy",
            "timestep_embedding.md",
            "Learn y = cos(2 pi t) x: a network that cannot see the time is left with a loss of 0.5. The time enters as an offset before a "
            "norm (scalar), as a pattern over positions, or behind the norm; two convolutions with circular padding, Adam 3e-3, 500 steps",
            "loss",
            "python benchmarks/timestep_toy.py",
            {name: arms[name] for pair in pairs for name in pair if name in arms},
            [pair for pair in pairs if pair[0] in arms and pair[1] in arms],
            sum(float(row["seconds"]) for row in rows),
            "The first four rows are those in which the norm takes the time away; in the others nothing vanishes, and a remedy should gain "
            "nothing.",
        )
    ]


def _diffusion(rows: Rows) -> list[Study]:
    arms = _by_arm([(row["arm"], row["seed"], row["val_frechet"]) for row in rows])
    return [
        Study(
            "TimestepEmbedding (NK801), samples of digits",
            "diffusion.md",
            "The diffusion recipe with instance norms, which take the time away: a small DDPM on 1,079 digits of 8 x 8 pixels, 60 epochs",
            "Frechet distance (lower is better)",
            "pl-normkit compare diffusion --with TimestepEmbedding --model.norm instance --seeds 5",
            arms,
            [("TimestepEmbedding", "without")] if {"TimestepEmbedding", "without"} <= arms.keys() else [],
            sum(float(row["seconds"]) for row in rows),
            "The remedy adds a linear layer a block. The recipe's own norm, group norm, got 0.80 in one run: choosing it does as well. "
            "The minutes are by the clock of a busy machine; a run takes 80 s of one core.",
        )
    ]


def _boxes(rows: Rows) -> list[Study]:
    labels = [row for row in rows if row["arm"].startswith("labels: bap, guided")]
    segmenters = [row for row in rows if row["arm"].startswith("segmenter: ")]
    what = {"boxes filled": "box as mask", "first (refined)": "BAP, guided filter", "second (retrieval)": "BAP, retrieval"}
    of_labels = _by_arm([(what[row["what"]], row["seed"], row["value"]) for row in labels if row["what"] in what])
    trained = _by_arm([(row["arm"].removeprefix("segmenter: "), row["seed"], row["value"]) for row in segmenters])
    filled, first = "boxes filled, cross-entropy", "bap, noise-aware"
    shared = "96 drawn scenes of 64 x 64 with one or two textured objects each, classifier of 80 steps"
    more = {
        "page": "boxes.md",
        "metric": "mIoU",
        "command": "python benchmarks/box_supervision.py",
    }
    return [
        Study(
            "Background-aware pooling, labels from boxes",
            setting=f"Labels of the training scenes against the truth. {shared}",
            arms=of_labels,
            contrasts=[
                (arm, "box as mask") for arm in ("BAP, guided filter", "BAP, retrieval") if {arm, "box as mask"} <= of_labels.keys()
            ],
            seconds=_seconds_once(labels),
            **more,
        ),
        Study(
            "Background-aware pooling and noise-aware loss, segmenters",
            setting=f"Segmenters trained on labels from boxes, scored on other scenes. {shared}, segmenter of 400 steps",
            arms=trained,
            contrasts=[(arm, filled) for arm in trained if arm != filled and filled in trained]
            + [(first, other) for other in trained if other == "bap, cross-entropy" and first in trained],
            seconds=_seconds_once(segmenters),
            **more,
        ),
    ]


def _seconds_once(rows: Rows) -> float:
    """Each training has several rows with one time."""
    return sum({(row["seed"], row["arm"]): float(row["cpu_seconds"]) for row in rows}.values())


def _depth(rows: Rows) -> list[Study]:
    """BERT of transformers, in every setting that has the arm without an edit beside another one."""
    bert = [row for row in rows if row.get("model", "bert") == "bert"]
    settings = [name for name in ("vocabulary", "lr", "warmup") if len({row.get(name) for row in bert}) > 1]

    def name(row: Mapping[str, str], arm: str) -> str:
        return ", ".join([arm, *(f"{setting} {row[setting]}" for setting in settings)])

    arms = _by_arm([(name(row, row["arm"]), row["seed"], row["loss"]) for row in bert])
    pairs = dict.fromkeys((name(row, row["arm"]), name(row, "post")) for row in bert if row["arm"] != "post")
    return [
        Study(
            "NormPlacement, BERT turned to DeepNorm",
            "norm_placement.md",
            "BERT of transformers, 12 layers, as a decoder (post-norm), as it is and turned by `place_norms`; a language model of bytes "
            "on the standard library's source, AdamW without clipping, 200 steps",
            "held-out loss",
            "python benchmarks/depth.py",
            arms,
            [pair for pair in pairs if pair[1] in arms],
            sum(float(row["seconds"]) for row in bert),
            "Width 64 and a few hundred steps: whether a deep network starts to learn, not how good it becomes.",
        )
    ]
