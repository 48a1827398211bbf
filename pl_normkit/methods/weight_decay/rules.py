"""Rules NK201 to NK206: what weight decay reaches, and what it should."""

from __future__ import annotations

__all__ = [
    "coupled_decay_in_adam",
    "decay_against_low_confidence_role",
    "decay_on_shortcut_or_stem_scale",
    "decay_on_special_parameters",
    "no_decay_on_last_scale",
    "parameter_not_in_one_optimizer",
]

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch.optim import Optimizer

from pl_normkit.errors import NormkitError
from pl_normkit.findings import Evidence, Place, Severity
from pl_normkit.methods.weight_decay.find import ModelRoles, read_graph
from pl_normkit.methods.weight_decay.roles import GAMMAS, Role
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

_SHEET = "derived here from the two principles in the abstract of arXiv 2205.07260; tests/methods/weight_decay/test_derivation.py"
_USE = "build the optimizer's groups with pl_normkit.methods.weight_decay.param_groups, or add the GammaDecay callback"


def _known(subject: Subject) -> ModelRoles:
    if subject.model is None or subject.graph is None:
        raise NormkitError("a rule about roles needs the model and its graph")
    return read_graph(subject.model, subject.graph)


def _decays(subject: Subject) -> dict[str, float]:
    """Weight decay of every trainable parameter of the model that an optimizer holds, by name."""
    if subject.model is None:
        return {}
    names = {id(parameter): name for name, parameter in subject.model.named_parameters()}
    decays: dict[str, float] = defaultdict(float)
    for optimizer in subject.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in names and parameter.requires_grad:
                    name = names[id(parameter)]
                    decays[name] = max(decays[name], float(group.get("weight_decay", 0.0)))
    return decays


def _with_role(subject: Subject, *roles: Role, decayed: bool) -> list[str]:
    """Parameters of the given roles that an optimizer decays, or holds without decay."""
    decays = subject.once(_decays)
    known = subject.once(_known).roles
    return [name for name, role in known.items() if role in roles and name in decays and (decays[name] > 0) is decayed]


def _places(names: Iterable[str]) -> list[Place]:
    return [Place(name) for name in names]


def _strength(subject: Subject, names: Iterable[str], what: str = "largest weight decay among them", expected: str = "0") -> Evidence:
    decays = subject.once(_decays)
    return Evidence(what, max(decays[name] for name in names), expected, is_measured=False)


_OF_ROLE = {
    Role.GAMMA_SHORTCUT: ("norm scales of projection shortcuts", "a shrinking shortcut gives the branch more than its share"),
    Role.GAMMA_TRUNK: ("norm scales of the stem", "they set the variance that the first residual branches are added to"),
}


