"""Masks from boxes on TextureObjects: labels and segmenters of paired seeds against box-as-mask, plain average pooling and cross-entropy.

    python benchmarks/box_supervision.py [--seeds 0 1 2]

Writes results/box_supervision.csv after every training: mIoU of the labels on training scenes, and of segmenters on validation scenes.
All arms of a seed share scenes, and segmenters of a seed their initial weights and order. Segmenters are trained on labels refined by the
guided filter, the recipe's default; labels refined by the dense CRF are scored too where pydensecrf is installed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

from pl_normkit.recipes.boxes import BoxClassifierModule, BoxSegmentationModule, TextureObjects
from pl_normkit.recipes.boxes.labelling import LabelWriter, box_labels
from pl_normkit.recipes.boxes.refine import Refinement
from pl_normkit.recipes.segmentation.pictures import save_palette_mask

RESULTS = Path(__file__).with_name("results") / "box_supervision.csv"
SIZE = 64
STEPS = 80  # of the classifier
SEGMENTER_STEPS = 400
BATCH = 8
COUNT = 96
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
}
Row = tuple[int, str, str, float, float]


def train_classifier(data: TextureObjects, seed: int, pool: str) -> BoxClassifierModule:
    L.seed_everything(seed, verbose=False)
    module = BoxClassifierModule(data.class_names, side=SIZE, steps=STEPS, batch_size=BATCH, pool=pool, lr=2e-3)
    loader = data.box_dataloader(SIZE, BATCH, training=True)
    L.Trainer(max_steps=STEPS, max_epochs=-1, **QUIET).fit(module, loader)
    return module


def write_labels(
    data: TextureObjects, module: BoxClassifierModule, folder: Path, refinement: Refinement, threshold: float
) -> dict[str, float]:
    writer = LabelWriter(data.box_source, folder, refinement, threshold)
    L.Trainer(callbacks=[writer], **QUIET).predict(module, data.box_dataloader(SIZE, 16), return_predictions=False)
    assert writer.scores is not None
    return writer.scores.means() | {"share that differs": writer.scores.differing / writer.scores.counted}


def write_filled(data: TextureObjects, folder: Path) -> None:
    for index in range(len(data.box_source)):
        labels = box_labels(data.box_source.read_boxes(index), (SIZE, SIZE))
        for kind in ("first", "second"):
            save_palette_mask(labels, folder / kind / f"{data.box_source.name(index)}.png", len(data.class_names))


def train_segmenter(data: TextureObjects, seed: int, folder: Path, noise: str) -> float:
    data.use_labels(folder)
    L.seed_everything(seed, verbose=False)
    options = {"encoder_depth": 3, "decoder_channels": [64, 32, 32]}
    module = BoxSegmentationModule(data.class_names, noise=noise, model_options=options, lr=2e-3, warmup_steps=10, example_size=SIZE)  # type: ignore[arg-type]
    trainer = L.Trainer(max_steps=SEGMENTER_STEPS, max_epochs=-1, limit_val_batches=0, **QUIET)
    trainer.fit(module, data.train_dataloader())
    (scores,) = L.Trainer(**QUIET).validate(module, data.val_dataloader(), verbose=False)
    return float(scores["val_miou"])


def run_seed(seed: int, refinements: list[Refinement], thresholds: list[float], folder: Path) -> Any:
    """Rows of one seed, as they come."""
    data = TextureObjects(seed=seed, image_size=SIZE, crop_size=SIZE, train_count=COUNT, val_count=48, batch_size=BATCH)
    data.setup("fit")
    write_filled(data, folder / "filled")
    for pool in ("bap", "gap"):
        started = time.process_time()
        classifier = train_classifier(data, seed, pool)
        used = time.process_time() - started
        for refinement in refinements:
            for threshold in thresholds:
                found = write_labels(data, classifier, folder / f"{pool}_{refinement}_{threshold:g}", refinement, threshold)
                for name, value in found.items():
                    yield seed, f"labels: {pool}, {refinement}, threshold {threshold:g}", name, value, used
    best = f"{refinements[0]}_{thresholds[0]:g}"
    arms = (("boxes filled, cross-entropy", "filled", "ignored"), ("bap, noise-aware", f"bap_{best}", "aware"))
    for name, labels, noise in (*arms, ("bap, cross-entropy", f"bap_{best}", "ignored"), ("gap, noise-aware", f"gap_{best}", "aware")):
        started = time.process_time()
        yield seed, f"segmenter: {name}", "val mIoU", train_segmenter(data, seed, folder / labels, noise), time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    has_crf = importlib.util.find_spec("pydensecrf") is not None
    refinements: list[Refinement] = ["guided", "crf"] if has_crf else ["guided"]
    rows: list[Row] = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for row in run_seed(seed, refinements, [0.99], Path(folder)):
                rows.append(row)
                print(*row, flush=True)
                with options.output.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.writer(file, lineterminator="\n")
                    writer.writerow(["seed", "arm", "what", "value", "cpu_seconds"])
                    writer.writerows([*row[:3], f"{row[3]:.4f}", f"{row[4]:.1f}"] for row in rows)


if __name__ == "__main__":
    main()
