"""`swap_norms`: each operator equals its formula, values and gradients; parameters are carried over; nothing is half swapped."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, NothingMatchedError
from pl_normkit.methods.norm_operators import operators, swap_norms
from tests.methods.norm_operators.tiny_models import build, output, trained_like

WIDTH = 7


def rows_of(x: Tensor, one: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([one(row) for row in x.reshape(-1, x.shape[-1])]).reshape(x.shape)


def rms(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    return rows_of(
        x, lambda row: torch.stack([p["weight"][i] * v / (sum(u * u for u in row) / len(row) + 1e-5) ** 0.5 for i, v in enumerate(row)])
    )


def dyt(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    e = torch.exp(2 * p["alpha"] * x)
    return p["weight"] * (e - 1) / (e + 1) + p["bias"]


def scale(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    return rows_of(x, lambda row: p["g"] * row / (row * row).sum() ** 0.5)


REFERENCES = {"rmsnorm": rms, "dyt": dyt, "scalenorm": scale}


def test_each_file_of_the_folder_is_an_operator_and_has_a_reference() -> None:
    files = {file.stem for file in Path(operators.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(operators.operators()) == files == set(REFERENCES)
    assert all(operator.formula and "arXiv" in operator.source for operator in operators.operators().values())


@pytest.mark.parametrize("to", sorted(REFERENCES))
@pytest.mark.parametrize("shape", [(3, WIDTH), (2, 3, 5, WIDTH)])
def test_values_and_gradients_equal_the_formula(to: str, shape: tuple[int, ...]) -> None:
    model = trained_like(nn.Sequential(nn.LayerNorm(WIDTH)))
    swap_norms(model, to)
    generator = torch.Generator().manual_seed(0)
    x, back = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    parameters = dict(model[0].named_parameters())
    expected, actual = REFERENCES[to](x, parameters), model(x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, *parameters.values()]
    for mine, theirs in zip(torch.autograd.grad(actual, leaves, back), torch.autograd.grad(expected, leaves, back), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("to", "options", "keys"),
    [
        ("rmsnorm", {}, {"weight": True}),
        ("dyt", {"alpha": 0.75}, {"weight": True, "bias": True, "alpha": 0.75}),
        ("scalenorm", {}, {"g": math.sqrt(WIDTH)}),
    ],
)
def test_trained_parameters_are_carried_over(to: str, options: dict[str, float], keys: dict[str, float | bool]) -> None:
    model = trained_like(nn.Sequential(nn.LayerNorm(WIDTH)))
    old = dict(model[0].named_parameters())
    swap_norms(model, to, **options)
    new = dict(model[0].named_parameters())
    assert {name: p is old[name] if name in old else p.item() for name, p in new.items()} == pytest.approx(keys)


@pytest.mark.parametrize("to", sorted(REFERENCES))
@pytest.mark.parametrize("name", ["gpt2", "timm_vit", "bert"])
def test_real_models_are_swapped_copied_and_come_back(to: str, name: str) -> None:
    model, inputs = build(name)
    before = output(model, inputs)
    changes = swap_norms(model, to)
    assert len(changes.made) == 5
    assert changes.skipped == []
    assert not any(type(module) is nn.LayerNorm for module in model.modules())
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, inputs), output(model, inputs))
    assert not torch.equal(output(model, inputs), before)
    changes.undo()
    assert torch.equal(output(model, inputs), before)


def test_eps_is_carried_over_and_no_parameters_stay_none() -> None:
    model = nn.Sequential(nn.LayerNorm(WIDTH, eps=0.25, elementwise_affine=False))
    swap_norms(model, "rmsnorm")
    assert (model[0].eps, list(model.parameters())) == (0.25, [])
    swap_norms(model, "dyt")
    assert [name for name, _ in model.named_parameters()] == ["0.alpha"]


class Own(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_what_is_no_plain_norm_is_left_alone() -> None:
    model = nn.Sequential(nn.LayerNorm(4), Own(4), nn.LayerNorm((2, 4)), nn.LayerNorm(4))
    changes = swap_norms(model, "rmsnorm", where=lambda _, path: path != "3")
    assert [type(module) for module in model] == [nn.RMSNorm, Own, nn.LayerNorm, nn.LayerNorm]
    assert {change.module: change.what for change in changes.skipped} == {
        "1": "Own may do more than a norm",
        "2": "it normalizes several dimensions",
        "3": "not chosen",
    }


def test_bad_names_and_models_without_norms() -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(ConfigError, match="did you mean 'rmsnorm'"):
        swap_norms(model, "rmsnrm")
    with pytest.raises(ConfigError, match="rmsnorm has no option 'alpha'"):
        swap_norms(model, "rmsnorm", alpha=1)
    with pytest.raises(NothingMatchedError, match="no layer norm"):
        swap_norms(nn.Sequential(nn.ReLU()), "dyt")
    assert type(model[0]) is nn.LayerNorm
