"""Each rule fires where running the model shows the defect, and is quiet beside it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from timm.layers import EvoNorm2dS0, StdConv2d
from timm.models.resnetv2 import ResNetV2
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from pl_normkit import audit, swap_norms
from tests.methods.norm_operators.tiny_models import build

EVERY = [f"NK92{i}" for i in range(1, 6)] + [f"NK93{i}" for i in range(1, 5)]
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def codes(model: nn.Module, inputs: object, *select: str, **options: object) -> set[str]:
    report = audit(model, inputs, select=list(select or EVERY), **options)
    return {finding.code for finding in report.findings}


# -- NK921


@pytest.mark.parametrize(
    ("eps", "scale", "expected"), [(1e-5, 1.0, set()), (1e12, 1.0, {"NK921"}), (1e-5, 1e-4, {"NK921"}), (0.05, 1.0, set())]
)
def test_eps_above_the_variance(eps: float, scale: float, expected: set[str]) -> None:
    norm, x = nn.LayerNorm(16, eps=eps), torch.randn(8, 16, generator=torch.Generator().manual_seed(0)) * scale
    assert codes(nn.Sequential(norm, nn.Linear(16, 2)), x, "NK921") == expected
    assert (norm(x).square().mean().item() < 0.5) is bool(expected)  # at a ratio of 1 the mean square is one half


def test_rows_of_zeros_have_nothing_to_divide() -> None:
    """The queries of DETR's first decoder layer start at zero, and so does what its attention makes of them."""
    assert codes(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 2)), torch.zeros(8, 16), "NK921") == set()


# -- NK922 to NK924


def test_a_progressive_norm_in_eval_mode_is_another_function() -> None:
    model, x = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)), torch.randn(6, 4)
    swap_norms(model, "prepbn")
    assert codes(model.train(), x, "NK922") == set()
    assert codes(model.eval(), x, "NK922") == {"NK922"}
    assert not torch.allclose(model(x), model.train()(x))
    model[0].share.zero_()
    assert codes(model.eval(), x, "NK922") == set()


def test_skipped_steps_are_counted_from_a_real_run() -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    swap_norms(model, "unified", warmup=0)
    for i in range(20):
        model(torch.randn(64, 4, generator=torch.Generator().manual_seed(i)) * (1 + 9 * (i % 5 == 4)))
    share = float(model[0].skipped) / 20
    assert codes(model, None, "NK923") == ({"NK923"} if share > 0.05 else set())
    assert share > 0.05
    model[0].skipped.fill_(1)
    assert codes(model, None, "NK923") == set()


@pytest.mark.parametrize(("alpha", "expected"), [(0.5, set()), (20.0, {"NK924"})])
def test_saturated_tanh(alpha: float, expected: set[str]) -> None:
    model, inputs = build("timm_vit")
    swap_norms(model, "dyt", alpha=alpha)
    assert codes(model, inputs, "NK924") == expected


# -- NK925


@pytest.mark.parametrize("kind", ["B0", "B1", "B2", "S0", "S1", "S2", "S0a", "S1a", "S2a"])
def test_evonorms_without_activation_that_normalize_nothing(kind: str) -> None:
    norm = getattr(timm.layers, f"EvoNorm2d{kind}")(32, apply_act=False).train()
    x = torch.randn(2, 32, 3, 3) * 7
    is_idle = torch.equal(norm(x), x)
    assert codes(nn.Sequential(nn.Conv2d(3, 32, 3), norm), IMAGE, "NK925") == ({"NK925"} if is_idle else set())


@pytest.mark.parametrize(("after", "expected"), [(nn.ReLU(), {"NK925"}), (nn.Conv2d(32, 4, 1), set()), (nn.AvgPool2d(2), set())])
def test_an_activation_behind_an_evonorm(after: nn.Module, expected: set[str]) -> None:
    assert codes(nn.Sequential(nn.Conv2d(3, 32, 3), EvoNorm2dS0(32), after), IMAGE, "NK925") == expected


def test_what_the_remedy_swaps_is_quiet() -> None:
    model = torchvision.models.mobilenet_v2(num_classes=3, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]])
    swap_norms(model, "evonorm")
    assert codes(model, IMAGE.repeat(1, 1, 2, 2), "NK925") == set()


# -- NK931


