"""NK321 to NK323: joint filters that read outside their window, change a flat target, or see maps that must be padded."""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Iterator

from pl_normkit.findings import Evidence, Place, Severity
from pl_normkit.methods.guided_upsampling.measure import FilterCheck, measure_filter
from pl_normkit.methods.guided_upsampling.modules import DeformableKernelNetwork, JointFilter
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

MOST_OUTSIDE = 0.01
"""Share of offsets outside the window above which it is said (derived)."""
ROUNDING = 1e-4
"""What float32 leaves of a sum that is 0 or 1."""


def _checks(subject: Subject) -> list[FilterCheck]:
    assert subject.model is not None
    if not subject.measure or subject.example_inputs is None or not any(isinstance(m, JointFilter) for m in subject.model.modules()):
        return []
    return measure_filter(subject.model, subject.example_inputs)


@rule(
    "NK321",
    "offsets-leave-the-window",
    mark=Mark.DERIVED,
    source="derived here: tests/methods/guided_upsampling/test_rules.py",
    needs=(Needs.MODEL,),
)
def offsets_leave_the_window(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds joint filters more than 1 % of whose offsets reach past their window on the given inputs.

    Why it hurts
    Offsets are clamped at the window's border: those samples get no gradient, and the filter reads the same border pixels everywhere.

    Evidence
    The share of offsets outside, measured on the inputs.

    Example
    ```python
    from pl_normkit.nn import DeformableKernelNetwork

    network = DeformableKernelNetwork(filter_size=5)  # offsets of more than one pixel are clamped
    ```

    Use instead
    ```python
    network = DeformableKernelNetwork(filter_size=15)
    ```

    Fix and its safety
    None: a larger window, a smaller learning rate for the offsets or their regularization is a choice of training.

    Source
    Derived. The window of 15 pixels is that of the public code of arXiv 1910.08373, in which samples outside read zeros; the cut of 1 %
    is ours.
    """
    for check in subject.once(_checks):
        if check.outside > MOST_OUTSIDE:
            yield Observation(
                message="Offsets of a joint filter leave its window and are clamped",
                places=[Place(check.module)],
                evidence=[Evidence("share of offsets outside", check.outside, f"at most {MOST_OUTSIDE}")],
                advice="Give it a larger filter_size, or train its offsets with a smaller learning rate",
            )


@rule(
    "NK322",
    "flat-target-not-kept",
    mark=Mark.DERIVED,
    source="derived here: tests/methods/guided_upsampling/test_rules.py",
    needs=(Needs.MODEL,),
)
def flat_target_not_kept(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds joint filters whose taps do not sum to 0 (residual form) or 1, or that change a flat target away from the border.

    Why it hurts
    Such a filter brightens or darkens: depth gets a bias that no edge explains. Near-zero sums in the form without a residual make the
    division blow up.

    Evidence
    The largest error of a sum of taps, and the largest change of a target of ones, measured with the taps of the given inputs.

    Example
    ```python
    from pl_normkit.nn import JointFilter


    class Raw(JointFilter):
        def taps(self, weights):
            return weights  # neither shifted nor scaled
    ```

    Use instead
    ```python
    core = JointFilter(residual=True)
    ```

    Fix and its safety
    None: use the taps of JointFilter.

    Source
    Derived from the residual form in the public code of arXiv 1910.08373, which makes the sum 0 by construction.
    """
    for check in subject.once(_checks):
        worst = max(check.tap_sum_error, check.flat_error)
        if worst > ROUNDING:
            yield Observation(
                message="A joint filter does not keep a flat target",
                places=[Place(check.module)],
                evidence=[
                    Evidence("error of the sum of taps", check.tap_sum_error, "0"),
                    Evidence("change of ones", check.flat_error, "0"),
                ],
                advice="Shift the taps to sum to 0 and add the target, or scale them to sum to 1",
            )


@rule(
    "NK323",
    "guided-map-is-padded",
    mark=Mark.DERIVED,
    source="derived here: tests/methods/guided_upsampling/test_rules.py",
    needs=(Needs.MODEL,),
    severity=Severity.NOTE,
)
def guided_map_is_padded(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds fast deformable kernel networks on maps whose height or width is no multiple of 4.

    Why it hurts
    Little: the last rows or columns are filtered beside replicated ones. Numbers of the public code, which takes multiples of 4 alone,
    cannot be compared on such maps.

    Evidence
    Height and width of the map.

    Example
    ```python
    import torch
    from pl_normkit.nn import DeformableKernelNetwork

    sharp = DeformableKernelNetwork(fast=True)(torch.rand(1, 3, 30, 30), torch.rand(1, 1, 30, 30))
    ```

    Use instead
    ```python
    sharp = DeformableKernelNetwork(fast=True)(torch.rand(1, 3, 32, 32), torch.rand(1, 1, 32, 32))
    ```

    Fix and its safety
    None: crop to multiples of 4.

    Source
    Derived: space-to-depth by 4 in the public code of arXiv 1910.08373.
    """
    assert subject.model is not None
    fast = {
        f"{path}.filter".lstrip("."): path for path, m in subject.model.named_modules() if isinstance(m, DeformableKernelNetwork) and m.fast
    }
    for check in subject.once(_checks):
        if check.module in fast and any(size % 4 for size in check.size):
            yield Observation(
                message=f"A map of {check.size[0]}x{check.size[1]} is padded to multiples of 4",
                places=[Place(fast[check.module])],
                evidence=[
                    Evidence("height", check.size[0], "a multiple of 4", "px"),
                    Evidence("width", check.size[1], "a multiple of 4", "px"),
                ],
                advice="Crop images to multiples of 4 where results are compared with published ones",
            )
