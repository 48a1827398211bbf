"""The probe against hand-written hooks on real networks, the mask against tokens that are not there, skipping against surgery by hand."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, NothingMatchedError
from pl_normkit.methods.depth_profile import DepthProbe, measure_depth_profile
from tests.methods.depth_profile.networks import GPT2, NETWORKS, SWIN, Network, by_hooks


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-5, abs=1e-12)


def variance(value: Tensor) -> float:
    value = value.detach()
    return float(((value - value.mean(-1, keepdim=True)) ** 2).mean())


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS)
def network(request: pytest.FixtureRequest) -> Network:
    found: Network = request.param
    return found


def test_the_numbers_are_those_of_hand_written_hooks(network: Network) -> None:
    torch.manual_seed(1)
    model, batch = network.build().eval(), network.batch()
    streams, branches, output = by_hooks(network, model, batch)
    loss = network.tensor_of(output).square().mean()
    loss.backward()
    profile = measure_depth_profile(model, batch, lambda output: network.tensor_of(output).square().mean(), span=1)
    rows = profile.additions
    assert [row.variance for row in rows] == [close(variance(stream)) for stream in streams]
    assert [row.branch_variance for row in rows] == [close(variance(branch)) for branch in branches]
    assert [row.mean_square for row in rows] == [close(float(stream.square().mean())) for stream in streams]
    assert [row.largest for row in rows] == [close(float(stream.abs().max())) for stream in streams]
    assert [row.median for row in rows] == [
        close(float(stream.abs().flatten().sort().values[(stream.numel() - 1) // 2])) for stream in streams
    ]
    assert profile.loss == close(float(loss.detach()))
    assert (profile.unread, {row.is_nested for row in rows}) == ((), {False})


def test_the_ratio_is_taken_to_the_shortcut_and_the_angle_to_the_stream_before(network: Network) -> None:
    model, batch = network.build().eval(), network.batch()
    streams, branches, _ = by_hooks(network, model, batch)
    rows = measure_depth_profile(model, batch, span=1).additions
    for index in range(1, len(rows)):
        before, after = streams[index - 1], streams[index]
        if before.shape != after.shape:
            assert rows[index].angle is None
            continue
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        assert rows[index].angle == pytest.approx(float(torch.acos(cosine.clamp(-1, 1)).mean()) / math.pi, abs=2e-4)
        assert rows[index].ratio == close(variance(branches[index]) / variance(before))


def test_gradients_are_those_of_the_weights_of_each_branch() -> None:
    model, batch = GPT2.build().eval(), GPT2.batch()
    rows = measure_depth_profile(model, batch, lambda output: output.logits.square().mean()).additions
    model(**batch).logits.square().mean().backward()
    for index, row in enumerate(rows):
        part = model.transformer.h[index // 2].attn if index % 2 == 0 else model.transformer.h[index // 2].mlp
        gradients = torch.cat([p.grad.flatten() for p in part.parameters() if p.dim() > 1])
        assert (row.gradient, row.weights) == (close(float(gradients.square().mean().sqrt())), gradients.numel())


def test_live_gradients_give_the_ratio_of_the_probe() -> None:
    model, batch = GPT2.build().eval(), GPT2.batch()
    probe = DepthProbe(model, batch)
    profile = probe.measure(batch, lambda output: output.logits.square().mean())
    model(**batch).logits.square().mean().backward()
    assert [gradient for _, gradient, _ in probe.live_gradients()] == [close(row.gradient or 0.0) for row in profile.additions]


def test_skipping_a_branch_costs_what_a_branch_of_zero_costs() -> None:
    model, batch = GPT2.build().eval(), GPT2.batch()
    loss_fn = lambda output: output.logits.square().mean()  # noqa: E731
    profile = measure_depth_profile(model, batch, loss_fn, skip=True)
    for index, row in enumerate(profile.additions):
        without = copy.deepcopy(model)
        part = without.get_submodule(GPT2.branches[index])
        nn.init.zeros_(part.c_proj.weight)
        nn.init.zeros_(part.c_proj.bias)
        expected = float(loss_fn(without(**batch)).detach()) - float(profile.loss or 0.0)
        assert row.skip_cost == pytest.approx(expected, abs=1e-6)


def test_padding_is_as_if_it_were_not_there() -> None:
    model = GPT2.build().eval()
    ids = GPT2.batch()["input_ids"]
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=ids.dtype)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 3, dtype=ids.dtype)], 1)
    probe = DepthProbe(model, {"input_ids": ids})
    alone = probe.measure({"input_ids": ids}).additions
    with_padding = probe.measure({"input_ids": padded, "attention_mask": mask}).additions
    by_argument = probe.measure({"input_ids": padded}, mask=mask).additions
    ignored = probe.measure({"input_ids": padded}).additions
    for name in ("variance", "branch_variance", "ratio", "largest", "largest_elsewhere", "median"):
        expected = [close(getattr(row, name)) for row in alone]
        assert [getattr(row, name) for row in with_padding] == expected
        assert [getattr(row, name) for row in by_argument] == expected
    assert [row.variance for row in ignored] != [close(row.variance) for row in alone]


@pytest.mark.parametrize("network", [GPT2, SWIN], ids=["gpt2", "swin"])
def test_nothing_is_left_behind(network: Network) -> None:
    model, batch = network.build(), network.batch()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    measure_depth_profile(model, batch, lambda output: network.tensor_of(output).square().mean(), skip=True)
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(bool((parameter.grad == 0.5).all()) for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class InPlace(nn.Module):
    """Adds in place, in a loop on one line; `parallel` adds two branches at once."""

    def __init__(self, *, in_place: bool, parallel: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(4))
        self.in_place, self.parallel = in_place, parallel

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
            if self.parallel:
                x = x + first(x) + second(x)
            elif self.in_place:
                x += first(x)
                x += second(x)
            else:
                x = x + first(x)
                x = x + second(x)
        return x


def test_additions_in_place_give_the_same_numbers() -> None:
    torch.manual_seed(0)
    written, in_place = InPlace(in_place=False, parallel=False), InPlace(in_place=True, parallel=False)
    in_place.load_state_dict(written.state_dict())
    x = torch.randn(2, 5, 6)
    numbers = [
        [(row.variance, row.branch_variance, row.ratio, row.angle) for row in measure_depth_profile(model, x).additions]
        for model in (written, in_place)
    ]
    assert len(numbers[0]) == 4
    assert numbers[0] == numbers[1]


def test_parallel_branches_count_as_one() -> None:
    torch.manual_seed(0)
    model = InPlace(in_place=False, parallel=True)
    x = torch.randn(2, 5, 6)
    rows = measure_depth_profile(model, x).additions
    for row, (first, second) in zip(rows, ((0, 1), (2, 3)), strict=True):
        branch = model.layers[first](x) + model.layers[second](x)
        assert row.branch_variance == close(variance(branch))
        x = x + branch


class Uneven(nn.Module):
    """Runs a line once more at run time than when it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.steady, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.steady(x)
        for _ in range(1 if torch.compiler.is_exporting() else 2):
            x = x + self.other(x)
        return x


