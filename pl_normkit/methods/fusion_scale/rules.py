"""NK301: the branches of a fusion arrive on different scales."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from pl_normkit.findings import Evidence, Place
from pl_normkit.methods.fusion_scale.find import find_sites, trained_norm
from pl_normkit.methods.fusion_scale.fix import is_equalized
from pl_normkit.methods.fusion_scale.measure import BranchScale, FusionScale, measure_joins
from pl_normkit.rules import Mark, Observation, Subject, rule

BY_INTERPOLATION = 1.6
WORTH_EQUALIZING = 2.0
STRONG = 4.0


@rule(
    "NK301",
    "fusion-scale-disequilibrium",
    mark=Mark.DERIVED,
    source="arXiv 2402.01149, abstract, for the harm; criterion and thresholds are derived here",
)
def fusion_scale_disequilibrium(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds concatenations of features of several resolutions whose branches have standard deviations more than a factor of
    2 apart (more than 4 is called strong), measured on the given inputs. Sums are not judged.

    Why it hurts
    The gradient of a branch's part of the fusion weights is proportional to the branch's standard deviation (where a batch
    norm follows; to its root mean square else), so the weaker branch is learned slowly. Derived, for gradients that are
    white in space: four branches of std ratio 1/.637/.674/.701 gave gradient norms of ratio 1/.638/.674/.703. With gradients
    that are smooth in space the relation is another one, so equal scales are no promise of equal gradients.

    Evidence
    The largest over the smallest standard deviation of the branches, measured on this model and these inputs with batch norms
    on batch statistics and dropout off.

    Example
    Branches with standard deviations of 0.6 and 1.3, say:

    ```python
    import segmentation_models_pytorch as smp

    model = smp.FPN("resnet18", encoder_weights=None, decoder_merge_policy="cat")
    ```

    Use instead
    The ScaleEqualization callback, or before training:

    ```python
    import torch

    from pl_normkit import equalize_scales

    changes = equalize_scales(model, [torch.rand(2, 3, 64, 64)])
    ```

    Fix and its safety
    Advice only: the remedy needs the training data, and a network that has been trained already would change its function.

    Source
    Derived: the criterion and the thresholds. One bilinear resize explains a factor of 1.6 at most (2-D, white features), so 2
    is more than interpolation alone. The rule is silent without real inputs of two samples or more, where batch norms behind
    the fusion have been trained, and where the layer that reads it is frozen. Published, in the abstract of arXiv 2402.01149: that
    different scales of parallel branches harm gradient descent, and that a scale equalizer between upsampling and fusion fixes it.
    """
    if subject.model is None or not subject.measure or not _can_measure(subject.example_inputs):
        return
    model, graph = subject.model, subject.graph
    assert graph is not None
    sites, _ = find_sites(model, graph)
    joins = [site.join for site in sites if site.join.kind == "concat" and not is_equalized(model, site) and not trained_norm(model, site)]
    inputs = subject.example_inputs
    measured = measure_joins(model, graph, list(dict.fromkeys(joins)), [inputs], max_batches=1, inputs=lambda batch: batch)
    uneven = sorted((fusion for fusion in measured if fusion.ratio > WORTH_EQUALIZING), key=lambda fusion: -fusion.ratio)
    if uneven:
        yield Observation(
            message=_message(uneven[0]),
            places=[Place(fusion.module, fusion.source) for fusion in uneven],
            evidence=[
                Evidence(
                    f"std of the strongest over the weakest branch in {fusion.module or 'the model'}",
                    fusion.ratio,
                    f"at most {WORTH_EQUALIZING:g}",
                )
                for fusion in uneven
            ],
            advice="Equalize them before training: the ScaleEqualization callback or pl_normkit.methods.fusion_scale.equalize_scales",
        )


def _can_measure(example_inputs: Any) -> bool:
    """Whether there are real inputs of two samples or more that vary."""
    tensors = [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
    if not tensors or any(tensor.is_meta or tensor.dim() == 0 or tensor.shape[0] < 2 for tensor in tensors):
        return False
    return any(bool((tensor != tensor.flatten()[:1]).any()) for tensor in tensors)


def _message(fusion: FusionScale) -> str:
    strongest = max(fusion.branches, key=lambda branch: branch.std)
    weakest = min((branch for branch in fusion.branches if branch.std > 0), key=lambda branch: branch.std)
    how = "strongly different" if fusion.ratio > STRONG else "different"
    return (
        f"Branches of one fusion are on {how} scales: std {strongest.std:.2g} of {_named(fusion, strongest)} over "
        f"{weakest.std:.2g} of {_named(fusion, weakest)}; one resize explains a factor of {BY_INTERPOLATION:g} at most"
    )


def _named(fusion: FusionScale, branch: BranchScale) -> str:
    """By its place too: branches resized in one forward method bear one path."""
    made = f"{branch.module or 'the input'}" + (f", {branch.resize}" if branch.resize else "")
    return f"branch {fusion.branches.index(branch) + 1} of {len(fusion.branches)} ({made})"
