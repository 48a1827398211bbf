"""The effective receptive field: exact against one image at a time, the right unit of each network, the numbers read from a map."""

from __future__ import annotations

import math
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3Decoder
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.errors import ConfigError, DataError
from pl_normkit.receptive_field import ReceptiveField, effective_receptive_field
from tests.receptive_field_maps import images


def one_at_a_time(model: nn.Module, batch: Tensor, value: Any, *, absolute: bool = False) -> Tensor:
    """The definition, literally: per image the channel mean of the gradient, clamped, summed, normalized."""
    model.eval()
    total = torch.zeros(batch.shape[2:], dtype=torch.float64)
    for image in batch:
        x = image[None].clone().requires_grad_()
        (grad,) = torch.autograd.grad(value(model, x), x)
        mean = grad[0].mean(0)
        total += (mean.abs() if absolute else mean.clamp(min=0)).double()
    return total / total.sum()


# Real networks: the unit that is looked at, and agreement with the definition.


def vit(size: int = 64) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=size, depth=2)


NETWORKS: dict[str, tuple[Any, str, tuple[int, int], tuple[int, int], Any]] = {
    "timm resnet": (
        lambda: timm.create_model("resnet18"),
        "forward_features",
        (2, 2),
        (1, 1),
        lambda m, x: m.forward_features(x)[0, :, 1, 1].mean(),
    ),
    "torchvision resnet": (torchvision.models.resnet18, "layer4", (2, 2), (1, 1), None),
    "torchvision efficientnet": (
        torchvision.models.efficientnet_b0,
        "features",
        (2, 2),
        (1, 1),
        lambda m, x: m.features(x)[0, :, 1, 1].mean(),
    ),
    "timm vit": (vit, "forward_features", (4, 4), (1, 1), lambda m, x: m.forward_features(x)[0, 1 + 5].mean()),
    "timm distilled": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=2),
        "forward_features",
        (4, 4),
        (1, 1),
        lambda m, x: m.forward_features(x)[0, 2 + 5].mean(),
    ),
    "timm swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=64, depths=(1, 1, 1), embed_dim=24),
        "forward_features",
        (4, 4),
        (1, 1),
        lambda m, x: m.forward_features(x)[0, 1, 1].mean(),
    ),
    "torchvision vit": (
        lambda: torchvision.models.VisionTransformer(64, 16, 2, 2, 16, 32),
        "encoder",
        (4, 4),
        (1, 1),
        lambda m, x: m.encoder(torch.cat([m.class_token.expand(1, -1, -1), m._process_input(x)], 1))[0, 1 + 5].mean(),
    ),
    "smp unet": (lambda: smp.Unet("resnet18", encoder_weights=None), "", (64, 64), (32, 32), lambda m, x: m(x)[0, :, 32, 32].mean()),
    "torchvision deeplab": (
        lambda: torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None),
        "",
        (64, 64),
        (32, 32),
        lambda m, x: m(x)["out"][0, :, 32, 32].mean(),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_unit_and_its_map(name: str) -> None:
    build, layer, grid, position, value = NETWORKS[name]
    torch.manual_seed(0)
    model = build()
    field = effective_receptive_field(model, images(), batch_size=2)
    assert (field.layer, field.grid, field.position, field.images) == (layer, grid, position, 3)
    assert float(field.map.sum()) == pytest.approx(1, abs=1e-9)
    if value is not None:
        expected = one_at_a_time(model, images(), value)
        torch.testing.assert_close(field.map, expected, rtol=1e-4, atol=float(expected.max()) * 1e-6)


def test_agreement_with_one_image_at_a_time_to_1e_6() -> None:
    """In double precision nothing but the order of sums differs."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18").double()
    expected = one_at_a_time(model, images(5).double(), lambda m, x: m.forward_features(x)[0, :, 1, 1].mean())
    field = effective_receptive_field(model, DataLoader(TensorDataset(images(5).double()), batch_size=2), batch_size=3)
    torch.testing.assert_close(field.map, expected, rtol=1e-6, atol=1e-15)


def test_transformers_tokens_and_maps() -> None:
    transformers = pytest.importorskip("transformers")
    options = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    classifier = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=64, **options))
    field = effective_receptive_field(classifier, images())
    assert (field.grid, field.position) == ((4, 4), (1, 1))
    config = transformers.SegformerConfig(depths=[1] * 4, hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1] * 4, decoder_hidden_size=8)
    field = effective_receptive_field(transformers.SegformerForSemanticSegmentation(config), images())
    assert (field.layer, field.grid, field.position) == ("", (16, 16), (8, 8))


class Tokens(nn.Module):
    """`prefix` tokens, then a grid of patches; each token is its patch's mean."""

    def __init__(self, patch: int, prefix: int) -> None:
        super().__init__()
        self.patch = nn.AvgPool2d(patch)
        self.extra = nn.Parameter(torch.zeros(1, prefix, 3))
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).mT
        return self.norm(torch.cat([self.extra.expand(len(x), -1, -1), tokens], 1)).mean(1)