def test_a_line_that_runs_another_number_of_times_is_not_guessed() -> None:
    profile = measure_depth_profile(Uneven(), torch.randn(2, 3, 4))
    assert (len(profile.additions), profile.unread) == (1, ("",))


def test_blocks_are_those_of_the_adding_modules_or_of_the_weights(network: Network) -> None:
    rows = DepthProbe(network.build(), network.batch()).additions
    assert [row.block for row in rows] == [re.sub(r"(.*\.\d+)\..*", r"\1", path) for path in network.branches]


def test_blocks_of_additions_written_in_a_loop() -> None:
    assert [row.block for row in DepthProbe(InPlace(in_place=False, parallel=False), torch.randn(2, 5, 6)).additions] == [
        f"layers.{index}.1" for index in range(4)
    ]


def test_massive_activations_are_named() -> None:
    model = InPlace(in_place=False, parallel=False)
    x = torch.randn(2, 5, 6) * 0.01
    nn.init.zeros_(model.layers[0][1].weight)
    x[1, 3, 2] = 500.0
    row = measure_depth_profile(model, x).additions[0]
    assert [(item.position, item.channel) for item in row.massive] == [((3,), 2)]
    x[1, 3, 2] = 90.0
    assert measure_depth_profile(model, x).additions[0].massive == ()


def test_a_compiled_model_is_measured_as_it_is_written() -> None:
    model, batch = GPT2.build().eval(), GPT2.batch()
    expected = measure_depth_profile(model, batch)
    assert measure_depth_profile(torch.compile(model), batch) == expected


def test_bad_requests_say_what_is_missing() -> None:
    model, x = InPlace(in_place=False, parallel=False), torch.randn(2, 5, 6)
    with pytest.raises(ConfigError, match="needs a loss"):
        measure_depth_profile(model, x, skip=True)
    with pytest.raises(ConfigError, match="no scalar"):
        measure_depth_profile(model, x, lambda output: output)
    with pytest.raises(ConfigError, match="at least one addition"):
        measure_depth_profile(model, x, span=0)
    with pytest.raises(ConfigError, match="meta device"):
        measure_depth_profile(copy.deepcopy(model).to("meta"), x)
    with pytest.raises(NothingMatchedError, match="no residual addition"):
        measure_depth_profile(nn.Linear(6, 6), x)
