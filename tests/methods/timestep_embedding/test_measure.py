"""What is left of a time behind each norm, against calls made by hand."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, NothingMatchedError
from pl_normkit.methods.timestep_embedding import apply_positional_time, measure_time_awareness
from tests.methods.timestep_embedding.networks import NORMS, AdaptiveBlock, OdeFunction, ResBlock, res_block

TIMES = (0.0, 1.0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_plane_vanishes_and_one_that_varies_over_positions_does_not(norm: str) -> None:
    model, inputs = OdeFunction(NORMS[norm]), OdeFunction.inputs()
    assert measure_time_awareness(model, inputs, TIMES).sensitivity < 1e-10
    apply_positional_time(model, inputs)
    assert measure_time_awareness(model, inputs, TIMES).sensitivity > 1e-3


@pytest.mark.parametrize(
    ("norm", "verdict", "low", "high"),
    [("batch", "vanished", 0, 1e-9), ("instance", "vanished", 0, 1e-9), ("group of 2", "weakened", 0.35, 0.6),
     ("group of 4", "kept", 0.6, 0.9), ("one group", "kept", 0.9, 1.1)],
)  # fmt: skip
def test_verdicts(norm: str, verdict: str, low: float, high: float) -> None:
    first, second, _ = measure_time_awareness(OdeFunction(NORMS[norm], channels=64), OdeFunction.inputs(64), TIMES).norms
    assert (first.module, first.arriving, first.verdict) == ("norm1", 0.0, "no time")
    assert math.isnan(first.share)
    assert second.verdict == verdict
    assert low <= second.share < high
    assert second.share == pytest.approx(second.circular, abs=1e-6)  # the padding is circular already


def test_zero_padding_hides_that_a_plane_vanishes() -> None:
    """On 8 by 8 pixels what leaks at the border is far more than a tenth."""
    model = OdeFunction(nn.InstanceNorm2d, padding_mode="zeros")
    found = measure_time_awareness(model, OdeFunction.inputs(), TIMES)
    assert found.norms[1].share > 0.1
    assert found.norms[1].circular < 1e-9
    assert found.norms[1].verdict == "vanished"
    assert found.sensitivity > 1e-3 > 1e-10 > found.circular
    assert {conv.padding_mode for conv in model.modules() if isinstance(conv, nn.Conv2d)} == {"zeros"}


def test_shares_are_those_of_two_calls_by_hand() -> None:
    model, (x, temb) = res_block("group of 2").double(), ResBlock.inputs()
    x, first, second = x.double(), temb.double(), torch.randn_like(temb).double()
    ratios = []
    h0, h1 = (model.block1(x) + model.temb_proj(t)[:, :, None, None] for t in (first, second))
    for before, after in ((h0, h1), (model.block2[0](h0), model.block2[0](h1))):
        ratios.append(((after - before).square().mean() / before.var(unbiased=False)).item())
    found = measure_time_awareness(model, (x, temb.double()), (first, second), time=1).norms[1]
    assert (found.module, found.channels, found.groups) == ("block2.0", 64, 32)
    assert (found.arriving, found.leaving) == (pytest.approx(ratios[0], rel=1e-5), pytest.approx(ratios[1], rel=1e-4))
    assert found.share == pytest.approx(ratios[1] / ratios[0], rel=1e-4)


def test_affine_parameters_and_the_running_statistics_do_not_enter() -> None:
    model, inputs = OdeFunction(nn.BatchNorm2d), OdeFunction.inputs()
    before = measure_time_awareness(model, inputs, TIMES).norms[1]
    with torch.no_grad():
        model.norm2.weight.normal_()
        model.norm2.bias.normal_()
        model.norm2.running_mean.normal_()
    after = measure_time_awareness(model, inputs, TIMES).norms[1]
    assert after.arriving == before.arriving
    assert after.leaving == before.leaving < 1e-10


def test_batch_norm_lets_a_shared_time_through_in_evaluation_alone() -> None:
    found = measure_time_awareness(OdeFunction(nn.BatchNorm2d), OdeFunction.inputs(), TIMES).norms[1]
    assert found.share < 1e-9
    assert found.evaluation > 0.5
    other = measure_time_awareness(OdeFunction(nn.InstanceNorm2d), OdeFunction.inputs(), TIMES).norms[1]
    assert math.isnan(other.evaluation)


def test_batch_norm_keeps_most_of_a_time_for_each_sample() -> None:
    model, (x, temb) = res_block("batch"), ResBlock.inputs()
    x, temb = x.repeat(8, 1, 1, 1), torch.randn(32, 16)
    assert measure_time_awareness(model, (x, temb), (temb, torch.randn(32, 16)), time=1).norms[1].verdict == "kept"
    shared = (torch.zeros(32, 16), torch.ones(32, 16))
    assert measure_time_awareness(model, (x, temb), shared, time=1).norms[1].verdict == "vanished"


def test_a_time_behind_the_norm_is_none_that_arrives() -> None:
    found = measure_time_awareness(AdaptiveBlock(), ResBlock.inputs(), (torch.zeros(4, 16), torch.ones(4, 16)), time=1)
    assert [norm.verdict for norm in found.norms] == ["no time"]
    assert found.sensitivity > 1e-3


def test_the_prediction_for_group_norms() -> None:
    """Offsets without structure, small beside the features: within the tenth that the formula claims."""

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(16, 64)

        def forward(self, x: Tensor, e: Tensor) -> Tensor:
            return self.norm(x + e[:, :, None, None])

    x, first, second = torch.randn(64, 64, 16, 16), 0.2 * torch.randn(64, 64), 0.2 * torch.randn(64, 64)
    (found,) = measure_time_awareness(Added(), (x, first), (first, second), time=1).norms
    assert found.relative_variance == pytest.approx(((second - first).var(1, unbiased=False).mean() / x.var()).item(), rel=0.02)
    assert found.predicted == pytest.approx(found.leaving, rel=0.1)


class Denoiser(nn.Module):
    """Knows the time: the output is x times it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 3)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        self.norm(x)
        return {"sample": x * t[:, None, None, None] + 0 * torch.rand(())}


