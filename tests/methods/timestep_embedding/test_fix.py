"""Remedies on built networks: what they do, what stays, and the way back."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pl_normkit.errors import EditError, NothingMatchedError
from pl_normkit.methods.timestep_embedding import apply_fewer_groups, apply_positional_time, apply_time_bias, measure_time_awareness
from pl_normkit.methods.timestep_embedding.modules import PositionalPlane, position_pattern
from tests.methods.timestep_embedding.networks import NORMS, AdaptiveBlock, OdeFunction, ResBlock, res_block
from tests.methods.timestep_embedding.test_find import unet


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_the_second_projection_comes_before_the_norm() -> None:
    """The edited block against its formula."""
    model, (x, temb) = res_block("instance"), ResBlock.inputs()
    changes = apply_positional_time(model, (x, temb))
    assert [change.module for change in changes.made] == ["temb_proj.1", "block2.0"]
    assert {name for name in model.state_dict() if "positional" in name} == {
        f"temb_proj.1.positional_time.projection.{name}" for name in ("weight", "bias")
    }
    act, linear = model.temb_proj
    second = linear.positional_time.projection(act(temb))
    h = model.block1(x) + linear(act(temb))[:, :, None, None] + second[:, :, None, None] * position_pattern((8, 8), x)
    norm, bend, conv = model.block2
    expected = x + conv(bend(nn.functional.instance_norm(h, eps=norm.eps)))
    torch.testing.assert_close(model(x, temb), expected)


@pytest.mark.parametrize("norm", ["instance", "group of 2"])
def test_the_time_arrives_and_undo_gives_the_model_back(norm: str) -> None:
    model, (x, temb) = res_block(norm), ResBlock.inputs()
    before, keys = model(x, temb), list(model.state_dict())
    times = (temb, torch.randn_like(temb))
    leaving = measure_time_awareness(model, (x, temb), times, time=1).norms[1].leaving
    changes = apply_positional_time(model, (x, temb))
    assert measure_time_awareness(model, (x, temb), times, time=1).norms[1].leaving > leaving + 0.1
    changes.undo()
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x, temb), before)


def test_planes_are_multiplied_where_they_stand() -> None:
    model, inputs = OdeFunction(nn.BatchNorm2d), OdeFunction.inputs()
    keys = list(model.state_dict())
    apply_positional_time(model, inputs)
    planes = [(path, module) for path, module in model.named_modules() if isinstance(module, PositionalPlane)]
    assert [(path, plane.first, plane.last) for path, plane in planes] == [
        (f"conv{index}._layer.positional_time", 0, 1) for index in (1, 2)
    ]
    assert list(model.state_dict()) == keys


def test_planes_behind_the_features() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(5, 8, 3), nn.InstanceNorm2d(8)

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.norm(self.conv(torch.cat([x, t.expand(len(x), 1, *x.shape[2:])], 1)))

    model = Last()
    apply_positional_time(model, (torch.tensor(0.5), torch.randn(2, 4, 8, 8)))
    plane = model.conv.positional_time
    assert (plane.first, plane.last) == (4, 5)


def test_a_signal_of_one_dimension() -> None:
    model = ResBlock(nn.InstanceNorm1d, dims=1)
    inputs = torch.randn(4, 3, 8), torch.randn(4, 16)
    assert apply_positional_time(model, inputs)
    assert model(*inputs).shape == (4, 3, 8)


def test_twice_is_once() -> None:
    model, inputs = res_block("instance"), ResBlock.inputs()
    apply_positional_time(model, inputs)
    assert not apply_positional_time(model, inputs)


def test_the_filter_chooses() -> None:
    model, inputs = OdeFunction(NORMS["group of 4"]), OdeFunction.inputs()
    changes = apply_positional_time(model, inputs, filter_fn=lambda _, path: path == "norm3")
    assert [change.module for change in changes.made] == ["conv2._layer"]
    assert [change.module for change in changes.skipped] == ["norm2"]
    changes = apply_fewer_groups(model, inputs, filter_fn=lambda _, path: path == "norm2")
    assert [change.module for change in changes.made] == ["norm2"]


@pytest.mark.parametrize("fix", [apply_positional_time, apply_time_bias, apply_fewer_groups])
@pytest.mark.parametrize("model", [AdaptiveBlock(), res_block("one group"), res_block("batch")])
def test_nothing_to_remedy(fix: Any, model: nn.Module) -> None:
    keys = list(model.state_dict())
    with pytest.raises(NothingMatchedError):
        fix(model, ResBlock.inputs())
    assert list(model.state_dict()) == keys


def test_a_norm_without_its_time_layer_says_so() -> None:
    model, inputs = res_block("instance"), ResBlock.inputs()
    apply_positional_time(model, inputs)
    with pytest.raises(EditError, match="did not run before"):
        model.block2(torch.randn(2, 64, 8, 8))


def test_zero_and_non_zero_biases() -> None:
    model, inputs = res_block("group of 2"), ResBlock.inputs()
    linear = model.temb_proj[1]
    nn.init.ones_(model.block1[2].bias)
    conv_bias = model.block1[2].bias.detach().clone()
    changes = apply_time_bias(model, inputs)
    assert not model.block1[2].bias.any()
    assert 0 < linear.bias.abs().max() <= 16**-0.5
    kept = linear.bias.detach().clone()
    assert not apply_time_bias(model, inputs)
    assert torch.equal(linear.bias, kept)
    changes.undo()
    assert torch.equal(model.block1[2].bias, conv_bias)
    assert not linear.bias.any()


def test_a_shared_bias_is_left_alone() -> None:
    with pytest.raises(NothingMatchedError, match="bias of their own"):
        apply_time_bias(OdeFunction(nn.BatchNorm2d), OdeFunction.inputs())


@pytest.mark.parametrize(("channels", "groups", "expected"), [(64, 32, 8), (48, 24, 6), (20, 10, 2), (12, 6, 1), (6, 3, 1)])
def test_fewer_groups(channels: int, groups: int, expected: int) -> None:
    model = OdeFunction(lambda count: nn.GroupNorm(groups, count), channels=channels)
    weight, keys = model.norm2.weight, list(model.state_dict())
    changes = apply_fewer_groups(model, OdeFunction.inputs(channels))
    assert [module.num_groups for module in (model.norm1, model.norm2, model.norm3)] == [groups, expected, expected]
    assert model.norm2.weight is weight
    assert list(model.state_dict()) == keys
    changes.undo()
    assert model.norm2.num_groups == groups


# What runs do to models.


def test_copies_averages_and_checkpoints() -> None:
    model, inputs = res_block("instance"), ResBlock.inputs()
    apply_positional_time(model, inputs)
    model(*inputs)
    twin = copy.deepcopy(model)
    assert twin.temb_proj[1].positional_time.slot is twin.block2[0].positional_time.slot
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    fresh = res_block("instance")
    apply_positional_time(fresh, inputs)
    fresh.load_state_dict(model.state_dict())
    for other in (twin, average, loaded, fresh):
        torch.testing.assert_close(other(*inputs), model(*inputs))


def test_compiled_and_with_every_parameter_in_the_graph() -> None:
    model, inputs = res_block("instance"), ResBlock.inputs()
    apply_positional_time(model, inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), model(*inputs))
    compiled(*inputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.temb_proj[1].positional_time.projection.weight.grad.abs().max() > 0


def test_a_diffusers_unet_as_it_is() -> None:
    """Also with gradient checkpointing, which runs each block once more."""
    model, inputs = unet(), (torch.randn(2, 1, 8, 8), torch.tensor([3, 7]))
    changes = apply_positional_time(model, inputs)
    assert len(changes.made) == 2 * 8
    plain = model.train()(*inputs).sample
    model.enable_gradient_checkpointing()
    checkpointed = model(*inputs).sample
    torch.testing.assert_close(checkpointed, plain)
    checkpointed.sum().backward()
    assert model.mid_block.resnets[0].time_emb_proj.positional_time.projection.weight.grad is not None
    changes.undo()
    apply_fewer_groups(model, inputs)
    assert model.down_blocks[0].resnets[0].norm2.num_groups == 2
    assert apply_time_bias(model, inputs)


class SharedProjection(nn.Module):
    """One time layer before two norms, with a label added before the second as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.time, self.label = nn.Linear(4, 8), nn.Linear(2, 8)
        self.norm1, self.norm2 = nn.InstanceNorm2d(8), nn.InstanceNorm2d(8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        offset = self.time(t)[:, :, None, None]
        h = self.norm1(self.conv1(x) + offset).relu()
        return self.norm2(self.conv2(h) + offset + self.label(y)[:, :, None, None])


def test_one_time_layer_before_two_norms_and_a_second_signal_before_one() -> None:
    model, inputs = SharedProjection(), (torch.randn(2, 3, 10, 10), torch.randn(2, 4), torch.randn(2, 2))
    before = model(*inputs)
    changes = apply_positional_time(model, inputs)
    assert [change.module for change in changes.made] == ["time", "norm1", "norm2"]
    assert [str(change) for change in changes.skipped] == ["norm2: another signal varies over positions there already"]

    x, t, y = inputs
    second = model.time.positional_time.projection(t)[:, :, None, None]
    offset = model.time._parameters["weight"] @ t[:, :, None] + model.time._parameters["bias"][:, None]
    h = model.conv1(x) + offset[..., None] + second * position_pattern((8, 8), x)
    h = model.conv2(nn.functional.instance_norm(h).relu()) + offset[..., None] + second * position_pattern((6, 6), x)
    expected = nn.functional.instance_norm(h + nn.functional.linear(y, model.label.weight, model.label.bias)[:, :, None, None])
    torch.testing.assert_close(model(*inputs), expected)
    model(*inputs).square().mean().backward()
    assert copy.deepcopy(model)(*inputs).shape == before.shape  # nothing of a graph is left in it
    assert torch.compile(model, backend="eager", fullgraph=True)(*inputs).shape == before.shape
    changes.undo()
    assert torch.equal(model(*inputs), before)
