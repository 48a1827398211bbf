from __future__ import annotations

import warnings
from typing import Any

import pytest
import timm.optim
import torch
from torch import nn

from pl_normkit.auditing import audit
from pl_normkit.errors import NormkitWarning
from pl_normkit.findings import Finding
from pl_normkit.methods.weight_decay import param_groups
from pl_normkit.methods.weight_decay.optimizer_text import build_optimizer
from tests.methods.weight_decay.models import build
from tests.methods.weight_decay.test_groups import Block, X

FAMILY = ("NK201", "NK203", "NK204", "NK205", "NK207", "NK208")


def findings(model: nn.Module, inputs: Any, *optimizers: torch.optim.Optimizer, select: tuple[str, ...] = FAMILY) -> list[Finding]:
    report = audit(model, inputs, optimizers=optimizers, select=select)
    assert [str(note) for note in report.notes] == (
        [] if inputs is not None else ["rules that need the traced model did not run: there are no example inputs"]
    )
    return report.findings


def places(found: list[Finding]) -> dict[str, int]:
    return {f"{finding.code} {finding.cause}".strip(): len(finding.places) for finding in found}


@pytest.fixture(scope="module")
def block() -> Block:
    return Block()


def test_plain_adamw_on_resnet50_gives_three_findings_at_most() -> None:
    model, inputs = build("tv:resnet50")
    found = findings(model, inputs, build_optimizer("torch.optim.AdamW(lr=1e-3, weight_decay=0.05)", model))

    assert places(found) == {"NK201": 5, "NK203": 54, "NK207": 48}
    by_code = {finding.code: finding for finding in found}
    assert {"bn1.weight", "layer1.0.downsample.1.weight"} < {place.module for place in by_code["NK201"].places}
    assert [(evidence.value, evidence.expected) for evidence in by_code["NK201"].evidence] == [(0.05, "0")]
    assert {finding.severity for finding in found} == {"note"}


@pytest.mark.parametrize("policy", ["no_norm", "gamma_roles", "gamma_roles_extended"])
def test_groups_by_role_give_none(block: Block, policy: str) -> None:
    optimizer = torch.optim.AdamW(param_groups(block, 0.05, X, policy=policy))

    assert findings(block, X, optimizer) == []


@pytest.mark.parametrize(("blocks", "expected"), [(5, {}), (6, {"NK202": 6})])
def test_undecayed_last_scales_are_a_preview_for_networks_of_many_blocks(blocks: int, expected: dict[str, int]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *(Plain() for _ in range(blocks)))
    optimizer = torch.optim.AdamW(param_groups(model, 0.05, X))

    assert findings(model, X, optimizer) == []
    assert places(findings(model, X, optimizer, select=("NK202",))) == expected
    by_role = torch.optim.AdamW(param_groups(model, 0.05, X, policy="gamma_roles"))
    assert findings(model, X, by_role, select=(*FAMILY, "NK202", "NK206")) == []


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.branch(x))


