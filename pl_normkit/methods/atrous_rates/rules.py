"""NK5xx: atrous rates that suit neither the output stride nor the input. Each ASPP gets one verdict."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from pl_normkit.errors import ConfigError
from pl_normkit.findings import Evidence, FixSafety, Place
from pl_normkit.methods.atrous_rates.find import Aspp, aspps_in
from pl_normkit.methods.atrous_rates.fix import fit_atrous_rates
from pl_normkit.methods.atrous_rates.rates import fitted_rates, valid_tap_share
from pl_normkit.rules import Mark, Observation, Subject, rule

REFERENCE_REACH = 96
"""Pixels that the smallest of DeepLab's reference rates spans: (6, 12, 18) at stride 16, (12, 24, 36) at stride 8."""
FITTING = (0.13, 0.245)
"""r / N between the optimum for the centre pixel alone and the upper end of the coverage rule's 2 % band (derived)."""
_FIX = "the AtrousRates callback or pl_normkit.set_atrous_rates does it and keeps the weights"


class _Verdict(StrEnum):
    OTHER_STRIDE = "rates of another output stride"
    DEAD = "dead branch"
    UNFITTED = "rates do not fit the input"
    FITS = "fits"


def _verdicts(subject: Subject) -> list[tuple[Aspp, _Verdict]]:
    assert subject.graph is not None
    return [(aspp, _judge(aspp)) for aspp in aspps_in(subject.graph)]


def _judge(aspp: Aspp) -> _Verdict:
    meant = _stride_meant(aspp)
    if meant not in (None, aspp.output_stride) and not _fits(aspp):
        return _Verdict.OTHER_STRIDE
    if aspp.dead:
        return _Verdict.DEAD
    return _Verdict.FITS if _fits(aspp) or not _is_triple(aspp) else _Verdict.UNFITTED


def _is_triple(aspp: Aspp) -> bool:
    first = aspp.rates[0]
    return aspp.rates == (first, 2 * first, 3 * first)


def _stride_meant(aspp: Aspp) -> int | None:
    """The output stride at which these rates are DeepLab's reference rates, None for other rates."""
    stride, rest = divmod(REFERENCE_REACH, aspp.rates[0])
    return stride if _is_triple(aspp) and rest == 0 and stride in (4, 8, 16, 32) else None


def _fits(aspp: Aspp) -> bool:
    """Whether the smallest rate of a triple lies in the band that the derived rules span, up to rounding."""
    low, high = (share * aspp.side for share in FITTING)
    return _is_triple(aspp) and int(low) <= aspp.rates[0] <= high + 1 and not aspp.dead


def _listed(rates: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, rates))})"


def _map_of(aspp: Aspp) -> str:
    height, width = aspp.feature_size
    return f"{height}x{width} feature map (input {aspp.input_size[0]}x{aspp.input_size[1]}, output stride {aspp.output_stride})"


def _observe(aspp: Aspp, message: str) -> Observation:
    return Observation(
        message=message,
        places=[Place(branch.module, branch.node.source) for branch in aspp.branches],
        evidence=[
            Evidence(
                f"share of taps that read no padding at rate {branch.rate}",
                valid_tap_share(branch.rate, aspp.feature_size, branch.kernel),
                is_measured=False,
            )
            for branch in aspp.branches
        ],
        advice=_advice(aspp),
        fix_safety=None if len(aspp.branches) == 3 and aspp.side > 3 else FixSafety.DISPLAY,
    )


def _advice(aspp: Aspp) -> str:
    try:
        fitted = fitted_rates(aspp.side)
    except ConfigError:
        return "Train on larger crops or at a smaller output stride: no three live rates exist on so small a feature map"
    if len(aspp.branches) != 3:
        return f"Choose rates below {aspp.side}, such as {fitted[0]} and its multiples: set_atrous_rates(model, input_size, rates=...)"
    return f"Use {_listed(fitted)} for this input (derived: centre rule); {_FIX}"


