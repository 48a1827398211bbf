"""Folding: exact where it says so, kept where it would not be, the same objects back after undo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from pl_normkit.errors import ConfigError, NothingMatchedError
from pl_normkit.graph import ModelGraph
from pl_normkit.methods.fusion_scale import equalize_scales, fold, insert_equalizers
from pl_normkit.methods.fusion_scale.absorbing_layers import relative_path, resolve_path
from pl_normkit.nn import ScaleEqualizer
from tests.methods.fusion_scale.models import Nested, OwnDecoder, SharedFusion, images, scales_after


def train_a_little(model: nn.Module) -> None:
    """So that running statistics and weights are not what they were when the equalizer was calibrated."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for x in images(3, seed=5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


class Separable(nn.Module):
    """A depthwise, then a pointwise convolution reads the fusion, as in DeepLabV3+; the norm after both takes the mean."""

    def __init__(self, kernel: int = 1) -> None:
        super().__init__()
        self.levels = OwnDecoder().levels
        self.depthwise = nn.Conv2d(14, 28, kernel, padding=kernel // 2, groups=14, bias=False)
        self.pointwise = nn.Conv2d(28, 5, 1, bias=False)
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = self.levels(x)
        out: Tensor = self.norm(self.pointwise(self.depthwise(torch.cat([fine, F.interpolate(coarse, fine.shape[2:])], 1))))
        return out


EXACT: dict[str, Callable[[], nn.Module]] = {
    "1x1 with bias": OwnDecoder,
    "1x1 without bias, before a batch norm": lambda: OwnDecoder(bias=False),
    "1x1 with bias and no norm": lambda: OwnDecoder(norm=False),
    "separable": Separable,
    "dropout between": lambda: OwnDecoder(between=nn.Dropout2d(0.5)),
    "non-linearity between": lambda: OwnDecoder(between=nn.ReLU()),
    "nested": Nested,
    "shared": SharedFusion,
}


@pytest.mark.parametrize("granularity", ["branch", "channel"])
@pytest.mark.parametrize("name", EXACT)
def test_folding_keeps_the_function(name: str, granularity: str) -> None:
    model = EXACT[name]().double()
    loader = [x.double() for x in images()]
    equalize_scales(model, loader, granularity=granularity)  # type: ignore[arg-type]
    model.double()
    for x in loader:
        model(x)
    model.eval()
    x = images(1, seed=9)[0].double()
    expected, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())

    changes = fold(model)
    assert changes.skipped == []
    assert not any(isinstance(module, ScaleEqualizer) for module in model.modules())
    assert [key for key in state if "scale_equalizer" not in key] == list(model.state_dict())
    assert dict(model.named_parameters()) == parameters
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert not fold(model)

    changes.undo()
    assert torch.equal(model(x), expected)
    assert {key: bool(torch.equal(value, state[key])) for key, value in model.state_dict().items()} == dict.fromkeys(state, True)


SMALL = {"encoder_depth": 3, "decoder_channels": (64, 32, 16)}
REAL: dict[str, dict[str, Any]] = {
    "DeepLabV3Plus": {"decoder_channels": 32},
    "UPerNet": {"decoder_channels": 32},
    "UnetPlusPlus": SMALL,
    "MAnet": SMALL,
    "PSPNet": {},
    "Segformer": {},
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "DeepLabV3Plus" else pytest.mark.zoo) for name in REAL])
def test_folding_keeps_the_function_of_real_decoders(name: str) -> None:
    """With the means as padding nothing is left to keep: 1x1, 3x3 and depthwise before pointwise fusions."""
    model = getattr(smp, name)("resnet18", encoder_weights=None, **REAL[name])
    x = torch.randn(4, 3, 64, 64)
    equalize_scales(model, [x])
    model(x)
    model.eval()
    expected, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    changes = fold(model, border="pad")
    assert not any(isinstance(module, ScaleEqualizer) for module in model.modules())
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))
    changes.undo()
    assert torch.equal(model(x), expected)
    assert {key: bool(torch.equal(value, state[key])) for key, value in model.state_dict().items()} == dict.fromkeys(state, True)