def conv_net(wrap: Callable[[nn.Module], nn.Module], norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(wrap(nn.Conv2d(3, 8, 3, bias=False)), norm, nn.ReLU(), nn.Conv2d(8, 4, 1))


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.InstanceNorm2d(8), nn.GroupNorm(2, 8), nn.Identity()], ids=repr)
def test_a_norm_that_undoes_the_scale_of_a_weight(wrap: Callable[[nn.Module], nn.Module], norm: nn.Module) -> None:
    """By a run: other lengths of filters (weight norm), or another length of the whole weight (spectral norm), and the same output."""
    model = conv_net(wrap, norm).train()
    before = model(IMAGE)
    factor = torch.arange(1.0, 9.0).reshape(-1, 1, 1, 1) if wrap is weight_norm else torch.tensor(3.0)
    plain = nn.Conv2d(3, 8, 3, bias=False)
    plain.weight.data = model[0].weight.detach() * factor
    is_undone = torch.allclose(nn.Sequential(plain, *model[1:])(IMAGE), before, atol=1e-3)
    assert codes(model, IMAGE, "NK931") == ({"NK931"} if is_undone else set())


def test_the_old_way_of_torch_is_seen_too() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = conv_net(nn.utils.weight_norm, nn.BatchNorm2d(8))
    assert codes(model, IMAGE, "NK931") == {"NK931"}


def test_a_second_reader_keeps_the_scale() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = spectral_norm(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            result: Tensor = x + self.norm(x)
            return result

    assert codes(Skip(), IMAGE, "NK931") == set()


# -- NK932


@pytest.mark.parametrize(
    ("behind", "expected"),
    [
        ([nn.ReLU(), nn.Conv2d(8, 4, 1)], {"NK932"}),
        ([nn.GroupNorm(2, 8), nn.ReLU()], set()),
        ([nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(8)], set()),
    ],
)
def test_standardized_weights_want_a_norm(behind: list[nn.Module], expected: set[str]) -> None:
    """By a run: ten times the weights, the same output."""
    conv = StdConv2d(3, 8, 3)
    model = nn.Sequential(conv, *behind)
    assert codes(model, IMAGE, "NK932") == expected


# -- NK933, NK934


def test_a_weight_that_moved_away_from_its_vectors() -> None:
    model = nn.Sequential(spectral_norm(nn.Linear(16, 16)), nn.ReLU(), spectral_norm(nn.ConvTranspose2d(3, 8, 3))).eval()
    assert codes(model, None, "NK933") == set()
    with torch.no_grad():
        model[0].parametrizations.weight.original.copy_(torch.diag(torch.arange(16.0)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = audit(model, select=["NK933"])
    (finding,) = report.findings
    assert finding.places[0].module == "0"
    assert finding.evidence[0].value == pytest.approx(torch.linalg.svdvals(model[0].weight.detach())[0].item(), rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_decayed_gains() -> None:
    model = timm.create_model("nf_resnet26", num_classes=2)
    by_dimensions = param_groups_weight_decay(model, 2e-5)
    report = audit(model, optimizers=torch.optim.SGD(by_dimensions, 0.1), select=["NK934"])
    gains = [name for name, _ in model.named_parameters() if name.endswith(".gain")]
    assert [place.module for place in report.findings[0].places] == gains
    assert codes(model, None, "NK934", optimizers=torch.optim.SGD(model.parameters(), 0.1)) == set()


QUIET = {
    "resnet10t": lambda: (timm.create_model("resnet10t", num_classes=3), torch.randn(2, 3, 32, 32)),
    "bit": lambda: (ResNetV2((1, 1, 1, 1), num_classes=3, conv_layer=StdConv2d), torch.randn(2, 3, 64, 64)),
    "nf": lambda: (timm.create_model("nf_resnet26", num_classes=3), torch.randn(2, 3, 64, 64)),
    "evonorm": lambda: (ResNetV2((1, 1, 1, 1), num_classes=3, norm_layer=EvoNorm2dS0), torch.randn(2, 3, 64, 64)),
    "convnext": lambda: (timm.create_model("convnext_atto", num_classes=3, depths=(1, 1, 1, 1)), torch.randn(2, 3, 32, 32)),
    **{name: lambda name=name: build(name) for name in ("gpt2", "llama", "vit", "bert")},
}


@pytest.mark.parametrize("name", sorted(QUIET))
def test_real_models_are_quiet(name: str) -> None:
    model, inputs = QUIET[name]()
    assert codes(model.train(), inputs) == set()
