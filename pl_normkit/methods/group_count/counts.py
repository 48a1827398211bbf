"""Numbers of groups: divisors of the channels, and the one nearest to a target."""

from __future__ import annotations

__all__ = ["GroupTarget", "divisors", "num_groups"]

import math
import re

from pl_normkit.errors import ConfigError

GroupTarget = int | str
"""A number of groups, or text: "32 groups" or "16 channels per group"."""

_FORM = re.compile(r"(\d+) (groups|channels per group)")


def num_groups(channels: int, target: GroupTarget = "32 groups") -> int:
    """The divisor of `channels` nearest to a target, by the distance of logarithms; of two that are as near, the smaller.

    Args:
        channels: channels that are normalized, at least 1.
        target: a number of groups, "32 groups" or "16 channels per group".

    Raises:
        ConfigError: for a target of another form, and for a number below 1.

    Source: derived here. This rounds a number that you choose and claims nothing about it.

    >>> num_groups(64), num_groups(48), num_groups(96, "16 channels per group"), num_groups(7, 4)
    (32, 24, 6, 7)
    """
    if type(channels) is not int or channels < 1:
        raise ConfigError("channels must be a positive whole number", evidence=repr(channels))
    wanted = _wanted(channels, target)
    return min(divisors(channels), key=lambda count: (abs(math.log(count / wanted)), count))


def divisors(channels: int) -> list[int]:
    """Every divisor, rising."""
    return [count for count in range(1, channels + 1) if channels % count == 0]


def _wanted(channels: int, target: GroupTarget) -> float:
    found = _FORM.fullmatch(f"{target} groups" if type(target) is int else str(target))
    if found is None or int(found[1]) < 1:
        raise ConfigError("this is no number of groups", evidence=repr(target), fix='write 32, "32 groups" or "16 channels per group"')
    return int(found[1]) if found[2] == "groups" else channels / int(found[1])
