"""`to_crmsnorm`: the same function with one channel less in the residual stream, and the model back where it does not run so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pl_normkit.errors import EditError, NothingMatchedError
from pl_normkit.methods.norm_operators import to_crmsnorm
from pl_normkit.methods.norm_operators.modules import CompressedRMSNorm
from tests.methods.norm_operators.tiny_models import build, difference, output, timm_vit, trained_like


@pytest.mark.parametrize(("name", "norms", "whole"), [("gpt2", 5, 1), ("vit", 5, 0), ("dinov2", 5, 1), ("torch", 5, 2)])
def test_real_models_keep_their_function(name: str, norms: int, whole: int) -> None:
    """Norms that cannot be folded (a tied head, a head without bias, a join in front of the head) give the missing channel back."""
    model, inputs = build(name)
    before, values, parameters = output(model, inputs), copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    changes = to_crmsnorm(model, inputs)
    found = [module for module in model.modules() if isinstance(module, CompressedRMSNorm)]
    assert (len(found), sum(norm.whole for norm in found)) == (norms, whole)
    assert difference(output(model, inputs), before) < 1e-12
    assert difference(output(copy.deepcopy(model), inputs), before) < 1e-12
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
    changes.undo()
    assert torch.equal(output(model, inputs), before)
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert set(model.state_dict()) == set(values)


def test_layers_say_their_new_sizes_and_lose_a_channel() -> None:
    model, inputs = build("vit")
    to_crmsnorm(model, inputs)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)
    layers = dict(model.named_modules())
    assert [layers["vit.layers.0.attention.q_proj"].in_features, layers["vit.layers.0.mlp.fc2"].out_features] == [31, 31]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_lower_precision_stays_within_rounding(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    model, x = trained_like(timm_vit()).to(dtype), torch.randn(2, 3, 16, 16).to(dtype)
    before = output(model, x)
    to_crmsnorm(model, x)
    assert difference(output(model, x), before) < bound


class Added(nn.Module):
    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.branch(x)
        return result


class Net(nn.Module):
    """Two blocks; `what` says what stands in the way."""

    def __init__(self, what: str = "") -> None:
        super().__init__()
        self.what = what
        self.embed, self.norm, self.head = nn.Embedding(11, 6), nn.LayerNorm(6, bias=what != "no bias"), nn.Linear(6, 3)
        self.a, self.b = (Added(nn.LayerNorm(6), nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)) for _ in range(2))
        if what == "reader writes":
            self.a = Added(nn.LayerNorm(6), nn.Linear(6, 6))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.b(self.a(self.embed(ids)))
        x = self.norm(x.reshape(2, 4, 6) if self.what == "width in the code" else x)
        result: Tensor = self.head(x.reshape(2, 4, 6) if self.what == "width behind the norm" else x)
        return result


IDS = torch.arange(8).reshape(2, 4)


@pytest.mark.parametrize(("what", "whole"), [("", 0), ("no bias", 0), ("reader writes", 1), ("width behind the norm", 3)])
def test_norms_that_give_the_channel_back(what: str, whole: int) -> None:
    model = trained_like(Net(what))
    before = model(IDS)
    to_crmsnorm(model, IDS)
    found = [module for module in model.modules() if isinstance(module, CompressedRMSNorm)]
    assert (len(found), sum(norm.whole for norm in found)) == (3, whole)
    assert difference(model(IDS), before) < 1e-12


def test_code_that_needs_the_full_width_is_refused_and_the_model_stays() -> None:
    model = trained_like(Net("width in the code"))
    before, values = model(IDS), copy.deepcopy(model.state_dict())
    with pytest.raises(EditError, match="needs rows of the full width"):
        to_crmsnorm(model, IDS)
    assert torch.equal(model(IDS), before)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_post_norm_and_streams_without_a_module_to_enter_are_refused() -> None:
    model, inputs = build("bert")
    with pytest.raises(NothingMatchedError, match="reads the same values without a norm"):
        to_crmsnorm(model, inputs)
