from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pl_normkit import audit
from pl_normkit.errors import NothingMatchedError
from pl_normkit.findings import FixSafety
from pl_normkit.methods.dropout_placement import measure_variance_shift, place_dropout
from tests.methods.residual_networks import LAYOUTS, Block, BlockSpec, Net, NetSpec

RULES = ["NK101", "NK102", "NK103", "NK104", "NK105"]


def found_places(model: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    report = audit(model, x, select=RULES, measure=False)
    assert list(report.notes) == []
    return sorted((finding.code, place.module) for finding in report.findings for place in finding.places)


@st.composite
def block_specs(draw: st.DrawFn, depth: int = 1) -> BlockSpec:
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    positions = st.lists(st.integers(0, len(LAYOUTS[layout])), max_size=2, unique=True)
    return BlockSpec(
        layout,
        tuple(sorted(draw(positions))),
        functional=draw(st.booleans()),
        projection=draw(st.booleans()),
        inner=draw(st.none() | block_specs(depth=depth - 1)) if depth else None,
    )


@st.composite
def net_specs(draw: st.DrawFn) -> NetSpec:
    blocks = tuple(draw(st.lists(block_specs(), min_size=1, max_size=3)))
    return NetSpec(
        blocks,
        trunk_dropout=draw(st.none() | st.integers(0, len(blocks) - 1)),
        head_dropout=draw(st.booleans()),
        functional_pool=draw(st.booleans()),
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(net_specs())
def test_finds_exactly_the_planted_mistakes(spec: NetSpec) -> None:
    with torch.device("meta"):
        net, x = Net(spec), torch.empty(2, 3, 8, 8)
    assert found_places(net, x) == spec.expected()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(net_specs())
def test_fix_is_idempotent_undoable_and_keeps_what_it_must(spec: NetSpec) -> None:
    torch.manual_seed(0)
    net, x = Net(spec).eval(), torch.randn(2, 3, 8, 8)
    if not any(place for place in (spec.trunk_dropout is not None, spec.head_dropout, *map(has_dropout, spec.blocks))):
        with pytest.raises(NothingMatchedError):
            place_dropout(net, x)
        return
    before, output, tree = copy.deepcopy(net.state_dict()), net(x), snapshot(net)
    changes = place_dropout(net, x)
    assert torch.equal(net(x), output)
    assert list(net.state_dict()) == list(before)
    after_once = snapshot(net)
    assert not place_dropout(net, x).made
    assert snapshot(net) == after_once
    fixable = [item for item in found_places(net, x) if item[0] != "NK105"]
    assert {path for _, path in fixable} == {change.module for change in changes.skipped}
    net.load_state_dict(before)
    changes.undo()
    assert snapshot(net) == tree


def has_dropout(block: BlockSpec) -> bool:
    return bool(block.dropouts) or (block.inner is not None and has_dropout(block.inner))


def snapshot(model: nn.Module) -> list[tuple[object, ...]]:
    """The module objects, their plain attributes and their hooks, in order."""
    return [
        (name, id(module), module.training, tuple(module._forward_pre_hooks), tuple(module._forward_hooks), getattr(module, "p", None))
        for name, module in model.named_modules(remove_duplicate=False)
    ]


class Bare(nn.Module):
    """One pre-activation block on wide inputs without positions: the setting of the derivation's numbers."""

    def __init__(self, position: int, p: float, width: int = 128) -> None:
        super().__init__()
        spec = BlockSpec("pre-basic", (position,) if position else ())
        self.trunk = nn.Dropout(p if position == -1 else 0.0)
        self.block = Block(spec if position > 0 else BlockSpec("pre-basic", (0,) if position == 0 else ()), width, p)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.sqrt(2 / width))
                module.weight.data[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.trunk(x))


@pytest.mark.parametrize(
    ("position", "norm", "keep", "expected"),
    [
        (-1, "block.op0", 0.5, 0.50),
        (0, "block.op0", 0.5, 0.50),
        (1, "block.op3", 0.5, 0.405),
        (2, "block.op3", 0.5, 0.405),
        (3, "block.op3", 0.5, 0.40),
        (4, "block.op3", 0.5, 1.0),
        (5, "block.op3", 0.5, 1.0),
        (6, "block.op3", 0.5, 1.0),
        (2, "block.op3", 0.9, 0.860),
    ],
)
def test_variance_ratio_by_position(position: int, norm: str, keep: float, expected: float) -> None:
    """P0 to P7 of the method sheet: -1 is the trunk, then positions in the branch."""
    model = Bare(position, 1 - keep)
    ratios = measure_variance_shift(model, torch.randn(4096, 128, 1, 1))
    assert ratios[norm] == pytest.approx(expected, abs=0.012)


def test_measuring_changes_nothing() -> None:
    model, x = Bare(2, 0.5).eval(), torch.randn(64, 128, 1, 1)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    measure_variance_shift(model, x)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())