@rule(
    "NK201",
    "decay-on-shortcut-or-stem-scale",
    mark=Mark.DERIVED,
    source=_SHEET,
    needs=(Needs.MODEL, Needs.GRAPH, Needs.OPTIMIZERS),
)
def decay_on_shortcut_or_stem_scale(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds weight decay on the batch-norm scale (gamma) of a projection shortcut or of the stem of a post-activation residual network.

    Why it hurts
    Decay pulls the scale to 0. On a projection shortcut the branch then outweighs the shortcut by (gamma_last / gamma_shortcut)^2 in
    variance, the opposite of an identity mapping; and decaying both scales cancels what decaying gamma_last brings.

    Evidence
    The largest weight decay among such scales.

    Example
    torch.optim.AdamW(resnet50().parameters(), weight_decay=0.05)

    Use instead
    torch.optim.AdamW(param_groups(resnet50(), weight_decay=0.05, example_inputs=x))

    Fix and its safety
    Advice only: groups are made where the optimizer is built, by `param_groups` or the `GammaDecay` callback.

    Source
    Derived here (high confidence for shortcuts, medium-low for the stem) from the principles named in the abstract of arXiv
    2205.07260. The abstract does not say which scales it means. Checked by tests/methods/weight_decay/test_derivation.py.
    """
    core = subject.once(_known).core_gammas
    for role, (what, why) in _OF_ROLE.items():
        names = [name for name in _with_role(subject, role, decayed=True) if name in core]
        if names:
            yield Observation(
                f"weight decay pulls the {what} to 0: {why}",
                _places(names),
                f"take them out of weight decay: {_USE}",
                (_strength(subject, names),),
                cause=role.value,
                severity=Severity.NOTE if role is Role.GAMMA_TRUNK else None,
            )


@rule(
    "NK202",
    "no-decay-on-last-scale",
    mark=Mark.DERIVED,
    source=_SHEET,
    severity=Severity.NOTE,
    needs=(Needs.MODEL, Needs.GRAPH, Needs.OPTIMIZERS),
)
def no_decay_on_last_scale(subject: Subject) -> Iterator[Observation]:
    """What it does
    Notes that the last batch-norm scale of post-activation residual branches gets no weight decay while the weights get it.

    Why it hurts
    The variance a branch adds is gamma_last^2; decay on gamma_last keeps blocks close to an identity mapping. The common exclusion of
    all norm scales gives this up.

    Evidence
    The weight decay that the weights get and these scales do not.

    Example
    Parameter groups that exclude every one-dimensional parameter from weight decay.

    Use instead
    param_groups(model, weight_decay=0.05, example_inputs=x), which decays the last scales and leaves the shortcuts' alone.

    Fix and its safety
    Advice only: groups are made where the optimizer is built.

    Source
    Derived here (high confidence) from the principle of variance control named in the abstract of arXiv 2205.07260, which does not
    name the scales. Checked by tests/methods/weight_decay/test_derivation.py.
    """
    core = subject.once(_known).core_gammas
    names = [name for name in _with_role(subject, Role.GAMMA_LAST, decayed=False) if name in core]
    weights = _with_role(subject, Role.WEIGHT, decayed=True)
    if names and weights:
        yield Observation(
            "the last norm scale of residual branches gets no weight decay, though the weights do",
            _places(names),
            f"decay them as the weights: {_USE}",
            (_strength(subject, weights, "largest weight decay of the weights", ""),),
        )


_SPECIAL = {
    Role.POSITION: "positional embeddings",
    Role.RELATIVE_POSITION: "relative-position tables",
    Role.TOKEN: "class, register or query tokens",
    Role.LAYER_SCALE: "layer scales",
    Role.TEMPERATURE: "temperatures",
    Role.GAIN: "weight gains",
    Role.OWN: "parameters of this library's modules",
}
_SHIFTS = {Role.BIAS: "biases", Role.BETA: "norm shifts"}


@rule(
    "NK203",
    "decay-on-special-parameters",
    mark=Mark.DERIVED,
    source="derived here; the exclusion lists (`no_weight_decay`) of timm's own models name the same parameters",
    needs=(Needs.MODEL, Needs.GRAPH, Needs.OPTIMIZERS),
)
def decay_on_special_parameters(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds weight decay on positional embeddings, tokens, relative-position tables, layer scales, temperatures, biases and norm shifts.

    Why it hurts
    Weight decay prefers small values, which is a simpler function for a weight matrix. For these parameters 0 is not simpler: no
    position, no token, a branch that is switched off. For biases and shifts the harm is small, so alone they are a note.

    Evidence
    The largest weight decay among such parameters.

    Example
    torch.optim.AdamW(vit.parameters(), weight_decay=0.05); also timm's `param_groups_weight_decay` when it is not given the model's
    `no_weight_decay()` list: it goes by dimensions, and `pos_embed` and `cls_token` have three.

    Use instead
    param_groups(vit, weight_decay=0.05, example_inputs=x)

    Fix and its safety
    Advice only: groups are made where the optimizer is built.

    Source
    Derived here; common practice in model libraries, no published effect size is claimed.
    """
    names = _with_role(subject, *_SPECIAL, *_SHIFTS, decayed=True)
    if not names:
        return
    known = subject.once(_known).roles
    roles = {known[name] for name in names}
    told = ", ".join(what for role, what in {**_SPECIAL, **_SHIFTS}.items() if role in roles)
    yield Observation(
        f"weight decay reaches {told}",
        _places(names),
        f"take them out of weight decay: {_USE}",
        (_strength(subject, names),),
        severity=Severity.NOTE if roles <= set(_SHIFTS) else None,
    )


@rule(
    "NK204",
    "parameter-not-in-one-optimizer",
    mark=Mark.DERIVED,
    source="how torch.optim works; tests/methods/weight_decay/test_rules.py",
    needs=(Needs.MODEL, Needs.OPTIMIZERS),
)
def parameter_not_in_one_optimizer(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds trainable parameters that no optimizer holds, and parameters that two optimizers hold.

    Why it hurts
    The first never learn although they get gradients; the second are stepped, and decayed, twice.

    Evidence
    Their share of all trainable elements.

    Example
    torch.optim.SGD(model.encoder.parameters(), lr=0.1) in a run that means to train the decoder too.

    Use instead
    Give every trainable parameter to one optimizer, and set requires_grad_(False) on what should stay as it is.

    Fix and its safety
    Advice only.

    Source
    Derived here from how torch.optim works; checked by tests/methods/weight_decay/test_rules.py.
    """
    if subject.model is None:
        return
    holders = Counter(
        identity
        for optimizer in subject.optimizers
        for identity in {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    )
    trainable = {name: parameter for name, parameter in subject.model.named_parameters() if parameter.requires_grad}
    total = sum(parameter.numel() for parameter in trainable.values())
    none = [name for name, parameter in trainable.items() if holders[id(parameter)] == 0]
    several = [name for name, parameter in trainable.items() if holders[id(parameter)] > 1]
    cases = (
        ("no optimizer", none, "never learn", "add them to an optimizer, or freeze them with requires_grad_(False)"),
        ("two optimizers", several, "are stepped twice", "keep each parameter in one optimizer"),
    )
    for where, names, harm, advice in cases:
        if names:
            share = sum(trainable[name].numel() for name in names) / total
            yield Observation(
                f"trainable parameters in {where} {harm}",
                _places(names),
                advice,
                (Evidence("share of all trainable elements", share, "0", is_measured=False),),
                cause=where,
            )


_COUPLED = (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)
_MEANT_DECOUPLED = 1e-3


def _coupled_decays(optimizer: Optimizer) -> list[float]:
    """Decays that the optimizer adds to the gradient before its second moment, where they are large enough to be meant decoupled."""
    if not isinstance(optimizer, _COUPLED) or isinstance(optimizer, torch.optim.AdamW):
        return []
    groups = [group for group in optimizer.param_groups if not group.get("decoupled_weight_decay", False)]
    return [decay for group in groups if (decay := float(group.get("weight_decay", 0.0))) >= _MEANT_DECOUPLED]


@rule(
    "NK205",
    "coupled-decay-in-adam",
    mark=Mark.PUBLISHED,
    source="arXiv 1711.05101 (Decoupled Weight Decay Regularization): L2 and weight decay differ for adaptive methods",
    needs=(Needs.OPTIMIZERS,),
)
def coupled_decay_in_adam(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds Adam, NAdam, RAdam or Adamax with an L2 term as large as people give to decoupled weight decay (1e-3 and more).

    Why it hurts
    These optimizers add the term to the gradient and then divide by the root of its second moment, so parameters with large gradients
    are decayed less, and a value chosen for AdamW does something else.

    Evidence
    The largest weight decay of the optimizer's groups.

    Example
    torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.05)

    Use instead
    torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05), or decoupled_weight_decay=True for NAdam and RAdam.

    Fix and its safety
    Advice only: it changes what is trained.

    Source
    Published: arXiv 1711.05101 states that L2 and weight decay are not the same for adaptive methods. The threshold 1e-3 is derived
    here from the values in use: L2 terms for Adam run from 1e-6 to 5e-4, decoupled decays from 1e-2 to 0.3.
    """
    for index, optimizer in enumerate(subject.optimizers):
        decays = _coupled_decays(optimizer)
        if decays:
            kind = type(optimizer).__name__
            mend = "torch.optim.AdamW" if kind == "Adam" else f"{kind}(..., decoupled_weight_decay=True) or torch.optim.AdamW"
            yield Observation(
                f"{kind} adds its weight decay to the gradient and then rescales it (L2, not decoupled decay)",
                [Place("")],
                f"use {mend}, or an L2 term below {_MEANT_DECOUPLED:g} if L2 is meant",
                (Evidence("largest weight decay", max(decays), f"below {_MEANT_DECOUPLED:g} for L2", is_measured=False),),
                cause=f"optimizer {index}",
            )


@rule(
    "NK206",
    "decay-against-low-confidence-role",
    mark=Mark.DERIVED,
    source=_SHEET,
    severity=Severity.NOTE,
    needs=(Needs.MODEL, Needs.GRAPH, Needs.OPTIMIZERS),
    preview=True,
)
def decay_against_low_confidence_role(subject: Subject) -> Iterator[Observation]:
    """What it does
    As NK201 and NK202 for the places where our derivation is of low confidence: pre-activation branches, MBConv blocks, layer norms.

    Why it hurts
    The same two principles, carried over to places that we have not checked by experiment.

    Evidence
    The weight decay that the weights get.

    Example
    A pre-norm transformer whose final layer norm is decayed, or whose branch norms are not.

    Use instead
    param_groups(model, weight_decay=0.05, example_inputs=x, policy="gamma_roles_extended")

    Fix and its safety
    Advice only: groups are made where the optimizer is built.

    Source
    Derived here with low confidence, so off until selected.
    """
    core = subject.once(_known).core_gammas
    wanted = {Role.GAMMA_LAST: True, Role.GAMMA_BRANCH: True, Role.GAMMA_SHORTCUT: False, Role.GAMMA_TRUNK: False}
    weights = _with_role(subject, Role.WEIGHT, decayed=True)
    if not weights:
        return
    for role in GAMMAS:
        names = [name for name in _with_role(subject, role, decayed=not wanted[role]) if name not in core]
        if names:
            state = "gets no weight decay" if wanted[role] else "gets weight decay"
            yield Observation(
                f"norm scales of role {role.value}: each {state}, against our low-confidence derivation",
                _places(names),
                'param_groups(..., policy="gamma_roles_extended"), if you want to try it',
                (_strength(subject, weights, "largest weight decay of the weights", ""),),
                cause=role.value,
            )
