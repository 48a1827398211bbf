from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, NormkitWarning
from pl_normkit.graph import ModelGraph
from pl_normkit.methods.weight_decay import PRESETS, DecayPolicy, Role, describe_decay, param_groups, read_model
from pl_normkit.methods.weight_decay.fix import parameter_names
from pl_normkit.methods.weight_decay.layout import check_layouts, optimizer_layout
from pl_normkit.methods.weight_decay.optimizer_text import build_optimizer
from pl_normkit.methods.weight_decay.policy import resolve_policy
from pl_normkit.rules import Mark
from tests.methods.weight_decay.models import build


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.branch(x) + self.shortcut(x)


X = torch.zeros(2, 3, 4, 4)
KERNELS = ["stem.0.weight", "branch.0.weight", "branch.3.weight", "shortcut.0.weight"]
IN_BRANCH = ["branch.1.weight", "branch.4.weight"]


@pytest.fixture(scope="module")
def block() -> Block:
    return Block()


def layout(model: nn.Module, groups: list[dict[str, Any]]) -> list[tuple[float, list[str]]]:
    names = parameter_names(model)
    return [(group["weight_decay"], [names[id(parameter)] for parameter in group["params"]]) for group in groups]


def in_order(model: nn.Module, names: set[str]) -> list[str]:
    return [name for name, _ in model.named_parameters() if name in names]


@pytest.mark.parametrize(
    ("policy", "decayed"),
    [
        ("gamma_roles", {*KERNELS, *IN_BRANCH}),
        ("no_norm", {*KERNELS}),
        ("all", {name for name, _ in Block().named_parameters()}),
    ],
)
def test_presets(block: Block, policy: str, decayed: set[str]) -> None:
    rest = {name for name, _ in block.named_parameters()} - decayed
    expected = [(0.05, in_order(block, decayed)), (0.0, in_order(block, rest))]

    assert [part for part in expected if part[1]] == layout(block, param_groups(block, 0.05, X, policy=policy))


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_a_wrapped_model_gets_the_groups_of_the_original(block: Block, wrap: Callable[[nn.Module], nn.Module]) -> None:
    expected = layout(block, param_groups(block, 0.1, X))
    assert [decay for decay, _ in expected] == [0.1, 0.0]
    assert layout(block, param_groups(wrap(block), 0.1, X)) == expected


def test_extensions_are_opt_in() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
    x = torch.zeros(2, 5, 8)
    norms = {"norm1.weight", "norm2.weight"}
    plain = layout(model, param_groups(model, 0.1, x))
    extended = layout(model, param_groups(model, 0.1, x, policy="gamma_roles_extended"))

    assert norms <= set(plain[1][1])
    assert norms <= set(extended[0][1])


def test_overrides_are_checked_and_the_last_one_decides(block: Block) -> None:
    groups = param_groups(block, 0.1, X, overrides={"branch.*": 0.5, "branch.0.*": 2.0})

    assert [(decay, len(names)) for decay, names in layout(block, groups)] == [
        (0.2, 1),
        (0.1, 2),
        (0.05, 6),
        (0.0, 4),
    ]
    with pytest.raises(ConfigError, match=r"'brnch\.\*' matches no parameter"):
        param_groups(block, 0.1, X, overrides={"brnch.*": 0.0})


def test_existing_groups_keep_their_options_and_equal_ones_merge(block: Block) -> None:
    groups = [
        {"params": list(block.stem.parameters()), "lr": 0.1},
        {"params": list(block.branch.named_parameters()), "lr": 0.2, "weight_decay": 0.7},
        {"params": block.shortcut.parameters(), "lr": 0.1},
    ]
    made = param_groups(block, 0.1, X, groups=groups, policy="gamma_roles")

    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in made] == [
        (0.1, 0.1, 2),
        (0.1, 0.0, 4),
        (0.2, 0.1, 4),
        (0.2, 0.0, 3),
    ]
    assert made[2]["params"][0][0] == "0.weight"


