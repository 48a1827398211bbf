"""Which roles are decayed, and on what ground."""

from __future__ import annotations

__all__ = ["PRESETS", "DecayLine", "DecayPolicy", "resolve_policy"]

import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from pl_normkit.errors import ConfigError, nearest
from pl_normkit.methods.weight_decay.find import ModelRoles
from pl_normkit.methods.weight_decay.peers import PEERS
from pl_normkit.methods.weight_decay.roles import GAMMAS, Role
from pl_normkit.rules import Mark

Confidence = Literal["high", "medium", "medium-low", "low", ""]


@dataclass(frozen=True)
class DecayLine:
    """How one role is decayed.

    Attributes:
        role: the role.
        factor: multiple of the weight decay of the weights: 1 as the weights, 0 not at all.
        mark: whether a paper states it or we derived it.
        confidence: how sure the derivation is; "" where it is common practice.
        reason: why, in one clause.
    """

    role: Role
    factor: float
    mark: Mark
    confidence: Confidence
    reason: str


@dataclass(frozen=True)
class DecayPolicy:
    """A decision for every role, with exceptions by parameter name. JSON-able: `to_json`, `from_json`.

    Attributes:
        name: what the policy is called in messages and checkpoints.
        lines: one per role; none where a rule of another library decides.
        extensions: whether the lines for `gamma_last` and `gamma_branch` also hold where our derivation is of low confidence:
            scales of pre-activation branches, of MBConv blocks and of every norm that is no batch norm. Off, those are not decayed.
        overrides: parameter-name pattern (fnmatch) -> factor; the last pattern that matches decides.
        peer: `"timm"`, `"transformers"` or `"ndim"`: that library's rule decides instead of the roles; "" for roles.
    """

    name: str
    lines: tuple[DecayLine, ...]
    extensions: bool = False
    overrides: Mapping[str, float] = field(default_factory=dict)
    peer: str = ""

    def __post_init__(self) -> None:
        if self.peer and (self.peer not in PEERS or self.lines):
            raise ConfigError(f"policy {self.name!r} goes by roles or by one of {', '.join(PEERS)}", evidence=f"peer={self.peer!r}")
        missing = set(Role) - {line.role for line in self.lines}
        if not self.peer and (missing or len(self.lines) != len(Role)):
            raise ConfigError(f"policy {self.name!r} needs exactly one line per role", evidence=f"missing: {sorted(missing) or 'none'}")
        for owner, factor in [*((line.role, line.factor) for line in self.lines), *self.overrides.items()]:
            if not 0 <= factor < float("inf"):
                raise ConfigError(f"a decay factor is 0 or a positive number, not {factor!r}", where=f"policy {self.name!r}, {owner}")

    @property
    def needs_roles(self) -> bool:
        """Whether the graph must be read for it."""
        return not self.peer

    def line(self, role: Role) -> DecayLine:
        return next(line for line in self.lines if line.role is role)

    def factor_outside(self, tensor: Tensor) -> float:
        """The factor of a tensor that is no parameter of the model."""
        return float(tensor.ndim >= 2) if self.peer else self.line(Role.UNKNOWN).factor

    def ground(self, role: Role) -> str:
        """What stands behind the factor of a role."""
        if self.peer:
            return PEERS[self.peer][1]
        line = self.line(role)
        confidence = f", {line.confidence} confidence" if line.confidence else ""
        return f"{line.mark}{confidence}: {line.reason}"

    def factors(self, known: ModelRoles) -> dict[str, float]:
        """The factor of every parameter of `known`. Raises ConfigError for an override that matches none of them."""
        factors = {name: self._factor(name, role, known) for name, role in known.roles.items()}
        for pattern, factor in self.overrides.items():
            matched = fnmatch.filter(factors, pattern)
            if not matched:
                raise ConfigError(
                    f"the weight-decay override {pattern!r} matches no parameter",
                    fix=nearest(pattern, factors) or "see model.named_parameters()",
                )
            factors.update(dict.fromkeys(matched, float(factor)))
        return factors

    def _factor(self, name: str, role: Role, known: ModelRoles) -> float:
        if self.peer:
            return float(name in known.peers[self.peer])
        needs_extension = role in (Role.GAMMA_LAST, Role.GAMMA_BRANCH) and name not in known.core_gammas
        return 0.0 if needs_extension and not self.extensions else float(self.line(role).factor)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DecayPolicy:
        """Raises ConfigError when `text` is no policy."""
        try:
            data = json.loads(text)
            lines = tuple(
                DecayLine(Role(line["role"]), line["factor"], Mark(line["mark"]), line["confidence"], line["reason"])
                for line in data["lines"]
            )
            return cls(data["name"], lines, data["extensions"], data["overrides"], data.get("peer", ""))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError("this is no weight-decay policy", evidence=f"{type(error).__name__}: {error}") from error


