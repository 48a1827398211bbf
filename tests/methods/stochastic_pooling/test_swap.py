"""Which pools are swapped on real networks, undo, idempotence, the probe and rule NK106."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from pl_normkit import audit
from pl_normkit.errors import ConfigError, NothingMatchedError
from pl_normkit.methods.stochastic_pooling import measure_second_moments, pool_roles, stochastic_pooling
from pl_normkit.nn import StochasticAdaptiveAvgPool2d, StochasticAvgPool2d

NETWORKS: list[tuple[Callable[[], nn.Module], list[str]]] = [
    (lambda: timm.create_model("resnet10t", num_classes=5), ["global_pool.pool"]),
    (lambda: timm.create_model("seresnet18", num_classes=5), ["global_pool.pool"]),
    (torchvision.models.mobilenet_v3_small, ["avgpool"]),
    (torchvision.models.densenet121, [f"features.transition{i}.pool" for i in (1, 2, 3)]),
    (lambda: smp.PSPNet("resnet18", encoder_weights=None), [f"decoder.psp.blocks.{i}.pool.0" for i in range(4)]),
    (lambda: smp.DeepLabV3("resnet18", encoder_weights=None), ["decoder.aspp.convs.4.0"]),
]


class Head(nn.Module):
    """Pool, dropout and classifier, the pool as a module or a function."""

    def __init__(self, functional: bool = False, p: float = 0.3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.pool = nn.Identity() if functional else nn.AdaptiveAvgPool2d(1)
        self.functional = functional
        self.dropout = nn.Dropout(p)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x).relu()
        x = x.mean((2, 3)) if self.functional else self.pool(x).flatten(1)
        return self.fc(self.dropout(x))


@pytest.mark.parametrize(("make", "paths"), NETWORKS)
def test_default_choice_swap_evaluation_and_undo(make: Callable[[], nn.Module], paths: list[str]) -> None:
    net, x = make().eval(), torch.randn(2, 3, 64, 64)
    keys, modules, expected = list(net.state_dict()), dict(net.named_modules()), net(x)
    changes = stochastic_pooling(net, keep=0.5)
    assert paths == [change.module for change in changes.made]
    assert keys == list(net.state_dict())
    assert torch.equal(expected, net(x))
    for path in paths:
        assert isinstance(net.get_submodule(path), type(modules[path]))
    assert not stochastic_pooling(net, keep=0.5)
    twins = [copy.deepcopy(net).train(), pickle.loads(pickle.dumps(net)).train(), net.train()]
    outputs = []
    for twin in twins:
        torch.manual_seed(0)
        outputs.append(twin(x))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], net(x))
    changes.undo()
    restored = dict(net.named_modules())
    assert modules.keys() == restored.keys()
    assert all(modules[path] is restored[path] for path in modules)


def test_squeeze_pools_only_on_request() -> None:
    net = torchvision.models.mobilenet_v3_small()
    squeezes = [path for path, role in pool_roles(net).items() if role == "squeeze"]
    assert len(squeezes) == 9
    assert squeezes == [change.module for change in stochastic_pooling(net).skipped]
    made = stochastic_pooling(net, filter_fn=lambda module, path: "block" in path).made
    assert squeezes == [change.module for change in made]


def test_pools_of_shortcuts_are_left_alone() -> None:
    net = timm.create_model("resnet18d", num_classes=5)
    changes = stochastic_pooling(net)
    assert [change.module for change in changes.made] == ["global_pool.pool"]
    assert [change.module for change in changes.skipped] == ["layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0"]


def test_a_new_keep_and_hooks_and_shared_modules() -> None:
    pool = nn.AvgPool2d(2)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), pool, nn.Conv2d(4, 4, 3), pool)
    calls = []
    pool.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(NothingMatchedError, match="no average pool"):
        stochastic_pooling(net)
    assert net[1] is pool
    stochastic_pooling(net, keep=0.5, filter_fn=lambda module, path: True)
    assert net[1] is net[3]
    assert isinstance(net[1], StochasticAvgPool2d)
    net(torch.randn(1, 3, 16, 16))
    assert len(calls) == 2
    assert [change.module for change in stochastic_pooling(net, 0.7, lambda *_: True, scale="none").made] == ["1"]
    assert (net[1].keep, net[1].scale) == (0.7, "none")


def test_what_cannot_be_swapped_is_listed() -> None:
    class Padded(nn.AvgPool2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (0, 1, 0, 1)))

    net = nn.ModuleDict({"a": Head(functional=True), "b": Padded(2), "c": nn.AdaptiveAvgPool3d(1), "d": nn.AdaptiveAvgPool2d(1)})
    skipped = stochastic_pooling(net, filter_fn=lambda *_: True).skipped
    assert [change.module for change in skipped] == ["b", "c"]
    head = nn.Sequential(Head(functional=True), nn.Unflatten(1, (4, 1, 1)), nn.AdaptiveAvgPool2d(1))
    skipped = stochastic_pooling(head, example_inputs=torch.randn(2, 3, 9, 9)).skipped
    assert [change.module for change in skipped] == ["0"]
    assert "mean called as a function at" in skipped[0].what
    assert "test_swap.py" in skipped[0].what


@pytest.mark.parametrize("keep", [0.0, 2.0])
def test_a_bad_keep_leaves_the_model_alone(keep: float) -> None:
    net = Head()
    with pytest.raises(ConfigError):
        stochastic_pooling(net, keep)
    assert type(net.pool) is nn.AdaptiveAvgPool2d


def test_the_probe_agrees_with_drawing_and_changes_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).train()
    x = torch.randn(256, 3, 9, 9)
    state, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    (found,) = measure_second_moments(net, x, keep=0.5)
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert net.training
    assert not net[3]._forward_pre_hooks
    features = net[:3].eval()(x).detach()
    evaluation = net[3](features).square().mean()
    for scale, ratio in (("sqrt", found.sqrt), ("none", found.unscaled), (found.matching, 1.0)):
        drawn = StochasticAdaptiveAvgPool2d(1, keep=0.5, scale=scale)(features.repeat(8, 1, 1, 1)).square().mean()
        assert abs(float(drawn / evaluation) / ratio - 1) < 0.02
    assert found.advice == "none"
    assert 'use scale="none"' in str(found)


def test_the_probe_advises_the_sqrt_scale_for_zero_mean_features() -> None:
    net = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1))
    (found,) = measure_second_moments(net, torch.randn(64, 32, 7, 7))
    assert found.advice == "sqrt"
    with pytest.raises(NothingMatchedError):
        measure_second_moments(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("functional", [False, True])
def test_nk106_fires_on_dropout_after_a_pool(functional: bool) -> None:
    report = audit(Head(functional), torch.randn(2, 3, 9, 9), select=["NK106"])
    assert [(found.code, [place.module for place in found.places]) for found in report.findings] == [("NK106", ["dropout"])]
    assert report.findings[0].evidence[0].value == pytest.approx(0.3)


def test_nk106_is_silent_elsewhere_and_by_default() -> None:
    x = torch.randn(2, 3, 64, 64)
    assert list(audit(Head(p=0.0), x, select=["NK106"]).findings) == []
    swapped = Head()
    stochastic_pooling(swapped)
    assert list(audit(swapped, x, select=["NK106"]).findings) == []
    assert list(audit(torchvision.models.mobilenet_v3_small(), x, select=["NK106"]).findings) == []
    assert not any(found.code == "NK106" for found in audit(Head(), x).findings)
    assert list(audit(Head(), torch.randn(2, 3, 1, 1), select=["NK106"]).findings) == []  # one position: nothing is averaged