def test_the_loss_rises_when_times_are_shuffled() -> None:
    x, t = torch.randn(4, 3, 4, 4), torch.tensor([0.0, 1.0, 2.0, 3.0])
    target = x * t[:, None, None, None]
    found = measure_time_awareness(Denoiser(), (x, t), TIMES, loss=lambda output: (output["sample"] - target).square().mean())
    wrong = (x * (t.roll(1) - t)[:, None, None, None]).square().mean().item()
    assert (found.loss, found.shuffled_loss) == (0.0, pytest.approx(wrong))
    assert math.isnan(measure_time_awareness(Denoiser(), (x, t), TIMES).loss)


def test_nothing_in_the_model_changes() -> None:
    model, inputs = OdeFunction(nn.BatchNorm2d, padding_mode="zeros").train(), OdeFunction.inputs()
    model.conv1.eval()
    before = copy.deepcopy(model.state_dict())
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    measure_time_awareness(model, inputs, TIMES)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_reports(tmp_path: Path) -> None:
    found = measure_time_awareness(OdeFunction(nn.InstanceNorm2d), OdeFunction.inputs(), TIMES)
    rows = json.loads(found.to_json())["norms"]
    assert [(row["module"], row["share"] is None) for row in rows] == [("norm1", True), ("norm2", False), ("norm3", False)]
    lines = str(found).splitlines()
    assert [line.split()[-1] for line in lines[2:3]] == ["vanished"]
    found.plot(tmp_path / "shares.png")
    assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")


def test_which_argument_is_the_time() -> None:
    model, (t, x) = OdeFunction(nn.InstanceNorm2d), OdeFunction.inputs()
    by_place, by_name = (measure_time_awareness(model, batch, TIMES) for batch in ((t, x), {"t": t, "x": x}))
    assert str(by_place) == str(by_name)
    with pytest.raises(ConfigError, match="which argument is the time"):
        measure_time_awareness(model, x, TIMES)
    with pytest.raises(ConfigError, match="no such argument"):
        measure_time_awareness(model, (t, x), TIMES, time="s")
    with pytest.raises(ConfigError, match="the same"):
        measure_time_awareness(model, (t, x), (1.0, 1.0))
    with pytest.raises(ConfigError, match="two times"):
        measure_time_awareness(model, (t, x), (1.0, 2.0, 3.0))


def test_a_model_without_norms() -> None:
    class Plain(nn.Module):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return x * t

    with pytest.raises(NothingMatchedError, match="no norm ran"):
        measure_time_awareness(Plain(), OdeFunction.inputs(), TIMES)


def test_without_times_each_sample_gets_the_time_of_the_one_before_it() -> None:
    """A time that the whole batch shares has no other one."""
    torch.manual_seed(0)
    x, t = torch.randn(3, 2, 4, 4), torch.tensor([0.1, 0.5, 0.9])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(1, 2)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.norm(x + t[:, None, None, None] * x.new_tensor([1.0, -1.0])[:, None, None])

    net = Net()
    assert measure_time_awareness(net, (x, t)) == measure_time_awareness(net, (x, t), (t, torch.tensor([0.9, 0.1, 0.5])))
    with pytest.raises(ConfigError, match="the same"):
        measure_time_awareness(net, (x, torch.full((3,), 0.5)))
