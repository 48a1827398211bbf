"""sigmaReparam: the function stays at the start, sigma follows the weight, and what is no plain linear layer is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pl_normkit.errors import NothingMatchedError
from pl_normkit.methods.norm_operators import swap_norms
from pl_normkit.methods.norm_operators.operators.sigma_reparam import SigmaLinear
from pl_normkit.methods.norm_operators.schedule import turning_norms
from tests.methods.norm_operators.tiny_models import build, difference, output, trained_like


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(**options: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = trained_like(nn.Sequential(nn.Linear(5, 7))).train()
    swap_norms(model, "sigma_reparam", **options)
    return model


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_values_and_gradients_equal_the_formula(share: float) -> None:
    """The reference takes sigma from the singular value decomposition, whose gradient torch knows."""
    model = layer()
    sigma_linear = model[0]
    sigma_linear.share.fill_(share)
    with torch.no_grad():
        sigma_linear.gain.fill_(1.7)
    x, back = random(3, 4, 5).requires_grad_(), random(3, 4, 7, seed=1)
    for _ in range(200):  # the power iteration follows
        actual = model(x)
    sigma = torch.linalg.svdvals(sigma_linear.weight)[0]
    weight = sigma_linear.weight * (share + (1 - share) * sigma_linear.gain / sigma)
    expected = torch.stack([torch.stack([weight @ row for row in rows]) for rows in x]) + sigma_linear.bias
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, *sigma_linear.parameters()]
    for mine, theirs in zip(torch.autograd.grad(actual, leaves, back), torch.autograd.grad(expected, leaves, back), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_trained_models_start_with_their_function_keep_their_keys_and_come_back(name: str) -> None:
    model, inputs = build(name)
    before, keys = output(model, inputs), set(model.state_dict())
    changes = swap_norms(model, "sigma_reparam")
    assert difference(output(model, inputs), before) < 1e-12
    assert keys < set(model.state_dict())
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert difference(output(copy.deepcopy(model), inputs), before) < 1e-12
    changes.undo()
    assert torch.equal(output(model, inputs), before)


def test_the_first_training_pass_is_that_of_the_layer_up_to_one_iteration() -> None:
    torch.manual_seed(0)
    old = trained_like(nn.Sequential(nn.Linear(5, 7)))
    x, before = random(4, 5), old(random(4, 5))
    swap_norms(old, "sigma_reparam")
    assert difference(old.train()(x), before) < 1e-6


def test_one_iteration_a_forward_follows_a_weight_that_moves() -> None:
    model = layer()
    with torch.no_grad():
        model[0].weight.copy_(random(7, 5, seed=7))
    sigma = torch.linalg.svdvals(model[0].weight)[0]
    errors = []
    for _ in range(60):
        model(random(2, 5))
        errors.append(abs(float(model[0]._sigma().detach() / sigma.detach()) - 1))
    assert errors[0] > errors[5] > errors[59]
    assert errors[59] < 1e-6
    left = model[0].left.clone()
    model.eval()(random(2, 5))
    assert torch.equal(model[0].left, left)


def test_a_gain_of_one_comes_by_a_schedule() -> None:
    torch.manual_seed(0)
    model = trained_like(nn.Sequential(nn.Linear(5, 7)))
    x, before = random(4, 5), model(random(4, 5))
    swap_norms(model, "sigma_reparam", gain="one")
    assert torch.equal(model(x), before)
    turning = turning_norms(model)
    turning.turn(step=5, start=0, steps=10)
    assert turning.share == 0.5
    with turning.finished():
        assert torch.linalg.svdvals(model[0].weight / model[0]._sigma())[0].item() == pytest.approx(1.0, rel=1e-6)
    turning.turn(step=10, start=0, steps=10)
    assert (turning.share, turning_norms(model).progressive) == (0.0, {})
    assert turning_norms(layer()).progressive == {}


def test_tied_packed_and_zero_weights_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    nn.init.zeros_(model[3].weight)
    changes = swap_norms(model, "sigma_reparam")
    assert [change.module for change in changes.made] == ["4"]
    assert {change.module: change.what.split()[-1] for change in changes.skipped} == {
        "0": "layer's",
        "1": "layer's",
        "2.out_proj": "called",
        "3": "zero",
    }
    assert isinstance(model[4], SigmaLinear)
    with pytest.raises(NothingMatchedError):
        swap_norms(nn.Sequential(nn.Conv2d(3, 3, 1)), "sigma_reparam")