def test_a_parameter_in_two_groups_is_refused(block: Block) -> None:
    twice = [{"params": list(block.parameters())}, {"params": [block.stem[0].weight]}]

    with pytest.raises(ConfigError, match=r"'stem\.0\.weight' is in two groups"):
        param_groups(block, 0.1, X, groups=twice)


@pytest.mark.parametrize("decay", [-0.1, float("nan")])
def test_a_decay_that_is_none_is_refused(block: Block, decay: float) -> None:
    with pytest.raises(ConfigError, match="0 or positive"):
        param_groups(block, decay, X)


def test_unknown_roles_are_reported_and_not_decayed(block: Block) -> None:
    with pytest.warns(NormkitWarning, match=r"role of 4 parameters is unknown.*stem\.1\.weight.*need example_inputs"):
        groups = param_groups(block, 0.1, policy="gamma_roles")

    assert layout(block, groups)[0] == (0.1, in_order(block, {*KERNELS}))


def test_an_override_silences_the_report(block: Block) -> None:
    groups = param_groups(block, 0.1, overrides={"*.[14].weight": 0.0})

    assert len(groups) == 2


def test_one_trace_at_most(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []
    original = ModelGraph.from_model
    monkeypatch.setattr(ModelGraph, "from_model", lambda *arguments: traces.append(1) or original(*arguments))
    param_groups(block, 0.1, X)
    assert len(traces) == 1
    param_groups(block, 0.1, known=read_model(block, X))
    assert len(traces) == 2


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data())
def test_every_parameter_is_in_exactly_one_group(data: st.DataObject) -> None:
    """Whatever the roles, the factors and the groups that exist."""
    count = data.draw(st.integers(1, 8))
    model = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(count)])
    names = [name for name, _ in model.named_parameters()]
    roles = {name: data.draw(st.sampled_from([role for role in Role if role is not Role.UNKNOWN])) for name in names}
    known = replace(read_model(model), roles=roles, is_traced=True)
    homes = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    given_groups = [
        {"params": [parameter for parameter, home in zip(model, homes, strict=True) if home == index], "lr": 0.1 * (index % 2)}
        for index in range(3)
    ]
    overrides = data.draw(st.dictionaries(st.sampled_from(names), st.sampled_from([0.0, 0.5, 1.0]), max_size=3))
    policy = data.draw(st.sampled_from(sorted(PRESETS)))
    made = param_groups(model, 0.1, known=known, policy=policy, overrides=overrides, groups=given_groups)
    again = param_groups(model, 0.1, known=known, policy=policy, overrides=overrides, groups=made)

    held = [id(parameter) for group in made for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model)
    assert layout(model, again) == layout(model, made)
    options = [(group["lr"], group["weight_decay"]) for group in made]
    assert len(set(options)) == len(options)


BY_ROLE = {name: policy for name, policy in PRESETS.items() if policy.lines}


@pytest.mark.parametrize("policy", BY_ROLE.values(), ids=BY_ROLE)
def test_policies_are_complete_and_survive_json(policy: DecayPolicy) -> None:
    assert DecayPolicy.from_json(policy.to_json()) == policy
    assert [line.role for line in policy.lines] != []
    assert {line.role for line in policy.lines} == set(Role)


def test_what_a_paper_says_is_marked_apart_from_what_we_derive() -> None:
    marks = {line.role: line.mark for line in PRESETS["gamma_roles"].lines}

    assert {role for role, mark in marks.items() if mark is Mark.PUBLISHED} == {Role.SLOPE}
    assert PRESETS["gamma_roles"].line(Role.GAMMA_LAST).confidence == "high"


@pytest.mark.parametrize("text", ["{}", "[]", "not json", json.dumps({"name": "x", "lines": [], "extensions": False, "overrides": {}})])
def test_a_text_that_is_no_policy_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"no weight-decay policy|exactly one line per role"):
        DecayPolicy.from_json(text)


def test_an_unknown_policy_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gamma_roles'"):
        resolve_policy("gama_roles")


def test_a_negative_factor_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 or a positive number, not -1"):
        resolve_policy("no_norm", {"*": -1})


