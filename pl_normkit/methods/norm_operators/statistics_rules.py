"""NK941: running statistics of batch norms that do not fit the training data."""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Iterator

from torch.nn.modules.batchnorm import _BatchNorm

from pl_normkit.findings import Evidence, FixSafety, Place
from pl_normkit.methods.norm_operators.recalibrate import Moments, measure_norms, recalibrate_on_inputs
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

BATCHES = 8
SHIFT = 1.0
"""Distance of the means in standard deviations of the data beyond which a channel does not fit (derived)."""
RATIO = 4.0
"""Ratio of the variances, either way, beyond which it does not (derived)."""
CHANNELS = 0.1
"""Share of the channels of a norm that must not fit (derived)."""


@rule(
    "NK941",
    "evaluation-statistics-do-not-fit",
    mark=Mark.DERIVED,
    source="derived here: tests/methods/norm_operators/test_statistics_rules.py",
    needs=(Needs.MODEL, Needs.LOADERS),
    fix=recalibrate_on_inputs,
    fix_safety=FixSafety.UNSAFE,
    preview=True,
)
def evaluation_statistics_do_not_fit(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds batch norms that have been trained and whose running mean or variance is far from that of the training data: in more than a
    tenth of their channels the mean by a standard deviation, or the variance by a factor of 4.

    Why it hurts
    Training normalizes by the batch, evaluation by the running statistics. Where they differ, the network that is evaluated is not the
    one that was trained: after few steps at a small momentum, after weights were averaged or loaded without buffers, on other data.

    Evidence
    The largest share of channels that do not fit, measured over up to 8 training batches with dropout off.

    Example
    ```python
    import torch
    from torch import nn

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.001))
    batches = [torch.randn(8, 3, 8, 8) * 5 + 3 for _ in range(4)]
    _ = [model(batch) for batch in batches]  # the running variance is still near 1
    ```

    Use instead
    ```python
    from pl_normkit import recalibrate_batch_norm

    changes = recalibrate_batch_norm(model, batches)
    ```

    Fix and its safety
    recalibrate_batch_norm replaces the running statistics by measured ones; unsafe: evaluation changes, which is the point. The fix of the
    rule measures on the example inputs alone. Give the training loader to the function for statistics of more data.

    Source
    Derived; the cuts are not tuned. arXiv 2105.07576, section 3, recommends precise statistics.
    """
    assert subject.model is not None
    assert subject.loaders is not None
    if not subject.measure or subject.loaders.train is None:
        return
    norms = {
        path: module
        for path, module in subject.model.named_modules()
        if isinstance(module, _BatchNorm) and module.num_batches_tracked is not None and int(module.num_batches_tracked) > 0
    }
    if not norms:
        return
    moments = measure_norms(subject.model, norms, subject.loaders.train, max_batches=BATCHES)
    shares = {path: _share_off(norm, moments[path]) for path, norm in norms.items()}
    found = {path: share for path, share in shares.items() if share > CHANNELS}
    if found:
        yield Observation(
            message="Batch norms evaluate with statistics that their training data does not have",
            places=[Place(path) for path in found],
            evidence=[Evidence("largest share of channels that do not fit", max(found.values()), f"at most {CHANNELS}")],
            advice="Measure them again: pl_normkit.recalibrate_batch_norm(model, train_loader)",
        )


def _share_off(norm: _BatchNorm, moments: Moments) -> float:
    """Share of channels whose running statistics are far from the measured ones; constant channels fit whatever is stored."""
    if moments.mean is None or moments.deviations is None or moments.count < 2 or norm.running_mean is None or norm.running_var is None:
        return 0.0
    var = moments.deviations / (moments.count - 1)
    is_varied = var > norm.eps
    shift = (norm.running_mean.double() - moments.mean).abs() / var.clamp(min=1e-30).sqrt()
    ratio = (norm.running_var.double() + norm.eps) / (var + norm.eps)
    is_off = is_varied & ((shift > SHIFT) | (ratio > RATIO) | (ratio < 1 / RATIO))
    return float(is_off.double().mean())
