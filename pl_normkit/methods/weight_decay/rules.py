"""NK2xx: what weight decay reaches, and what it should. By default what `param_groups` takes out of decay, and no more, is named."""

from __future__ import annotations

__all__ = [
    "coupled_decay_in_adam",
    "decay_against_low_confidence_role",
    "decay_on_norm_scales",
    "decay_on_shortcut_or_stem_scale",
    "decay_on_special_parameters",
    "no_decay_on_last_scale",
    "parameter_not_in_one_optimizer",
    "parameter_of_unknown_role",
]

from collections import defaultdict
from collections.abc import Iterable, Iterator

from pl_normkit.errors import NormkitError
from pl_normkit.findings import Evidence, Place, Severity
from pl_normkit.methods.weight_decay.find import ModelRoles, read_graph
from pl_normkit.methods.weight_decay.optimizer_rules import coupled_decay_in_adam, parameter_not_in_one_optimizer
from pl_normkit.methods.weight_decay.policy import PRESETS
from pl_normkit.methods.weight_decay.roles import GAMMAS, Role
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

_DERIVED = "derived here from the two principles in the abstract of arXiv 2205.07260; tests/methods/weight_decay/test_derivation.py"
_OUT = "Take them out of weight decay: build the optimizer's groups with pl_normkit.param_groups, or add the GammaDecay callback"
FEW_BLOCKS = 6
"""Post-activation networks with fewer residual blocks gained nothing (5 blocks) or lost (3 blocks) when their last scales were decayed."""


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


