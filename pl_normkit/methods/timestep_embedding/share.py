"""What a group norm leaves of an offset per channel: the derived formula."""

from __future__ import annotations

__all__ = ["surviving_share"]


def surviving_share(channels: int, groups: int, time: float, space: float, static: float = 0.0) -> float:
    """Share of a group norm's output variance that comes from an offset per channel which depends on time.

    R = f time / (space + f (time + static)) with f = 1 - groups / channels. An expectation over random offsets: within 10 % for offsets of
    up to .3 standard deviations of the spatial part, up to 50 % too large at two channels per group and offsets as large as that part.

    Args:
        channels: channels of the norm.
        groups: its groups; 1 for a layer norm over channels and space, `channels` for an instance norm.
        time: variance over channels of the part of the offset that depends on time.
        space: variance over positions.
        static: variance over channels of the offsets that do not depend on time, biases included.

    Source: derived here: tests/methods/timestep_embedding/test_share.py.

    >>> [round(surviving_share(64, groups, 0.09, 1.0), 3) for groups in (1, 32, 64)]
    [0.081, 0.043, 0.0]
    """
    kept = 1 - groups / channels
    variance = space + kept * (time + static)
    return kept * time / variance if variance > 0 else 0.0