def test_dropout_before_and_after_relu_are_one() -> None:
    x = torch.randn(1000)
    mask = (torch.rand(1000) < 0.5).float() / 0.5
    assert torch.equal(torch.relu(mask * x), mask * torch.relu(x))


@pytest.mark.parametrize(
    ("features", "expected"),
    [(torch.relu(torch.randn(20_000, 49, generator=torch.Generator().manual_seed(1))), 16.0), (torch.randn(20_000, 49), 1.0)],
    ids=["half-normal", "zero mean"],
)
def test_head_noise_after_over_before_pooling(features: Tensor, expected: float) -> None:
    """The 16 times of NK104's page, for N = 49 and keep 0.8."""
    pooled = features.mean(1)
    after = (F.dropout(pooled, 0.2) - pooled).var()
    before = (F.dropout(features, 0.2).mean(1) - pooled).var()
    assert float(after / before) == pytest.approx(expected, rel=0.05)


def preact_resnet(slot: str) -> nn.Module:
    """timm's pre-activation ResNet with a dropout planted in every block."""
    model = timm.create_model("resnetv2_50", layers=(1, 1, 1, 1), num_classes=10)
    for stage in model.stages:
        for block in stage.blocks:
            if slot == "before bn2":
                block.conv1 = nn.Sequential(block.conv1, nn.Dropout(0.3))
            elif slot == "before conv3":
                block.conv3 = nn.Sequential(nn.Dropout(0.3), block.conv3)
            elif slot == "after conv3":
                block.conv3 = nn.Sequential(block.conv3, nn.Dropout(0.3))
    return model


REAL = [
    (lambda: preact_resnet("before bn2"), {"NK101": 4}),
    (lambda: preact_resnet("before conv3"), {}),
    (lambda: preact_resnet("after conv3"), {"NK102": 4}),
    (
        lambda: timm.create_model("efficientformer_l1", proj_drop_rate=0.1),
        {"NK101": 14, "NK102": 14, "NK103": 28},
    ),  # 15 blocks, the last has layer norm
    (lambda: timm.create_model("wide_resnet50_2"), {}),
    (lambda: timm.create_model("resnet18", drop_rate=0.2), {"NK104": 1}),
    (lambda: timm.create_model("mobilenetv3_small_100", drop_rate=0.2), {}),
    (lambda: timm.create_model("vit_tiny_patch16_224", drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1), {}),
    (torchvision.models.efficientnet_b0, {"NK104": 1}),
    (lambda: torchvision.models.densenet121(drop_rate=0.1), {"NK105": 58}),
    (torchvision.models.vgg11_bn, {}),
    (lambda: timm.create_model("resnet18", drop_path_rate=0.2), {}),
]


@pytest.mark.parametrize(("build", "expected"), REAL)
def test_real_architectures(build: object, expected: dict[str, int]) -> None:
    with torch.device("meta"):
        model = build()  # type: ignore[operator]
        x = torch.empty(2, 3, 224, 224)
    report = audit(model, x, select=RULES)
    assert {finding.code: sum(len(f.places) for f in report.findings if f.code == finding.code) for finding in report.findings} == expected