def _practice(factor: float, reason: str, *roles: Role) -> list[DecayLine]:
    return [DecayLine(role, factor, Mark.DERIVED, "", reason) for role in roles]


_NOT_GAMMAS = (
    *_practice(1, "what weight decay is for", Role.WEIGHT),
    *_practice(1, "a table of weights; BERT and GPT training decays it", Role.EMBEDDING),
    *_practice(0, "shifts are not covered by the derivation", Role.BIAS, Role.BETA),
    *_practice(0, "zero means no position or no token, no simpler function", Role.POSITION, Role.TOKEN, Role.RELATIVE_POSITION),
    *_practice(0, "zero switches the branch off", Role.LAYER_SCALE),
    *_practice(0, "zero is no neutral value of a factor", Role.TEMPERATURE, Role.GAIN),
    DecayLine(Role.SLOPE, 0, Mark.PUBLISHED, "", "decay would pull PReLU towards ReLU (arXiv 1502.01852, section 2.1)"),
    *_practice(0, "our modules set their own scale", Role.OWN),
    *_practice(0, "not classifiable, so left alone", Role.UNKNOWN),
)


def _gamma_lines() -> Iterable[DecayLine]:
    yield DecayLine(Role.GAMMA_LAST, 1, Mark.DERIVED, "high", "a smaller scale brings the block closer to an identity mapping")
    yield DecayLine(Role.GAMMA_SHORTCUT, 0, Mark.DERIVED, "high", "a smaller scale weakens the shortcut against the branch")
    yield DecayLine(Role.GAMMA_BRANCH, 1, Mark.DERIVED, "medium", "a bounded scale keeps the effective learning rate up")
    yield DecayLine(Role.GAMMA_TRUNK, 0, Mark.DERIVED, "medium-low", "it sets the variance of the trunk that the branches add to")


def _uniform(factor: float, reason: str) -> Iterable[DecayLine]:
    return _practice(factor, reason, *GAMMAS)


DEFAULT = "no_norm"
PRESETS: dict[str, DecayPolicy] = {
    "no_norm": DecayPolicy("no_norm", (*_uniform(0, "common exclusion of every norm and bias"), *_NOT_GAMMAS)),
    "gamma_roles": DecayPolicy("gamma_roles", (*_gamma_lines(), *_NOT_GAMMAS)),
    "gamma_roles_extended": DecayPolicy("gamma_roles_extended", (*_gamma_lines(), *_NOT_GAMMAS), extensions=True),
    "all": DecayPolicy("all", tuple(_practice(1, "everything is decayed", *Role)), extensions=True),
    **{peer: DecayPolicy(peer, (), peer=peer) for peer in PEERS},
}
"""`no_norm` (default): the common exclusion of norms, biases and special parameters; scales by their role, as derived and not proven to
help; the same with the low-confidence extensions; no exclusion; the rules of timm, of transformers' Trainer and of nanoGPT."""


def resolve_policy(policy: str | DecayPolicy, overrides: Mapping[str, float] | None = None) -> DecayPolicy:
    """A preset by name, or the policy itself, with `overrides` added. Raises ConfigError for an unknown preset."""
    if isinstance(policy, str):
        if policy not in PRESETS:
            raise ConfigError(f"no weight-decay policy {policy!r}", fix=nearest(policy, PRESETS) or f"known policies: {', '.join(PRESETS)}")
        policy = PRESETS[policy]
    merged: dict[str, Any] = {**policy.overrides, **(overrides or {})}
    return replace(policy, overrides=merged)
