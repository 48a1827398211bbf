"""NK311 to NK314: a pool that pools nothing or all, labels that agree or differ too much, weights that trust all, a flat softmax."""

from __future__ import annotations

__all__: list[str] = []

import math
from collections.abc import Iterator

from pl_normkit.findings import Evidence, Place, Severity
from pl_normkit.methods.box_supervision.modules import BackgroundAwarePool2d, LossStatistics, NoiseAwareLoss, PoolStatistics
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

_SOURCE = "derived here: tests/methods/box_supervision/test_rules.py"


def _pools(subject: Subject) -> Iterator[tuple[str, PoolStatistics]]:
    assert subject.model is not None
    for path, module in subject.model.named_modules():
        if isinstance(module, BackgroundAwarePool2d) and module.statistics is not None:
            yield path, module.statistics


def _losses(subject: Subject) -> Iterator[tuple[str, LossStatistics]]:
    assert subject.model is not None
    for path, module in subject.model.named_modules():
        if isinstance(module, NoiseAwareLoss) and module.statistics is not None:
            yield path, module.statistics


@rule("NK311", "box-pool-degenerates", mark=Mark.DERIVED, source=_SOURCE, needs=(Needs.MODEL,))
def box_pool_degenerates(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds background-aware pools whose weights 1 - A inside boxes had a mean below 0.05 or above 0.95 in their last call.

    Why it hurts
    Near 0 everything in the boxes counts as background and the pool averages noise; near 1 it is a plain average. Features after a ReLU
    have no negative cosines, which biases A high.

    Evidence
    The mean of 1 - A inside boxes.

    Example
    ```python
    import torch
    from pl_normkit.nn import BackgroundAwarePool2d

    pool = BackgroundAwarePool2d()
    out = pool(torch.ones(1, 4, 16, 16), [torch.tensor([[8.0, 8.0, 40.0, 40.0]])], (64, 64))  # all features alike
    ```

    Use instead
    ```python
    features = torch.randn(1, 4, 16, 16)  # before the last ReLU, say
    out = pool(features, [torch.tensor([[8.0, 8.0, 40.0, 40.0]])], (64, 64))
    ```

    Fix and its safety
    None: pool features before the last activation, or of a later layer.

    Source
    Derived: the cuts are ours. Pool and formula: arXiv 2104.00905.
    """
    for path, seen in _pools(subject):
        if seen.foreground < 0.05 or seen.foreground > 0.95:
            what = "nothing" if seen.foreground < 0.05 else "everything"
            yield Observation(
                message=f"Background-aware pooling keeps {what} of its boxes",
                places=[Place(path)],
                evidence=[Evidence("mean of 1 - A inside boxes", seen.foreground, "0.05 to 0.95")],
                advice="Pool features before the last activation, or of a layer that tells object from background",
            )


@rule("NK312", "boxes-leave-no-background", mark=Mark.DERIVED, source=_SOURCE, needs=(Needs.MODEL,), severity=Severity.NOTE)
def boxes_leave_no_background(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds background-aware pools that found no background in more than half of the images with boxes.

    Why it hurts
    Those images are pooled by the plain average, and give no background vectors to train on.

    Evidence
    The share of such images in the last call.

    Example
    ```python
    import torch
    from pl_normkit.nn import BackgroundAwarePool2d

    pool = BackgroundAwarePool2d()
    out = pool(torch.randn(1, 4, 16, 16), [torch.tensor([[0.0, 0.0, 64.0, 64.0]])], (64, 64))  # one box over all
    ```

    Use instead
    ```python
    out = pool(torch.randn(1, 4, 16, 16), [torch.tensor([[0.0, 0.0, 40.0, 40.0]])], (64, 64))
    ```

    Fix and its safety
    None: use larger crops.

    Source
    Derived: the cut is ours.
    """
    for path, seen in _pools(subject):
        if seen.without_query > 0.5:
            yield Observation(
                message="Most images have no background outside their boxes",
                places=[Place(path)],
                evidence=[Evidence("share of images without background", seen.without_query, "at most 0.5")],
                advice="Crop larger, so that some background stays around the boxes",
            )


@rule("NK313", "pseudo-labels-agree-or-differ-too-much", mark=Mark.DERIVED, source=_SOURCE, needs=(Needs.MODEL,), severity=Severity.NOTE)
def pseudo_labels_agree_or_differ_too_much(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds noise-aware losses whose two label maps differed at less than 1 % or more than 50 % of the pixels, or whose median weight of
    the differing pixels was above 0.99.

    Why it hurts
    Below 1 % the doubted part does nothing; above 50 % most pixels are doubted; with weights near 1 every label is trusted.

    Evidence
    Share of differing pixels and median weight in the last call.

    Example
    ```python
    import torch
    from pl_normkit.nn import NoiseAwareLoss

    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    value = NoiseAwareLoss()(torch.rand(1, 3, 8, 8), labels, labels)  # both maps alike
    ```

    Use instead
    ```python
    other = labels.clone()
    other[:, :2] = 1  # labels by retrieval
    value = NoiseAwareLoss()(torch.rand(1, 3, 8, 8), labels, other)
    ```

    Fix and its safety
    None: cross-entropy does where the maps agree; a larger gamma doubts more.

    Source
    Derived: the cuts are ours. A public replication of arXiv 2104.00905 did not find the loss's gain.
    """
    for path, seen in _losses(subject):
        evidence = [Evidence("share of differing pixels", seen.disagreement, "0.01 to 0.5")]
        if not math.isnan(seen.sigma):
            evidence.append(Evidence("median weight of differing pixels", seen.sigma, "at most 0.99"))
        if seen.disagreement < 0.01 or seen.disagreement > 0.5 or seen.sigma > 0.99:
            yield Observation(
                message="The noise-aware loss has too little, too much or too trusted disagreement to work with",
                places=[Place(path)],
                evidence=evidence,
                advice="Use cross-entropy where the maps agree; raise gamma where all labels are trusted",
            )


@rule("NK314", "cosine-softmax-stays-flat", mark=Mark.DERIVED, source=_SOURCE, needs=(Needs.MODEL,))
def cosine_softmax_stays_flat(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds noise-aware losses whose temperature times the range of the cosines is below 2.

    Why it hurts
    Logits that span less than 2 cannot make a confident softmax: the loss stays near that of a guess.

    Evidence
    Temperature times range in the last call.

    Example
    ```python
    import torch
    from pl_normkit.nn import NoiseAwareLoss

    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    value = NoiseAwareLoss(tau=1.0)(torch.rand(1, 3, 8, 8), labels, 1 - labels)
    ```

    Use instead
    ```python
    value = NoiseAwareLoss(tau=20.0)(torch.rand(1, 3, 8, 8), labels, 1 - labels)
    ```

    Fix and its safety
    None: raise tau.

    Source
    Derived: the cut is ours; 20 is the default of the public code's VGG configuration.
    """
    for path, seen in _losses(subject):
        if seen.logit_range < 2:
            yield Observation(
                message="The temperature is too small for a confident softmax of cosines",
                places=[Place(path)],
                evidence=[Evidence("temperature times range of cosines", seen.logit_range, "at least 2")],
                advice="Raise tau",
            )