def test_fix_on_a_real_architecture_loads_an_old_checkpoint() -> None:
    model, x = preact_resnet("before bn2").eval(), torch.randn(2, 3, 32, 32)
    checkpoint, output = copy.deepcopy(model.state_dict()), model(x)
    changes = place_dropout(model, x)
    assert len(changes.made) == 8
    assert torch.equal(model(x), output)
    model.load_state_dict(checkpoint)
    assert found_places(model, x) == []
    copied = copy.deepcopy(model)
    assert found_places(copied, x) == []
    assert all(type(module) is not nn.Identity for module in changes_undone(model, changes))


def changes_undone(model: nn.Module, changes: object) -> list[nn.Module]:
    changes.undo()  # type: ignore[attr-defined]
    return [block.conv1[1] for stage in model.stages for block in stage.blocks]  # type: ignore[union-attr, index]


def test_fix_turns_off_a_functional_head_dropout_by_its_attribute() -> None:
    model, x = timm.create_model("resnet18", drop_rate=0.2), torch.randn(2, 3, 64, 64)
    changes = place_dropout(model, x)
    assert (model.drop_rate, found_places(model, x)) == (0.0, [])
    changes.undo()
    assert (model.drop_rate, found_places(model, x)) == (0.2, [("NK104", "")])


def test_no_admissible_slot_is_said_and_left_alone() -> None:
    spec = NetSpec((BlockSpec("post-basic", (3,)),))
    net, x = Net(spec), torch.randn(2, 3, 8, 8)
    (finding,) = audit(net, x).findings
    assert finding.fix_safety is FixSafety.DISPLAY
    assert "no admissible slot" in finding.advice
    changes = place_dropout(net, x)
    assert (changes.made, [change.module for change in changes.skipped]) == ([], ["blocks.0.drop3"])


def test_findings_carry_the_measured_shift() -> None:
    net, x = Net(NetSpec((BlockSpec("pre-basic", (3,)),), width=32)), torch.randn(16, 3, 16, 16)
    (finding,) = audit(net, x).findings
    (evidence,) = finding.evidence
    assert "blocks.0.op3" in evidence.what
    assert 0.3 < evidence.value < 0.5
    assert audit(net, x, measure=False).findings[0].evidence == ()


class SharedDropout(nn.Module):
    """One dropout module called in two branches: right in the first, wrong in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.convs[0](self.drop(self.norms[0](x)))
        return x + self.convs[1](self.norms[1](self.drop(x)))


def test_a_dropout_that_is_also_used_rightly_stays() -> None:
    model, x = SharedDropout(), torch.randn(2, 4, 3, 3)
    assert found_places(model, x) == [("NK101", "drop")]
    changes = place_dropout(model, x)
    assert changes.made == []
    assert "other places" in changes.skipped[0].what


class TwoUses(nn.Module):
    """A pre-activation block whose one attribute is the probability of a functional dropout and the scale of the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.rate = 0.3

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.conv1(self.bn1(x).relu()), self.rate, self.training)
        return x + self.rate * self.conv2(self.bn2(y).relu())


def test_an_attribute_that_does_more_than_drop_is_left_alone() -> None:
    model, x = TwoUses().eval(), torch.randn(2, 4, 6, 6)
    before = model(x)
    changes = place_dropout(model, x)
    assert torch.equal(before, model(x))
    assert (changes.made, ["switches it off alone" in change.what for change in changes.skipped]) == ([], [True])


class AlwaysDrops(nn.Module):
    """A functional dropout without `training=`, so that eval mode samples too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.rate = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Linear(4, 2), 0.3

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = F.adaptive_avg_pool2d(self.stem(x), 1).flatten(1)
        return self.head(F.dropout(pooled, self.rate))  # type: ignore[no-any-return]


def test_monte_carlo_dropout_keeps_its_samples() -> None:
    model, x = AlwaysDrops(), torch.randn(2, 3, 6, 6)
    changes = place_dropout(model, x)
    assert (changes.made, ["eval mode too" in change.what for change in changes.skipped], model.rate) == ([], [True], 0.3)