@pytest.mark.parametrize(
    ("side", "prefix", "token"), [(14, 0, 90), (7, 0, 24), (16, 0, 119), (24, 0, 275), (14, 1, 90), (14, 2, 90), (16, 5, 119), (7, 1, 24)]
)
def test_the_token_rule(side: int, prefix: int, token: int) -> None:
    """T tokens without the prefix: T // 2 - ((T + 1) mod 2) * (g // 2 + 1); the mass lies on that token's patch alone."""
    assert side * side // 2 - (side * side + 1) % 2 * (side // 2 + 1) == token
    field = effective_receptive_field(Tokens(4, prefix), images(1, (4 * side, 4 * side)), "norm")
    assert (field.grid, field.position) == ((side, side), divmod(token, side))
    rows, columns = field.map.nonzero().T // 4
    assert (set(rows.tolist()), set(columns.tolist())) == ({token // side}, {token % side})


@pytest.mark.parametrize(("size", "grid"), [((32, 64), (8, 16)), ((64, 24), (16, 6))])
@pytest.mark.parametrize("prefix", [0, 1])
def test_grids_that_are_not_square(size: tuple[int, int], grid: tuple[int, int], prefix: int) -> None:
    field = effective_receptive_field(Tokens(4, prefix), images(1, size), "norm", position=(3, 5))
    assert (field.grid, field.unit) == (grid, (13.5, 21.5))
    assert field.mass_within(2.2) == pytest.approx(1)


# The definition.


class Plain(nn.Module):
    """One 3x3 convolution, a module that runs twice, and class scores behind a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.Tanh()
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.unused = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(self.drop(self.act(self.norm(self.conv(x))[:, :3])))).mean((2, 3))


def test_channels_are_averaged_before_the_clamp() -> None:
    """Gradients +1, +1, -3 average to a negative number: clamped first, they would not."""
    model = nn.Conv2d(3, 1, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([1.0, 1.0, -3.0])[None, :, None, None])
    assert effective_receptive_field(model, images()).map.count_nonzero() == 0
    field = effective_receptive_field(model, images(), gradient="absolute")
    assert field.map.nonzero().tolist() == [[32, 32]]
    assert float(field.map.sum()) == 1


def test_an_empty_map_has_no_radius() -> None:
    field = effective_receptive_field(nn.Conv2d(3, 1, 1, bias=False).requires_grad_(False), images(), gradient="absolute")
    empty = ReceptiveField(field.map * 0, "", (64, 64), (32, 32), 3)
    assert math.isnan(empty.radius_holding(0.5))
    assert (empty.mass_within(100), empty.area_share(), empty.metrics()["Gaussian r^2"]) == (0, 0, None)
    assert "nan" in str(empty)
    assert int(empty.picture().max(axis=(0, 1))[0]) >= 0


def test_the_last_call_of_a_shared_module_counts() -> None:
    model = Plain()
    field = effective_receptive_field(model, images(2, (9, 9)), gradient="absolute")
    assert (field.layer, field.grid) == ("act", (9, 9))
    assert field.map.count_nonzero() == 25  # two 3x3 convolutions
    assert effective_receptive_field(model, images(2, (9, 9)), "norm", gradient="absolute").map.count_nonzero() == 9


def test_everything_is_as_before() -> None:
    model = Plain().train()
    model.drop.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        effective_receptive_field(model, images(2, (9, 9)))
    assert (model.training, model.norm.training, model.drop.training) == (True, True, False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert [parameter.grad for parameter in model.parameters()] == [None] * len(list(model.parameters()))
    assert all(not module._forward_hooks for module in model.modules())


def test_frozen_parameters_and_inference_mode_change_nothing() -> None:
    model = Plain()
    expected = effective_receptive_field(model, images(2, (9, 9))).map
    with torch.inference_mode():
        inferred = effective_receptive_field(model, images(2, (9, 9))).map
    frozen = effective_receptive_field(model.requires_grad_(False), images(2, (9, 9))).map
    assert torch.equal(expected, frozen)
    assert torch.equal(expected, inferred)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_do_not_matter(batch_size: int) -> None:
    model, batch = Plain().double(), images(5, (9, 9)).double()
    expected = effective_receptive_field(model, batch, batch_size=16).map
    torch.testing.assert_close(effective_receptive_field(model, batch, batch_size=batch_size).map, expected, rtol=1e-9, atol=1e-15)


def test_a_model_that_views_its_input_flat_is_measured_too() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x.view(len(x), -1).view(x.shape))
            return out

    model, batch = Flat(), images(3, (9, 9))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        model(batch.contiguous(memory_format=torch.channels_last))
    expected = one_at_a_time(model, batch, lambda m, x: m(x)[0, :, 4, 4].mean())
    torch.testing.assert_close(effective_receptive_field(model, batch).map, expected, rtol=0, atol=1e-6)


def test_every_kind_of_loader() -> None:
    model, batch = Plain(), images(4, (9, 9))
    expected = effective_receptive_field(model, batch).map
    labels = torch.zeros(4)
    loaders: list[Any] = [
        DataLoader(TensorDataset(batch, labels), batch_size=3),
        TensorDataset(batch, labels),
        [{"label": labels, "mask": batch * 0, "image": batch}],
        [(batch[:2],), [batch[2:]]],
        (image for image in batch),
        batch.double(),
    ]
    for loader in loaders:
        assert torch.equal(expected, effective_receptive_field(model, loader).map)
    endless = iter(lambda: batch, None)
    assert effective_receptive_field(model, endless, max_images=7).images == 7


BAD = {
    "empty": ([], {}, DataError, "there are no images"),
    "no images": ([{"tokens": torch.zeros(2, 4, dtype=torch.long)}], {}, DataError, "a batch holds no images"),
    "bytes": (torch.zeros(1, 3, 9, 9, dtype=torch.uint8), {}, DataError, "give floating-point images"),
    "sizes": ([images(1, (9, 9)), images(1, (8, 9))], {}, DataError, "several sizes"),
    "nan": ([images(1, (9, 9)), images(1, (9, 9)) * math.nan], {}, DataError, "where: image 1"),
    "layer": (images(1, (9, 9)), {"layer": "nrm"}, ConfigError, "did you mean 'norm'"),
    "unused": (images(1, (9, 9)), {"layer": "unused"}, ConfigError, "is not called"),
    "position": (images(1, (9, 9)), {"position": (9, 0)}, ConfigError, "9 x 9 cells"),
    "gradient": (images(1, (9, 9)), {"gradient": "signed"}, ConfigError, "'signed' is not known"),
    "limit": (images(1, (9, 9)), {"max_images": 0}, ConfigError, "max_images"),
    "batch size": (images(1, (9, 9)), {"batch_size": 1.5}, ConfigError, "batch_size"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    loader, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        effective_receptive_field(Plain(), loader, **options)


def test_models_that_cannot_be_measured() -> None:
    class Detached(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    class NoMap(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2, 3))

    with pytest.raises(ConfigError, match="meta device"):
        effective_receptive_field(Plain().to("meta"), images(1, (9, 9)))
    for model in (Detached(), NoMap()):
        with pytest.raises(ConfigError, match=r"no layer|does not depend"):
            effective_receptive_field(model, images(1, (9, 9)))


# The star of ASPP.


class Star(nn.Module):
    """smp's DeepLabV3 decoder on one convolution per cell; the pooled branch, which spreads mass everywhere, is switched off."""

    def __init__(self, rates: tuple[int, int, int], stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.encoder = nn.Conv2d(3, 8, stride, stride)
        self.decoder = DeepLabV3Decoder(8, 8, rates, aspp_separable=False, aspp_dropout=0.0)
        self.head = nn.Conv2d(8, 2, 1)
        nn.init.zeros_(self.decoder.aspp.convs[4][1].weight)

    def forward(self, image: Tensor) -> Tensor:
        return F.interpolate(self.head(self.decoder([self.encoder(image)])), scale_factor=float(self.stride), mode="bilinear")


def star(rates: tuple[int, int, int], stride: int, cells: int) -> tuple[ReceptiveField, set[int]]:
    """The field, and the Chebyshev distances in cells at which the mass of a ring is above 2 % of the largest cell's."""
    torch.manual_seed(0)
    field = effective_receptive_field(Star(rates, stride), images(8, (stride * cells, stride * cells)), gradient="absolute")
    mass = field.map.reshape(cells, stride, cells, stride).sum((1, 3))
    away = (torch.arange(cells) - field._cell(stride)[0]).abs()
    distance = torch.maximum(away[:, None], away[None])
    return field, set(distance[mass > 0.02 * mass.max()].tolist())


def test_the_star_of_rates_10_20_30() -> None:
    field, distances = star((10, 20, 30), 8, 64)
    assert distances <= {0, 1, 2, *range(8, 13), *range(18, 23), *range(28, 33)}
    assert {0, 10, 20, 30} <= distances
    assert field.star_taps_outside((10, 20, 30), 8) == 0
    assert field.star_mass((10, 20, 30), 8, reach=2) == pytest.approx(1, abs=1e-6)
    assert field.star_mass((10, 20, 30), 8) < 0.7
    assert field.star_mass((5, 15, 25), 8, reach=2) < 0.5


def test_a_truncated_star() -> None:
    field, distances = star((6, 12, 18), 16, 32)
    assert distances <= {0, 1, 2, *range(4, 9), *range(10, 15)}
    assert {0, 6, 12} <= distances
    assert field.star_taps_outside((6, 12, 18), 16) == pytest.approx(1 / 3)


def test_star_mask_by_hand() -> None:
    field = ReceptiveField(torch.full((10, 10), 0.01, dtype=torch.float64), "", (5, 5), (2, 2), 1)
    mask = field.star_mask((2, 9), stride=2)
    cells = {(y, x) for y in (0, 2, 4) for x in (0, 2, 4)}
    assert {(y // 2, x // 2) for y, x in mask.nonzero().tolist()} == cells
    assert (int(mask.sum()), field.star_taps_outside((2, 9), 2)) == (36, 0.5)
