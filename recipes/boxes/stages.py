"""Stages one and two, before the fit of the segmenter: each a Lightning run of its own."""

from __future__ import annotations

__all__ = ["Stages", "run_stages"]

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console

from pl_normkit.errors import ConfigError
from pl_normkit.recipes.boxes.classifier import BoxClassifierModule
from pl_normkit.recipes.boxes.data import BoxesData
from pl_normkit.recipes.boxes.labelling import LabelWriter
from pl_normkit.recipes.boxes.notes import BoxNotes
from pl_normkit.recipes.boxes.refine import Refinement, require_refinement


class Stages:
    """What comes before the segmenter.

    Args:
        labels: folder of label maps that an earlier run wrote; None makes them.
        classifier: checkpoint of an earlier run's classifier; None trains it.
        refine: "guided", the guided filter of this library, or "crf", the paper's dense CRF, which needs pydensecrf.
        threshold: share of its maximum below which attention counts as no background; the public code has 0.99.

    Raises ConfigError for values that cannot be used, and libraries that are not there.
    """

    def __init__(
        self, labels: str | None = None, classifier: str | None = None, refine: Refinement = "guided", threshold: float = 0.99
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ConfigError("the threshold is a share", where="--stages.threshold", evidence=str(threshold), fix="take 0.99")
        self.labels = Path(labels) if labels is not None else None
        self.classifier = Path(classifier) if classifier is not None else None
        self.refine: Refinement = refine
        self.threshold = threshold
        require_refinement(refine)
        for option, path, kind in (("labels", self.labels, "folder"), ("classifier", self.classifier, "file")):
            if path is not None and not (path.is_dir() if kind == "folder" else path.is_file()):
                fix = f"give the {kind} that an earlier fit wrote, or leave the option out"
                raise ConfigError(f"the {option} of an earlier run are not there", where=str(path), fix=fix)


def run_stages(
    stages: Stages,
    classifier: BoxClassifierModule,
    data: BoxesData,
    folder: Path,
    build_trainer: Callable[..., L.Trainer],
    console: Console,
) -> list[BoxNotes]:
    """Train the classifier, label the training images into `folder/labels`, and give both to `data`; the notes on the training.

    Args:
        stages: what to do, and what an earlier run has done.
        classifier: to be trained.
        data: whose training images are labelled.
        folder: of the run.
        build_trainer: a Trainer with the changes it is given.
        console: where the scores of the labels are said.
    """
    if stages.labels is not None:
        data.use_labels(stages.labels)
        return []
    data.setup("fit")
    quiet: dict[str, Any] = {"logger": False, "enable_model_summary": False}
    notes = BoxNotes()
    if stages.classifier is not None:
        _load(classifier, stages.classifier)
    else:
        limits = {"max_steps": classifier.steps, "max_epochs": -1, "limit_val_batches": 0, "num_sanity_val_steps": 0}
        trainer = build_trainer(**quiet, **limits, callbacks=[notes])
        trainer.fit(classifier, data.box_dataloader(classifier.side, classifier.batch_size, training=True))
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": classifier.state_dict(), "class_names": classifier.class_names}, folder / "classifier.ckpt")
        console.print(f"classifier: {folder / 'classifier.ckpt'}", soft_wrap=True, highlight=False)
    writer = LabelWriter(data.box_source, folder / "labels", stages.refine, stages.threshold)
    every: dict[str, Any] = {"limit_predict_batches": None, "fast_dev_run": False}  # a segmenter that is only tried needs all labels too
    trainer = build_trainer(**quiet, **every, callbacks=[writer])
    trainer.predict(classifier, data.box_dataloader(classifier.side, classifier.batch_size), return_predictions=False)
    if writer.scores is not None:
        writer.scores.print(console)
    data.use_labels(folder / "labels")
    return [notes] if stages.classifier is None else []


def _load(classifier: BoxClassifierModule, path: Path) -> None:
    fix = "give classifier.ckpt of a run with the same --classifier options and classes"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["class_names"] != classifier.class_names:
            evidence = f"checkpoint: {saved['class_names']}; data: {classifier.class_names}"
            raise ConfigError("the classifier was trained on other classes", where=str(path), evidence=evidence, fix=fix)
        classifier.load_state_dict(saved["state_dict"])
    except (RuntimeError, KeyError, TypeError, AttributeError, OSError, EOFError, pickle.UnpicklingError) as error:
        evidence = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise ConfigError("the classifier cannot be restored", where=str(path), evidence=evidence, fix=fix) from error