def test_the_table_shows_every_role_of_the_model_with_its_ground(block: Block) -> None:
    rows = describe_decay(read_model(block, X), "gamma_roles").splitlines()

    assert [row.split()[:3] for row in rows[1:]] == [
        ["weight", "4", "1"],
        ["gamma_last", "1", "1"],
        ["gamma_shortcut", "1", "0"],
        ["gamma_branch", "1", "1"],
        ["gamma_trunk", "1", "0"],
        ["beta", "4", "0"],
        ["bias", "1", "0"],
    ]
    assert "derived, high confidence" in rows[2]


class Wrapper(nn.Module):
    """As FSDP1 names things: the wrapped module is a child."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = wrapped

    def forward(self, x: Tensor) -> Tensor:
        return self._fsdp_wrapped_module(x)


def test_roles_read_before_wrapping_hold_after_it() -> None:
    model = Block()
    known = read_model(model, X)
    before = layout(model, param_groups(model, 0.1, known=known))
    model.branch = Wrapper(model.branch)  # type: ignore[assignment]
    wrapped = Wrapper(model)

    assert layout(wrapped, param_groups(wrapped, 0.1, known=known)) == before


def test_layouts_tell_what_moved(block: Block) -> None:
    names = parameter_names(block)

    def of(policy: str) -> Any:
        return optimizer_layout(torch.optim.SGD(param_groups(block, 0.1, X, policy=policy), lr=0.1), names)

    check_layouts([of("no_norm")], [of("no_norm")])
    with pytest.raises(ConfigError, match=r"in another group: branch\.1\.weight \(1 -> 0\), branch\.4\.weight \(1 -> 0\)"):
        check_layouts([of("no_norm")], [of("gamma_roles")])
    with pytest.raises(ConfigError, match="1 groups in the checkpoint, 2 now"):
        check_layouts([of("all")], [of("no_norm")])
    turned = of("no_norm")
    turned["groups"][0].reverse()
    with pytest.raises(ConfigError, match="the same groups in another order"):
        check_layouts([of("no_norm")], [turned])


def test_an_optimizer_from_text(block: Block) -> None:
    block.stem.requires_grad_(False)
    optimizer = build_optimizer("torch.optim.AdamW(lr=1e-3, weight_decay=0.05, betas=(0.8, 0.9))", block)
    block.stem.requires_grad_(True)

    assert type(optimizer) is torch.optim.AdamW
    assert {key: optimizer.param_groups[0][key] for key in ("lr", "weight_decay", "betas")} == {
        "lr": 1e-3,
        "weight_decay": 0.05,
        "betas": (0.8, 0.9),
    }
    assert len(optimizer.param_groups[0]["params"]) == len(list(block.parameters())) - 3
    assert type(build_optimizer("SGD(lr=0.1)", block)) is torch.optim.SGD


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torch.optim.AdmW(lr=1)", "did you mean 'AdamW'"),
        ("torch.nn.Linear(lr=1)", "no optimizer class"),
        ("nowhere.Adam(lr=1)", "no module 'nowhere'"),
        ("AdamW(lr=open('x'))", "options are literals"),
        ("AdamW(0.1)", "given by keyword"),
        ("AdamW(**{'lr': 1})", "given by keyword"),
        ("AdamW(lr=1", "no optimizer"),
        ("1 + 1", "no optimizer"),
        ("AdamW(lr=-1.0)", "does not take these options"),
        ("AdamW(learning_rate=1.0)", "does not take these options"),
    ],
)
def test_a_text_that_is_no_optimizer_is_refused(block: Block, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(text, block)


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore::pl_normkit.errors.NormkitWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("family", __import__("timm").models.list_modules())
def test_every_parameter_of_every_timm_family_is_in_exactly_one_group(family: str) -> None:
    import timm

    names = sorted(timm.list_models(module=family), key=lambda name: (not any(k in name for k in ("nano", "tiny", "small", "_s")), name))
    model, x = build(f"timm:{names[0]}")
    groups = param_groups(model, 0.05, x)
    held = [id(parameter) for group in groups for parameter in group["params"]]

    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    assert len(groups) == 2