@rule(
    "NK501",
    "atrous-rates-of-another-stride",
    mark=Mark.DERIVED,
    source="reference rates: tensorflow/models #4233, pytorch/vision #4105 and #7956; the verdict is derived here",
    fix=fit_atrous_rates,
    fix_safety=FixSafety.UNSAFE,
)
def atrous_rates_of_another_stride(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds an ASPP whose rates are DeepLab's reference rates for another output stride than the one it runs at, unless they
    happen to fit the size of the input. The stride is measured on the traced sizes, not read from an option.

    Why it hurts
    A rate counts cells, so its reach in pixels is rate times stride. (12, 24, 36) belongs to stride 8; at stride 16 every
    branch reaches twice as far as meant, and on a crop of 512 pixels the third branch reads nothing but padding around
    its centre. At half the stride every branch reaches half as far as meant.

    Evidence
    Feature size and stride from the trace, and for each rate the share of kernel taps that read no padding.

    Example
    segmentation-models-pytorch's DeepLabV3Plus() and torchvision's deeplabv3_mobilenet_v3_large run at output stride 16
    with (12, 24, 36).

    ```python
    import segmentation_models_pytorch as smp

    model = smp.DeepLabV3Plus("resnet18", encoder_weights=None)
    ```

    Use instead
    The reference rates of stride 16, or the triple for your crop:

    ```python
    from pl_normkit import atrous_rates

    rates = atrous_rates(512, output_stride=16)  # (5, 10, 15)
    model = smp.DeepLabV3Plus("resnet18", encoder_weights=None, decoder_atrous_rates=rates)
    ```

    Fix and its safety
    fit_atrous_rates sets dilation and padding for the size of the example input; unsafe: the function changes, weights and
    keys stay. A model whose weights were trained with the old rates should keep them, or be trained further. Four-branch
    variants get advice only.

    Source
    Derived. The pairs (6, 12, 18) for stride 16 and (12, 24, 36) for stride 8 are published in the threads named above; that
    another pair is a mistake, and when it fits the input all the same, is our derivation. An ASPP reported here is not
    reported by NK502 or NK503 again.
    That fitted rates score better is not claimed: on 6x6 cells (benchmarks/compare_segmentation.py, crop 96, 5 pairs, from scratch) they
    gave 0.03 mIoU less than the dead ones. Compare on your own data: pl-normkit compare segmentation --with AtrousRates.
    """
    for aspp, verdict in subject.once(_verdicts):
        if verdict is _Verdict.OTHER_STRIDE:
            meant = _stride_meant(aspp)
            yield _observe(aspp, f"ASPP rates {_listed(aspp.rates)} belong to output stride {meant}, and it reads a {_map_of(aspp)}")


@rule(
    "NK502",
    "dead-atrous-branch",
    mark=Mark.DERIVED,
    source="derived here: the gradient of the outer taps is exactly 0 where the rate reaches the side of the map (tested)",
    fix=fit_atrous_rates,
    fix_safety=FixSafety.UNSAFE,
)
def dead_atrous_branch(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds ASPP branches whose rate is at least as large as the feature map they read.

    Why it hurts
    With dilation d >= N on a map of N x N cells, 8 of the 9 taps of a 3x3 kernel read zero padding at every cell: their
    gradient is exactly 0 and the branch is a 1x1 convolution that costs nine times as much.

    Evidence
    The share of taps that read no padding, ((1 + 2 max(0, 1 - d/N)) / 3)^2, which is 1/9 for a dead branch.

    Example
    segmentation-models-pytorch's DeepLabV3 (output stride 8) on crops of 256 pixels: rate 36 on a 32x32 map.

    ```python
    import segmentation_models_pytorch as smp

    model = smp.DeepLabV3("resnet18", encoder_weights=None)  # (12, 24, 36)
    ```

    Use instead
    Rates below the side of the feature map, set on the model that you have:

    ```python
    from pl_normkit import set_atrous_rates

    changes = set_atrous_rates(model, input_size=256)  # (5, 10, 15)
    ```

    Fix and its safety
    fit_atrous_rates sets dilation and padding for the size of the example input; unsafe: the function changes, weights and
    keys stay. What the audit is given must have the size of the training crop. ASPPs with other than three dilated
    branches get advice only.

    Source
    Derived: counted, and checked by the gradient of the kernel. Reported once per ASPP, and not where NK501 names the
    output stride as the cause.
    That fitted rates score better is not claimed: on 6x6 cells (benchmarks/compare_segmentation.py, crop 96, 5 pairs, from scratch) they
    gave 0.03 mIoU less than the dead ones. Compare on your own data: pl-normkit compare segmentation --with AtrousRates.
    """
    for aspp, verdict in subject.once(_verdicts):
        if verdict is _Verdict.DEAD:
            dead = ", ".join(str(branch.rate) for branch in aspp.dead)
            reach = f"rate {dead} reaches" if len(aspp.dead) == 1 else f"rates {dead} reach"
            yield _observe(aspp, f"Atrous {reach} past a {_map_of(aspp)}: only the centre tap is left")


@rule(
    "NK503",
    "atrous-rates-not-fitted",
    mark=Mark.DERIVED,
    source="arXiv 2307.14179, abstract, for the principle; the band is derived here",
    fix=fit_atrous_rates,
    fix_safety=FixSafety.UNSAFE,
    preview=True,
)
def atrous_rates_not_fitted(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds ASPP rates (r, 2r, 3r) that are alive on this input but lie outside 0.13 to 0.245 of the side of the feature map.

    Why it hurts
    Small rates leave most of the map unread, large ones read mostly padding. On a toy task that needs global context the
    optimum was 0.21 to 0.25 of the side for two map sizes; tasks of local context (vessels) favour smaller rates.

    Evidence
    The share of kernel taps that read no padding, for each rate.

    Example
    At output stride 16 on crops of 1024 pixels r is 0.09 of the 64 cells here:

    ```python
    import segmentation_models_pytorch as smp

    model = smp.DeepLabV3Plus("resnet18", encoder_weights=None, decoder_atrous_rates=(6, 12, 18))
    ```

    Use instead
    Rates for that crop; c=0.22 gives wider ones, for long-range tasks.

    ```python
    from pl_normkit import atrous_rates

    rates = atrous_rates(1024, output_stride=16)  # (11, 22, 33)
    wide = atrous_rates(1024, output_stride=16, c=0.22)  # (14, 28, 42)
    ```

    Fix and its safety
    fit_atrous_rates sets dilation and padding for the size of the example input; unsafe: the function changes, weights and
    keys stay.

    Source
    Derived: the abstract of arXiv 2307.14179 states that the best rates depend on the size of the input image; its formula is
    not known to us, and the band is spanned by three rules of our own. Contested, therefore off until selected.
    """
    for aspp, verdict in subject.once(_verdicts):
        if verdict is _Verdict.UNFITTED:
            yield _observe(aspp, f"ASPP rates {_listed(aspp.rates)} do not fit the {_map_of(aspp)}")