def test_folding_after_training() -> None:
    model = OwnDecoder(bias=False)
    equalize_scales(model, images())
    train_a_little(model)
    model.eval()
    x = images(1, seed=9)[0]
    expected = model(x)
    fold(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [lambda: OwnDecoder(kernel=3), lambda: Separable(kernel=3)], ids=["3x3", "separable 3x3"])
def test_zero_padding(build: Callable[[], nn.Module]) -> None:
    """Kept by default; with the means as padding exact; ignored, exact inside and different at the border."""
    model = build().double()
    equalize_scales(model, [x.double() for x in images()])
    model.eval()
    x = images(1, seed=9)[0].double()
    expected = model(x)

    kept = fold(model)
    assert not kept
    assert "pads with zeros" in str(kept)
    padded = fold(model, border="pad")
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    padded.undo()
    assert torch.equal(model(x), expected)
    ignored = fold(model, border="ignore")
    assert [change.what for change in ignored.skipped] == [
        "folded, but its zero padding no longer stands for the means: outputs at the border differ"
    ]
    difference = (model(x) - expected).abs().detach()
    assert float(difference[..., 1:-1, 1:-1].max()) < 1e-6
    assert float(difference.max()) > 1e-2


@pytest.mark.parametrize("mode", ["replicate", "reflect", "circular"])
def test_other_paddings_hold_the_features_own_values(mode: str) -> None:
    model = OwnDecoder(kernel=3).double()
    model.fuse = nn.Conv2d(14, 5, 3, padding=1, padding_mode=mode).double()
    equalize_scales(model, [x.double() for x in images()])
    model.eval()
    x = images(1, seed=9)[0].double()
    expected = model(x)
    assert fold(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


class TwoReaders(nn.Module):
    """A convolution and its shortcut read one fusion: each gets an equalizer of its own, and both fold."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = OwnDecoder().levels
        self.main = nn.Conv2d(14, 5, 1)
        self.shortcut = nn.Conv2d(14, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = self.levels(x)
        joined = torch.cat([fine, F.interpolate(coarse, fine.shape[2:])], 1)
        out: Tensor = self.main(joined).relu() + self.shortcut(joined)
        return out


class Tied(TwoReaders):
    """Both convolutions share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut.weight = self.main.weight


class Standardized(nn.Conv2d):
    """Weight standardization: the weight is computed anew in each forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def with_fuse(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = OwnDecoder()
        model.fuse = layer()  # type: ignore[assignment]
        return model

    return build


STAYS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "shared weight": (Tied, "shared with another layer"),
    "parametrization": (with_fuse(lambda: parametrizations.weight_norm(nn.Conv2d(14, 5, 1))), "computed from others"),
    "own forward": (with_fuse(lambda: Standardized(14, 5, 1)), "computes its weight or padding itself"),
    "transposed": (with_fuse(lambda: nn.ConvTranspose2d(14, 5, 3, padding=1)), "transposed convolution"),
    "no bias, no norm": (lambda: OwnDecoder(bias=False, norm=False), "no bias, and no batch norm follows"),
    "group norm between": (lambda: OwnDecoder(between=nn.GroupNorm(2, 14)), "is no convolution module"),
}


@pytest.mark.parametrize("name", STAYS)
@pytest.mark.parametrize("mode", ["explicit", "init"])
def test_what_cannot_be_folded_stays_and_says_why(name: str, mode: str) -> None:
    build, reason = STAYS[name]
    model = build()
    changes = equalize_scales(model, images(), mode=mode)  # type: ignore[arg-type]
    folded = fold(model)
    assert not folded
    assert {reason in change.what for change in folded.skipped} == {True}
    assert any(isinstance(module, ScaleEqualizer) for module in model.modules())
    assert any(reason in change.what for change in changes.skipped) is (mode == "init")
    for means, stds in scales_after(model, images()).values():
        assert [abs(mean) < 1e-4 for mean in means] == [True] * len(means)
        assert [abs(std - 1) < 1e-4 for std in stds] == [True] * len(stds)


def test_two_readers_fold_both() -> None:
    model = TwoReaders()
    equalize_scales(model, images())
    assert sum(isinstance(module, ScaleEqualizer) for module in model.modules()) == 2
    x = images()[0]
    expected = model(x)
    assert fold(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


# The initialization form.


def test_init_is_the_explicit_function_with_no_new_key() -> None:
    torch.manual_seed(1)
    explicit = OwnDecoder(bias=False)
    torch.manual_seed(1)
    init = OwnDecoder(bias=False)
    keys, weight, original = list(init.state_dict()), init.fuse.weight, init.fuse.weight.detach().clone()
    equalize_scales(explicit, images())
    changes = equalize_scales(init, images(), mode="init")

    assert list(init.state_dict()) == keys
    assert init.fuse.weight is weight
    std = explicit.get_submodule("fuse.scale_equalizer").std.float().view(1, -1, 1, 1)
    torch.testing.assert_close(weight.detach(), original / std)
    for model in (explicit, init):
        model.eval()
    torch.testing.assert_close(init(images()[0]), explicit(images()[0]), rtol=1e-4, atol=1e-5)
    assert not equalize_scales(init, images(), mode="init")
    changes.undo()
    assert torch.equal(weight, original)


def test_init_trains_differently() -> None:
    """At step 0 the function is the same, and the gradient of the folded weights keeps the factor sigma (and the mean's part)."""
    gradients = {}
    for mode in ("explicit", "init"):
        torch.manual_seed(1)
        model = OwnDecoder(norm=False)
        equalize_scales(model, images(), mode=mode)  # type: ignore[arg-type]
        model(images()[0]).square().sum().backward()
        assert model.fuse.weight.grad is not None
        gradients[mode] = model.fuse.weight.grad.double()[..., 0, 0]
        if mode == "explicit":
            equalizer = model.get_submodule("fuse.scale_equalizer")
            sigma, mean = equalizer.std, equalizer.mean
    assert model.fuse.bias is not None
    assert model.fuse.bias.grad is not None
    expected = gradients["explicit"] * sigma + model.fuse.bias.grad.double()[:, None] * mean
    torch.testing.assert_close(gradients["init"], expected, rtol=1e-3, atol=1e-3)


def test_zero_padded_fusions_take_the_module_form_unless_the_border_may_differ() -> None:
    model = OwnDecoder(kernel=3)
    changes = equalize_scales(model, images(), mode="init")
    assert isinstance(model.get_submodule("fuse.scale_equalizer"), ScaleEqualizer)
    assert "pads with zeros" in str(changes)
    model = OwnDecoder(kernel=3)
    changes = equalize_scales(model, images(), mode="init", border="ignore")
    assert not any("scale_equalizer" in key for key in model.state_dict())
    assert "outputs at the border differ" in str(changes)


@pytest.mark.parametrize("mode", ["explicit", "init"])
@pytest.mark.parametrize("name", ["Segformer", "PSPNet", "Unet"])
def test_the_folded_form_adds_no_operation(name: str, mode: str) -> None:
    """Counted in the exported graph; Unet's fusions pad with zeros, whose border is given up here."""
    options = {"decoder_channels": (32, 16, 8)} if name == "Unet" else {}
    model = getattr(smp, name)("resnet18", encoder_weights=None, encoder_depth=3, **options)
    x = torch.randn(4, 3, 64, 64)

    def operations() -> list[str]:
        return [node.op for node in ModelGraph.from_model(model, x).nodes]

    before = operations()
    equalize_scales(model, [x], mode=mode, border="ignore")  # type: ignore[arg-type]
    explicit = operations()
    if mode == "explicit":
        equalizers = sum(isinstance(module, ScaleEqualizer) for module in model.modules())
        assert len(explicit) == len(before) + equalizers
        fold(model, border="ignore")
    assert operations() == before


def test_fold_refuses_what_it_cannot_read() -> None:
    with pytest.raises(NothingMatchedError):
        fold(OwnDecoder())
    model = OwnDecoder()
    insert_equalizers(model, images()[0])
    assert "never calibrated" in str(fold(model))
    with pytest.raises(ConfigError, match="unknown border"):
        fold(model, border="reflect")  # type: ignore[arg-type]


@pytest.mark.parametrize(("host", "target"), [("a.b", "a.b"), ("a.b.0", "a.b.1"), ("a.drop", "head.0"), ("fuse", "norm"), ("a", "a.b.c")])
def test_relative_paths_survive_wrapping(host: str, target: str) -> None:
    relative = relative_path(host, target)
    assert resolve_path(host, relative) == target
    assert resolve_path(f"net.{host}", relative) == f"net.{target}"
