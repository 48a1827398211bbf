"""The roles themselves."""

from __future__ import annotations

__all__ = ["GAMMAS", "Role"]

from enum import StrEnum


class Role(StrEnum):
    """What a parameter does in the model, as far as weight decay cares."""

    WEIGHT = "weight"
    GAMMA_LAST = "gamma_last"
    GAMMA_SHORTCUT = "gamma_shortcut"
    GAMMA_BRANCH = "gamma_branch"
    GAMMA_TRUNK = "gamma_trunk"
    BETA = "beta"
    BIAS = "bias"
    POSITION = "position"
    TOKEN = "token"
    RELATIVE_POSITION = "relative_position"
    LAYER_SCALE = "layer_scale"
    EMBEDDING = "embedding"
    TEMPERATURE = "temperature"
    GAIN = "gain"
    SLOPE = "slope"
    OWN = "own"
    UNKNOWN = "unknown"


GAMMAS = (Role.GAMMA_LAST, Role.GAMMA_SHORTCUT, Role.GAMMA_BRANCH, Role.GAMMA_TRUNK)
