"""The probe and the profile of a model that is audited: `subject.once(...)` makes each one time, however many rules ask."""

from __future__ import annotations

__all__ = ["probe_of", "profile_of"]

from pl_normkit.errors import NothingMatchedError
from pl_normkit.methods.depth_profile.measure import DepthProbe
from pl_normkit.methods.depth_profile.profile import DepthProfile
from pl_normkit.rules import Subject


def probe_of(subject: Subject) -> DepthProbe | None:
    """None without leave to measure and for a model without residual additions."""
    if not subject.measure or subject.model is None:
        return None
    try:
        return DepthProbe(subject.model, subject.example_inputs, graph=subject.graph)
    except NothingMatchedError:
        return None


def profile_of(subject: Subject) -> DepthProfile | None:
    """The profile on the example inputs, None where they do not run."""
    probe = subject.once(probe_of)
    try:
        return None if probe is None else probe.measure(subject.example_inputs)
    except Exception:  # inputs made for the trace need not run: another dtype, another device
        return None