@rule(
    "NK201",
    "decay-on-shortcut-or-stem-scale",
    mark=Mark.DERIVED,
    source=_DERIVED,
    severity=Severity.NOTE,
    needs=(Needs.MODEL, Needs.GRAPH, Needs.OPTIMIZERS),
)
def decay_on_shortcut_or_stem_scale(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds weight decay on the batch-norm scale (gamma) of a projection shortcut or of the stem of a post-activation residual network.

    Why it hurts
    Decay pulls the scale to 0. On a projection shortcut the branch then outweighs the shortcut by (gamma_last / gamma_shortcut)^2 in
    variance, the opposite of an identity mapping; and decaying both scales cancels what decaying gamma_last brings. A note, since an
    effect on the accuracy has not been shown.

    Evidence
    The largest weight decay among such scales.

    Example
    ```python
    import torch
    from torchvision.models import resnet18

    with torch.device("meta"):
        model = resnet18()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    ```

    Use instead
    ```python
    from pl_normkit import param_groups

    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.05, example_inputs=torch.zeros(1, 3, 64, 64)))
    ```

    Fix and its safety
    Advice only: groups are made where the optimizer is built, by `param_groups` or the `GammaDecay` callback.

    Source
    Derived here (high confidence for shortcuts, medium-low for the stem) from the principles named in the abstract of arXiv
    2205.07260. The abstract does not say which scales it means. Checked by tests/methods/weight_decay/test_derivation.py.
    """
    names = _core_of_shortcut_or_stem(subject)
    if names:
        yield Observation(
            "weight decay pulls norm scales of projection shortcuts or of the stem to 0, so that the branches outweigh the trunk",
            _places(names),
            _OUT,
            (_strength(subject, names),),
        )


def _core_of_shortcut_or_stem(subject: Subject) -> list[str]:
    core = subject.once(_known).core_gammas
    return [name for name in _with_role(subject, Role.GAMMA_SHORTCUT, Role.GAMMA_TRUNK, decayed=True) if name in core]


@rule(
    "NK202",
    "no-decay-on-last-scale",
    mark=Mark.DERIVED,
    source=_DERIVED,
    severity=Severity.NOTE,
    needs=(Needs.MODEL, Needs.GRAPH, Needs.OPTIMIZERS),
    preview=True,
)
def no_decay_on_last_scale(subject: Subject) -> Iterator[Observation]:
    """What it does
    Notes that the last batch-norm scale of post-activation residual branches gets no weight decay while the weights get it, in
    networks of 6 such blocks or more.

    Why it hurts
    The variance a branch adds is gamma_last^2; decay on gamma_last keeps blocks close to an identity mapping. The common exclusion of
    all norm scales gives this up. A preview, since no gain has been shown on fresh seeds: with 12 blocks (SGD, decay 5e-3) the
    accuracy rose by 0.59 +- 0.51 points, the fresh seeds alone prove nothing; with 5 blocks there was no difference; with 3 blocks at
    decay 0.05 it fell by 1.09 +- 0.36. So shallow networks are left out, and should follow the common exclusion.

    Evidence
    The weight decay that the weights get and these scales do not.

    Example
    Parameter groups that exclude every one-dimensional parameter from weight decay:

    ```python
    import torch
    from pl_normkit import param_groups
    from torchvision.models import resnet18

    with torch.device("meta"):
        model = resnet18()
    optimizer = torch.optim.SGD(param_groups(model, 5e-3, policy="ndim"), lr=0.1)
    ```

    Use instead
    The last scales decayed and the shortcuts' left alone, if you want to try it:

    ```python
    groups = param_groups(model, 5e-3, example_inputs=torch.zeros(1, 3, 64, 64), policy="gamma_roles")
    optimizer = torch.optim.SGD(groups, lr=0.1)
    ```

    Fix and its safety
    Advice only: groups are made where the optimizer is built.

    Source
    Derived here (high confidence) from the principle of variance control named in the abstract of arXiv 2205.07260, which does not
    name the scales. Checked by tests/methods/weight_decay/test_derivation.py.
    """
    known = subject.once(_known)
    names = [name for name in _with_role(subject, Role.GAMMA_LAST, decayed=False) if name in known.core_gammas]
    weights = _with_role(subject, Role.WEIGHT, decayed=True)
    if names and weights and known.core_blocks >= FEW_BLOCKS:
        yield Observation(
            "the last norm scale of residual branches gets no weight decay, though the weights do",
            _places(names),
            'Decay them as the weights if you want to try it: param_groups(..., policy="gamma_roles")',
            (_strength(subject, weights, "largest weight decay of the weights", ""),),
        )


_SPECIAL = {
    Role.POSITION: "positional embeddings",
    Role.RELATIVE_POSITION: "relative-position tables",
    Role.TOKEN: "class, register or query tokens",
    Role.LAYER_SCALE: "layer scales",
    Role.TEMPERATURE: "temperatures",
}
_SMALL = {
    Role.GAIN: "gains",
    Role.SLOPE: "slopes of PReLU",
    Role.OWN: "parameters of this library's modules",
    Role.BIAS: "biases",
    Role.BETA: "norm shifts",
}


@rule(
    "NK203",
    "decay-on-special-parameters",
    mark=Mark.DERIVED,
    source="derived here; the exclusion lists (`no_weight_decay`) of timm's own models name the same parameters",
    needs=(Needs.MODEL, Needs.GRAPH, Needs.OPTIMIZERS),
)
def decay_on_special_parameters(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds weight decay on positional embeddings, tokens, relative-position tables, layer scales, temperatures, gains, slopes, biases and
    norm shifts.

    Why it hurts
    Weight decay prefers small values, which is a simpler function for a weight matrix. For these parameters 0 is not simpler: no
    position, no token, a branch that is switched off. For gains, slopes, biases and shifts the harm is small, so alone they are a note.

    Evidence
    The largest weight decay among such parameters.

    Example
    One group over everything; also timm's `param_groups_weight_decay` when it is not given the model's `no_weight_decay()` list: it
    goes by dimensions, and `pos_embed` and `cls_token` have three.

    ```python
    import torch
    from torchvision.models import vit_b_32

    with torch.device("meta"):
        vit = vit_b_32()
    optimizer = torch.optim.AdamW(vit.parameters(), weight_decay=0.05)
    ```

    Use instead
    ```python
    from pl_normkit import param_groups

    optimizer = torch.optim.AdamW(param_groups(vit, weight_decay=0.05, example_inputs=torch.zeros(1, 3, 224, 224)))
    ```

    Fix and its safety
    Advice only: groups are made where the optimizer is built.

    Source
    Derived here; common practice in model libraries, no published effect size is claimed. That PReLU's slopes should not be decayed is
    published (arXiv 1502.01852, section 2.1).
    """
    names = _with_role(subject, *_SPECIAL, *_SMALL, decayed=True)
    if not names:
        return
    known = subject.once(_known).roles
    roles = {known[name] for name in names}
    told = ", ".join(what for role, what in {**_SPECIAL, **_SMALL}.items() if role in roles)
    yield Observation(
        f"weight decay reaches {told}",
        _places(names),
        _OUT,
        (_strength(subject, names),),
        severity=Severity.NOTE if roles <= set(_SMALL) else None,
    )


@rule(
    "NK206",
    "decay-against-low-confidence-role",
    mark=Mark.DERIVED,
    source=_DERIVED,
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
    A pre-norm transformer whose final layer norm is decayed, or whose branch norms are not:

    ```python
    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    ```

    Use instead
    ```python
    from pl_normkit import param_groups

    groups = param_groups(model, 0.05, example_inputs=torch.zeros(2, 5, 8), policy="gamma_roles_extended")
    optimizer = torch.optim.AdamW(groups)
    ```

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
                'Take param_groups(..., policy="gamma_roles_extended") if you want to try it',
                (_strength(subject, weights, "largest weight decay of the weights", ""),),
                cause=role.value,
            )


@rule(
    "NK207",
    "decay-on-norm-scales",
    mark=Mark.DERIVED,
    source="common practice: timm's and nanoGPT's rules by dimensions and transformers' by type leave norm scales out; no effect claimed",
    severity=Severity.NOTE,
    needs=(Needs.MODEL, Needs.GRAPH, Needs.OPTIMIZERS),
)
def decay_on_norm_scales(subject: Subject) -> Iterator[Observation]:
    """What it does
    Notes weight decay on scales of norms, as one group over everything gives it, or a pattern of names that matches none of them
    ("LayerNorm.weight" where the model says `norm1.weight`). Scales that NK201 names are not named again. Quiet where the decayed
    scales are those of policy `"gamma_roles"` or `"gamma_roles_extended"`: that is a choice.

    Why it hurts
    Zero is no simpler scale: it switches a norm off, where 1 leaves it as it is. The effect is small as a rule, so this is a note.

    Evidence
    The largest weight decay among such scales.

    Example
    ```python
    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    skipped = ("bias", "LayerNorm.weight")  # here they are called norm1.weight and norm2.weight
    decayed = [p for name, p in layer.named_parameters() if not name.endswith(skipped)]
    rest = [p for name, p in layer.named_parameters() if name.endswith(skipped)]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}])
    ```

    Use instead
    ```python
    from pl_normkit import param_groups

    optimizer = torch.optim.AdamW(param_groups(layer, 0.05, example_inputs=torch.zeros(2, 5, 8)))
    ```

    Fix and its safety
    Advice only.

    Source
    Derived from common practice in model libraries; no published effect size is claimed.
    """
    known, held = subject.once(_known), subject.once(_decays)
    decayed = _with_role(subject, *GAMMAS, decayed=True)
    by_role = [PRESETS[name].factors(known) for name in ("gamma_roles", "gamma_roles_extended")]
    chosen = [[name for name, role in known.roles.items() if role in GAMMAS and name in held and factors[name]] for factors in by_role]
    names = [name for name in decayed if name not in _core_of_shortcut_or_stem(subject)]
    if names and decayed not in chosen:
        yield Observation("weight decay reaches scales of norms", _places(names), _OUT, (_strength(subject, names),))


@rule(
    "NK208",
    "parameter-of-unknown-role",
    mark=Mark.DERIVED,
    source="derived here: what no operation of the traced forward pass tells; tests/methods/weight_decay/test_rules.py",
    severity=Severity.NOTE,
    needs=(Needs.MODEL, Needs.GRAPH, Needs.OPTIMIZERS),
)
def parameter_of_unknown_role(subject: Subject) -> Iterator[Observation]:
    """What it does
    Names parameters whose role could not be read: those that get decay, and those of two axes or more that get none though weights do.

    Why it hurts
    It may not: whether decay belongs there is yours to decide. `param_groups` leaves such parameters out.

    Evidence
    Their number.

    Example
    ```python
    import torch
    from torch import nn


    class Field(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.field


    model = Field(8, 8)
    model.field = nn.Parameter(torch.ones(4, 8))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    ```

    Use instead
    Decide by name:

    ```python
    from pl_normkit import param_groups

    groups = param_groups(model, 0.05, example_inputs=torch.zeros(2, 4, 8), overrides={"field": 0.0})
    optimizer = torch.optim.AdamW(groups)
    ```

    Fix and its safety
    Advice only.

    Source
    Derived here.
    """
    assert subject.model is not None
    shapes = {name: parameter.shape for name, parameter in subject.model.named_parameters()}
    decayed = _with_role(subject, Role.UNKNOWN, decayed=True)
    left_out = [name for name in _with_role(subject, Role.UNKNOWN, decayed=False) if sum(size > 1 for size in shapes[name]) > 1]
    left_out = left_out if _with_role(subject, Role.WEIGHT, decayed=True) else []
    for state, names in (("get weight decay", decayed), ("get no weight decay", left_out)):
        if names:
            yield Observation(
                f"parameters whose role is unknown {state}",
                _places(names),
                "Decide with overrides={pattern: factor} of param_groups or GammaDecay",
                (Evidence("how many", float(len(names)), "", is_measured=False),),
                cause=state,
            )
