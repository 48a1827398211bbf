"""`swap_norms`: parameters are carried over, real models come back, nothing is half swapped."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, NothingMatchedError
from pl_normkit.methods.norm_operators import norm_inputs, swap_norms
from pl_normkit.norm_modules import is_norm
from tests.methods.norm_operators.tiny_models import build, output, trained_like

WIDTH = 7


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


@pytest.mark.parametrize("to", ["rmsnorm", "dyt", "scalenorm", "powernorm"])
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


@pytest.mark.parametrize("to", ["rmsnorm", "dyt", "scalenorm", "prepbn"])
@pytest.mark.parametrize("is_alone", [True, False])
def test_torchs_fast_path_does_not_take_the_new_norms_for_layer_norms(to: str, is_alone: bool) -> None:
    """Without gradients in eval mode torch's encoder layer computes layer norms from the parameters of its norms."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = layer if is_alone else nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    before = output(model.eval(), x)
    changes = swap_norms(model, to)
    for net in (model, copy.deepcopy(model)):
        torch.testing.assert_close(output(net, x), net(x).detach())
    changes.undo()
    assert torch.equal(output(model, x), before)


@pytest.mark.parametrize(("name", "count"), [("LlamaRMSNorm", 1), ("T5LayerNorm", 1), ("GemmaRMSNorm", 0)])
def test_rms_norms_of_transformers_are_known_by_what_they_compute(name: str, count: int) -> None:
    """Gemma's stores gamma - 1: its parameter is no gamma."""
    places = {
        "LlamaRMSNorm": transformers.models.llama.modeling_llama,
        "T5LayerNorm": transformers.models.t5.modeling_t5,
        "GemmaRMSNorm": transformers.models.gemma.modeling_gemma,
    }
    model = nn.Sequential(nn.Linear(6, 6), getattr(places[name], name)(6, eps=0.25))
    with torch.no_grad():
        model[1].weight.add_(torch.arange(6) / 5)
    x, gamma = torch.randn(3, 6), model[1].weight
    before = model(x).detach()
    if not count:
        with pytest.raises(NothingMatchedError, match="GemmaRMSNorm does not compute gamma x / rms"):
            swap_norms(model, "rmsnorm")
        return
    swap_norms(model, "rmsnorm")
    assert type(model[1]) is nn.RMSNorm
    assert model[1].weight is gamma
    torch.testing.assert_close(model(x).detach(), before)


@pytest.mark.parametrize(("eps", "is_told", "has_bias"), [(1e-5, False, True), (1e-6, False, False), (1e-3, True, True)])
def test_layer_norms_written_by_hand_are_known_by_what_they_compute(eps: float, is_told: bool, has_bias: bool) -> None:
    """nanoGPT's class, with eps in its forward; the other one is that of ConvNeXt's authors for images (N, C, H, W)."""

    class LayerNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6)) if has_bias else None
            if is_told:
                self.variance_epsilon = eps

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, eps)

    class LayerNormOfImages(LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            normed = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + eps).sqrt()
            return self.weight[:, None, None] * normed

    model, x = trained_like(nn.Sequential(LayerNorm(), LayerNormOfImages())), 1e-3 * torch.randn(2, 6, 6, 6, dtype=torch.float64)
    before, keys = model[0](x).detach(), set(model.state_dict())
    assert is_norm(model[0])
    assert not is_norm(model[1])
    changes = swap_norms(model, "tdln")
    assert list(map(str, changes.skipped)) == ["1: LayerNormOfImages does not compute a layer norm of rows as stored"]
    with norm_inputs(model, time=torch.randn(2, dtype=torch.float64)):
        torch.testing.assert_close(model[0](x).detach(), before)
    changes.undo()
    assert set(model.state_dict()) == keys
    swap_norms(model, "rmsnorm")
    assert type(model[0]) is nn.RMSNorm
    with pytest.raises(NothingMatchedError, match="it is rmsnorm already"):
        swap_norms(model, "rmsnorm")
    with pytest.raises(NothingMatchedError, match="LayerNorm cannot be run on the meta device"):
        swap_norms(nn.Sequential(LayerNorm()).to("meta"), "rmsnorm")


def test_batch_norms_with_activation_become_group_norms_with_the_same() -> None:
    """timm's EfficientNets have no other batch norms."""
    model = trained_like(timm.create_model("efficientnet_lite0", num_classes=3)).train()
    old, x = model.bn1, torch.randn(2, 32, 5, 7, dtype=torch.float64)
    act, drop = type(old.act), type(old.drop)
    before = copy.deepcopy(model.state_dict())
    changes = swap_norms(model, "groupnorm", groups=8)
    assert changes.skipped == []
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    assert (type(model.bn1.act), type(model.bn1.drop), model.bn1.num_groups) == (act, drop, 8)
    expected = nn.functional.group_norm(x, 8, old.weight, old.bias, old.eps).clamp(0, 6)
    torch.testing.assert_close(model.bn1(x), expected)
    assert not any("running" in name for name in model.state_dict())
    changes.undo()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


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
    with pytest.raises(NothingMatchedError, match="it replaces layer norms and RMS norms"):
        swap_norms(nn.Sequential(nn.ReLU()), "dyt")
    assert type(model[0]) is nn.LayerNorm
