"""Segmentation from boxes: pooling that leaves out what looks like the background around the box, and a loss that doubts pseudo labels.

Source: "Background-Aware Pooling and Noise-Aware Loss for Weakly-Supervised Semantic Segmentation", arXiv 2104.00905; formulas after public
summaries and the behaviour of the public code, implemented from them. A public replication did not find the loss's gain.

    modules.py        `BackgroundAwarePool2d`, `CosineClassifier` and `NoiseAwareLoss`
    pseudo_labels.py  label maps from a trained classifier: `box_unaries`, `refine_by_guide`, `retrieved_labels`
    rules.py          NK311 to NK314, on what pool and loss saw in their last call
"""

from __future__ import annotations

__all__ = [
    "BackgroundAwarePool2d",
    "BoxPooling",
    "CosineClassifier",
    "NoiseAwareLoss",
    "box_unaries",
    "refine_by_guide",
    "retrieved_labels",
]

from pl_normkit.methods.box_supervision.modules import BackgroundAwarePool2d, BoxPooling, CosineClassifier, NoiseAwareLoss
from pl_normkit.methods.box_supervision.pseudo_labels import box_unaries, refine_by_guide, retrieved_labels
