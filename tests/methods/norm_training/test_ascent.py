"""`NormAscent` against its formula written out; the network is afterwards what one pass makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from pl_normkit.errors import ConfigError, DataError, NothingMatchedError
from pl_normkit.methods.norm_training import NormAscent
from pl_normkit.methods.norm_training.ascent import AscentKind

SHIFTS = ("1.bias", "4.bias")
NORMS = ("1.weight", "1.bias", "4.weight", "4.bias")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def data() -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the loss at other parameters, on a copy of the buffers."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss = functional_call(model, {**leaves, **buffers}, (data(),)).square().sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def ascended(values: dict[str, Tensor], slopes: dict[str, Tensor], kind: str, rho: float, eta: float, bias: bool) -> dict[str, Tensor]:
    """The sheet's formula on one long vector of all norm parameters."""
    w, g = (torch.cat([found[name] for name in NORMS]) for found in (values, slopes))
    is_shift = torch.cat([torch.full_like(values[name], name in SHIFTS, dtype=torch.bool) for name in NORMS])
    t = w.abs() + eta if kind != "l2" else torch.ones_like(w)
    t = t if bias else torch.where(is_shift, 1.0, t)
    step = rho * t * torch.sign(g) if kind == "elementwise_linf" else rho * t**2 * g / ((t * g).pow(2).sum().sqrt() + 1e-16)
    parts = (w + step).split([values[name].numel() for name in NORMS])
    return {**values, **dict(zip(NORMS, parts, strict=True))}


@pytest.mark.parametrize("kind", ["l2", "elementwise_l2", "elementwise_linf"])
@pytest.mark.parametrize("normalize_bias", [False, True])
def test_the_second_gradient_is_that_at_the_formulas_point(kind: AscentKind, normalize_bias: bool) -> None:
    model = network()
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    point = ascended(values, gradients(model, values), kind, 0.3, 0.02, normalize_bias)
    expected = gradients(model, point)
    ascent = NormAscent(model, rho=0.3, kind=kind, eta=0.02, normalize_bias=normalize_bias)
    model(data()).square().sum().backward()
    once = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with ascent.perturbed():
        model.zero_grad()
        model(data()).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), point[name], rtol=1e-12, atol=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-12)
        assert torch.equal(parameter, values[name])
    assert all(torch.equal(buffer, once[name]) for name, buffer in model.named_buffers())
    assert once["4.num_batches_tracked"] == 1


def test_the_loss_is_higher_there() -> None:
    model = network()
    first = model(data()).square().sum()
    first.backward()
    with NormAscent(model, rho=0.01).perturbed(), torch.no_grad():
        assert float(model(data()).square().sum()) > float(first)


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    model = network()
    model(data()).square().sum().backward()
    model[1].weight.grad[2] = torch.inf
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with NormAscent(model).perturbed():
        assert all(torch.equal(parameter, value) for parameter, value in zip(model.parameters(), before, strict=True))


def test_a_pass_that_fails_leaves_the_norms_as_they_were() -> None:
    model = network()
    model(data()).square().sum().backward()
    before = model.state_dict()["1.weight"].clone()
    with pytest.raises(RuntimeError), NormAscent(model).perturbed():
        model(torch.zeros(2, 7))
    assert torch.equal(model[1].weight, before)


def test_frozen_norms_take_no_part_and_none_is_refused() -> None:
    model = network()
    ascent = NormAscent(model)
    model[1].requires_grad_(False)
    with pytest.raises(DataError, match="no norm parameter has a gradient"), ascent.perturbed():
        raise AssertionError
    model(data()).square().sum().backward()
    before = model[1].weight.clone(), model[4].weight.detach().clone()
    with ascent.perturbed():
        assert (torch.equal(model[1].weight, before[0]), torch.equal(model[4].weight, before[1])) == (True, False)


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"eta": -1.0}, {"kind": "l1"}])
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        NormAscent(network(), **options)  # type: ignore[arg-type]


def test_a_network_without_norms_is_refused() -> None:
    with pytest.raises(NothingMatchedError):
        NormAscent(nn.Linear(2, 2))