class Mixed(nn.Module):
    """A weight, a norm, a token, a slope, a gain, a shift and a parameter of unknown role."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.gain, self.field = (nn.Parameter(torch.ones(shape)) for shape in ((1, 1, 8), (8,), (7, 8)))
        self.norm, self.layer, self.slope, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.PReLU(), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)) * self.field
        return self.head(self.slope(self.layer(x) * self.gain))


AGREEING = {
    "block": lambda: (Block(), X),
    "mixed": lambda: (Mixed(), torch.zeros(2, 6, 8)),
    "encoder": lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.zeros(2, 5, 8)),
    **{spec: lambda spec=spec: build(spec) for spec in ("tv:resnet18", "timm:convnext_atto", "hf:t5", "hf:llama")},
}


@pytest.mark.parametrize("name", AGREEING)
def test_what_the_remedy_takes_out_of_decay_the_audit_names_and_nothing_else(name: str) -> None:
    model, inputs = AGREEING[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NormkitWarning)
        groups = param_groups(model, 0.05, inputs)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken_out = {names[id(parameter)] for group in groups if not group["weight_decay"] for parameter in group["params"]}
    found = findings(model, inputs, torch.optim.AdamW(model.parameters(), weight_decay=0.05))

    assert taken_out == {place.module for finding in found for place in finding.places}
    assert len([place for finding in found for place in finding.places]) == len(taken_out)
    assert [f.code for f in findings(model, inputs, torch.optim.AdamW(groups))] == (["NK208"] if name == "mixed" else [])


def test_a_pattern_of_names_that_misses_the_norms_is_noted() -> None:
    layer = AGREEING["encoder"]()[0]
    skipped = ("bias", "LayerNorm.weight")
    groups = [
        {"params": [p for n, p in layer.named_parameters() if n.endswith(skipped) is out], "weight_decay": 0.0 if out else 0.05}
        for out in (False, True)
    ]
    found = findings(layer, torch.zeros(2, 5, 8), torch.optim.AdamW(groups))

    assert places(found) == {"NK207": 2}


def test_a_parameter_of_unknown_role_is_named_decayed_or_not() -> None:
    model, inputs = AGREEING["mixed"]()
    everything = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    spared = torch.optim.AdamW(param_groups(model, 0.05, inputs, overrides={"field": 0.0}))

    assert places(findings(model, inputs, everything, select=("NK208",))) == {"NK208 get weight decay": 1}
    assert places(findings(model, inputs, spared, select=("NK208",))) == {"NK208 get no weight decay": 1}
    assert findings(model, inputs, torch.optim.SGD(model.parameters(), 0.1), select=("NK208",)) == []


def test_a_parameter_that_one_group_lists_twice(block: Block) -> None:
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = torch.optim.SGD([*block.parameters(), block.stem[0].weight], lr=0.1)
    found = findings(block, X, optimizer, select=("NK204",))

    assert {finding.cause: [place.module for place in finding.places] for finding in found} == {"one group twice": ["stem.0.weight"]}


def test_each_rule_alone_finds_what_it_finds_among_the_others() -> None:
    model, inputs = build("timm:deit_tiny_patch16_224")
    optimizer = torch.optim.Adam(list(model.parameters())[:-2], weight_decay=0.05)
    together = findings(model, inputs, optimizer)
    alone = [finding for code in FAMILY for finding in findings(model, inputs, optimizer, select=(code,))]

    assert sorted(finding.fingerprint for finding in alone) == sorted(finding.fingerprint for finding in together)
    assert places(together)["NK203"] == 50 + 25 + 2 - 1


def test_no_decay_at_all_gives_none(block: Block) -> None:
    assert findings(block, X, torch.optim.SGD(block.parameters(), lr=0.1)) == []


def test_timms_helper_decays_position_and_token_unless_told() -> None:
    model, inputs = build("timm:vit_base_patch16_224")
    by_helper = torch.optim.AdamW(timm.optim.param_groups_weight_decay(model, 0.05))
    told = torch.optim.AdamW(timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay()))

    assert {place.module for finding in findings(model, inputs, by_helper) for place in finding.places} == {"pos_embed", "cls_token"}
    assert findings(model, inputs, told) == []


def test_low_confidence_verdicts_only_when_selected() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True), 1, nn.LayerNorm(8), False)
    x = torch.zeros(2, 5, 8)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)

    assert places(findings(model, x, optimizer)) == {"NK203": 7, "NK207": 3}
    assert places(findings(model, x, optimizer, select=("NK206",))) == {"NK206 gamma_trunk": 1}
    by_practice = torch.optim.AdamW(param_groups(model, 0.05, x, policy="no_norm"))
    assert places(findings(model, x, by_practice, select=("NK206",))) == {"NK206 gamma_branch": 2}


def test_parameters_in_no_optimizer_and_in_two(block: Block) -> None:
    first = torch.optim.SGD(block.branch.parameters(), lr=0.1)
    second = torch.optim.SGD([*block.branch[0].parameters(), *block.stem.parameters()], lr=0.1)
    found = findings(block, X, first, second, select=("NK204",))

    assert {finding.cause: [place.module for place in finding.places] for finding in found} == {
        "no optimizer": ["shortcut.0.weight", "shortcut.1.weight", "shortcut.1.bias"],
        "two optimizers": ["branch.0.weight"],
    }
    total = sum(parameter.numel() for parameter in block.parameters())
    assert found[0].evidence[0].value == pytest.approx(24 / total)


def test_frozen_parameters_are_nobodys_business(block: Block) -> None:
    block.shortcut.requires_grad_(False)
    rest = [parameter for parameter in block.parameters() if parameter.requires_grad]
    found = findings(block, X, torch.optim.AdamW(rest, weight_decay=0.05))
    with_frozen = findings(block, X, torch.optim.AdamW(block.parameters(), weight_decay=0.05))
    block.shortcut.requires_grad_(True)

    assert places(found) == places(with_frozen) == {"NK201": 1, "NK203": 4, "NK207": 2}


COUPLED = [
    (torch.optim.Adam, {"weight_decay": 0.05}, True),
    (torch.optim.Adam, {"weight_decay": 1e-4}, False),
    (torch.optim.Adam, {"weight_decay": 0.05, "decoupled_weight_decay": True}, False),
    (torch.optim.NAdam, {"weight_decay": 0.01}, True),
    (torch.optim.NAdam, {"weight_decay": 0.01, "decoupled_weight_decay": True}, False),
    (torch.optim.RAdam, {"weight_decay": 0.01}, True),
    (torch.optim.Adamax, {"weight_decay": 0.01}, True),
    (torch.optim.AdamW, {"weight_decay": 0.05}, False),
    (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.05}, False),
]


@pytest.mark.parametrize(("kind", "options", "fires"), COUPLED)
def test_l2_through_adam(block: Block, kind: type[torch.optim.Optimizer], options: dict[str, Any], fires: bool) -> None:
    found = findings(block, X, kind(block.parameters(), **options), select=("NK205",))

    assert [finding.code for finding in found] == (["NK205"] if fires else [])


def test_rules_that_need_no_graph_run_without_inputs(block: Block) -> None:
    optimizer = torch.optim.Adam(block.parameters(), weight_decay=0.05)

    assert places(findings(block, None, optimizer)) == {"NK205 optimizer 0": 1}
