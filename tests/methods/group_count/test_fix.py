"""Batch norms to group norms and back, on small networks and those of libraries."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pl_normkit import convert_to_batch_norm, convert_to_group_norm, num_groups
from pl_normkit.errors import ConfigError, NothingMatchedError
from pl_normkit.wrappers import unwrapped


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 6, 1), nn.BatchNorm2d(6))


def _timm(name: str) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, num_classes=4)  # type: ignore[no-any-return]


def _smp() -> nn.Module:
    return pytest.importorskip("segmentation_models_pytorch").create_model("Unet", "resnet18", None, classes=2)  # type: ignore[no-any-return]


def _torchvision() -> nn.Module:
    return pytest.importorskip("torchvision").models.resnet18(num_classes=4)  # type: ignore[no-any-return]


def test_scale_and_shift_are_the_same_objects_and_statistics_go() -> None:
    model = _small()
    parameters, keys = dict(model.named_parameters()), set(model.state_dict())
    changes = convert_to_group_norm(model)
    assert [change.module for change in changes.made] == ["1", "4"]
    assert {name: id(value) for name, value in model.named_parameters()} == {name: id(value) for name, value in parameters.items()}
    assert keys - set(model.state_dict()) == {
        f"{at}.{name}" for at in "14" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    x = torch.randn(2, 3, 8, 8)
    by_hand = nn.functional.group_norm(model[0](x), 24, model[1].weight, model[1].bias)
    assert torch.equal(model[1](model[0](x)), by_hand)
    changes.undo()
    assert [type(module).__name__ for module in (model[1], model[4])] == ["BatchNorm2d"] * 2
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize("build", [_torchvision, _smp, lambda: _timm("resnet10t"), lambda: _timm("test_efficientnet")])
@pytest.mark.parametrize("standardized", [False, True])
def test_networks_of_libraries(build: Any, standardized: bool) -> None:
    """Converted, samples do not meet any more; parameters keep their names; it trains."""
    model = build()
    names = [name for name, _ in model.named_parameters()]
    count = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    changes = convert_to_group_norm(model, "16 channels per group", weight_standardization=standardized)
    assert sum("group norm" in change.what for change in changes.made) == count
    assert not [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert [name for name, _ in model.named_parameters()] == names
    images = torch.randn(2, 3, 32, 32)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images)[:1], model(images[:1]), rtol=1e-3, atol=1e-4)
    model.train()(images).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_standardized_kernels_are_those_of_timm() -> None:
    timm = pytest.importorskip("timm")
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    theirs = timm.layers.StdConv2d(3, 8, 3, padding=0)
    theirs.weight = model[0].weight
    convert_to_group_norm(model, weight_standardization=True)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model[0](x), theirs(x))


def test_timm_keeps_its_activation() -> None:
    model = _timm("test_efficientnet")
    acts = [type(module.act) for module in model.modules() if type(module).__name__ == "BatchNormAct2d"]
    convert_to_group_norm(model)
    assert [type(module.act) for module in model.modules() if type(module).__name__ == "GroupNormAct"] == acts


def test_the_way_back() -> None:
    model = _small()
    convert_to_group_norm(model)
    weights = model[1].weight
    convert_to_batch_norm(model)
    assert [type(module).__name__ for module in (model[1], model[4])] == ["BatchNorm2d"] * 2
    assert model[1].weight is weights
    assert float(model[1].running_var.sum()) == 48
    x = torch.randn(4, 3, 8, 8)
    reference = _small()
    reference.load_state_dict(model.state_dict())
    assert torch.equal(model(x), reference(x))


@pytest.mark.parametrize(
    ("dimensions", "shape", "kind"), [(2, (4, 6), nn.BatchNorm1d), (3, (4, 6, 5), nn.BatchNorm1d), (5, (2, 6, 3, 3, 3), nn.BatchNorm3d)]
)
def test_vectors_sequences_and_volumes(dimensions: int, shape: tuple[int, ...], kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(6))  # type: ignore[call-arg]
    convert_to_group_norm(model, 3)
    x = torch.randn(shape)
    torch.testing.assert_close(model(x), nn.functional.group_norm(x, 3))
    convert_to_batch_norm(model, dimensions=dimensions)
    assert type(model[0]) is kind
    assert model(x).shape == shape


def test_what_is_left_alone() -> None:
    class Odd(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = nn.Sequential(nn.BatchNorm2d(4), Odd(4), nn.LazyBatchNorm2d(), nn.BatchNorm2d(4, affine=False))
    changes = convert_to_group_norm(model, filter_fn=lambda module, path: path != "0")
    assert [change.module for change in changes.made] == ["3"]
    assert {change.module for change in changes.skipped} == {"0", "1", "2"}
    assert model[3].weight is None


def test_synchronized_batch_norms_and_shared_ones() -> None:
    norm = nn.SyncBatchNorm(8)
    model = nn.ModuleList([norm, norm])
    convert_to_group_norm(model)
    assert [type(module).__name__ for module in model] == ["GroupNorm"] * 2
    assert model[0] is model[1]


def test_nothing_to_convert_and_bad_targets_leave_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2))
    for bare in (nn.Linear(2, 2), nn.BatchNorm2d(4)):
        with pytest.raises(NothingMatchedError):
            convert_to_group_norm(bare)
    with pytest.raises(NothingMatchedError):
        convert_to_batch_norm(nn.Linear(2, 2))
    small = _small()
    with pytest.raises(ConfigError):
        convert_to_group_norm(small, "many")
    assert isinstance(small[1], nn.BatchNorm2d)
    assert isinstance(model[1], nn.GroupNorm)


def test_a_compiled_and_a_copied_model() -> None:
    model = _small()
    compiled = torch.compile(model, backend="eager")
    convert_to_group_norm(compiled)
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(compiled(x), copy.deepcopy(unwrapped(model))(x), atol=1e-6)


def test_mixed_widths_take_the_nearest_divisors() -> None:
    model = _smp()
    convert_to_group_norm(model, 32)
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert {(norm.num_channels, norm.num_groups) for norm in norms} == {
        (norm.num_channels, num_groups(norm.num_channels)) for norm in norms
    }
    assert (16, 16) in {(norm.num_channels, norm.num_groups) for norm in norms}
