"""The probe against the numbers of closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from pl_normkit.errors import ConfigError, DataError, NothingMatchedError
from pl_normkit.methods.positional_variance import VarianceReport, measure_positional_variance
from pl_normkit.methods.positional_variance.find import added_positions, trace_site
from pl_normkit.methods.positional_variance.measure import TOLERANCE
from tests.methods.positional_variance.images import MODELS, SIZE, normal_images, vit


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return vit()


def rho(model: nn.Module, train: Tensor, evaluation: Tensor) -> float:
    return measure_positional_variance(model, [train], [evaluation]).rho


@pytest.mark.parametrize(("build", "parameter", "first"), MODELS.values(), ids=MODELS)
def test_the_site_is_found_and_the_ratio_measured(build: Any, parameter: str, first: int) -> None:
    """Half the image has a quarter of its second moment; convolutions without bias would give that exactly."""
    model = build().eval()
    images = normal_images(8)
    site = trace_site(model, (images,))
    assert (site.parameter, site.first, site.count, site.grid, site.is_resampled) == (parameter, first, 16, (4, 4), False)
    report = measure_positional_variance(model, [images * 0.5], [(images, torch.zeros(8))])
    assert report.rho == pytest.approx(0.25, abs=0.005)
    positions = model.get_parameter(parameter).detach().reshape(-1, site.width)[-16:]
    assert report.train.positions == report.evaluation.positions == pytest.approx(float(positions.double().var(-1, correction=0).mean()))
    assert report.evaluation.images.mean == pytest.approx(images.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert report.evaluation.images.second_moment == pytest.approx(images.square().mean((0, 2, 3)).tolist(), rel=1e-5)


def test_tokens_and_positions_are_what_the_model_adds(model: nn.Module) -> None:
    images = normal_images(4)
    report = measure_positional_variance(model, [images], [images])
    tokens = model.patch_embed(images).detach().double()
    assert report.train.tokens == pytest.approx(float(tokens.var(-1, correction=0).mean()), rel=1e-5)
    assert report.train.ratio == pytest.approx(report.train.tokens / report.train.positions)
    assert (report.rho, report.balance) == (1.0, 1.0)


@pytest.mark.parametrize("lam", [0.5, 0.7, 0.9])
def test_mixup_has_the_ratio_of_its_weights(model: nn.Module, lam: float) -> None:
    images = normal_images(64)
    assert rho(model, images * lam + images.flip(0) * (1 - lam), images) == pytest.approx(lam**2 + (1 - lam) ** 2, rel=0.01)


def test_cutmix_of_timm_keeps_the_ratio(model: nn.Module) -> None:
    images = normal_images(64)
    mixup = Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, mode="elem", num_classes=10)
    assert rho(model, mixup(images.clone(), torch.zeros(64))[0], images) == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("mode", ["const", "pixel"])
def test_erasing_has_the_ratio_of_its_area(model: nn.Module, mode: str, scale: float) -> None:
    """1 - f for constants, 1 - f + f / E[I^2] for noise."""
    images = normal_images(64) * scale
    erased = RandomErasing(probability=1.0, mode=mode, device="cpu")(images.clone())
    area = float((erased != images).any(1).float().mean())
    expected = 1 - area + (area / scale**2 if mode == "pixel" else 0.0)
    assert rho(model, erased, images) == pytest.approx(expected, rel=0.02)


@settings(max_examples=10, deadline=None)
@given(scale=st.floats(0.3, 3.0))
def test_the_ratio_is_that_of_second_moments(scale: float) -> None:
    conv = _WithPositions(bias=False)
    images = normal_images(2, 16)
    assert rho(conv, images * scale, images) == pytest.approx(scale**2, rel=1e-4)


class _WithPositions(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4, bias=bias)
        self.where = nn.Parameter(torch.randn(16, 8))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.embed(pixels).flatten(2).transpose(1, 2) + self.where


def as_tensor(images: Tensor) -> Any:
    return images


def as_tuple(images: Tensor) -> Any:
    return images, torch.zeros(len(images))


def as_dict(images: Tensor) -> Any:
    return {"labels": torch.zeros(len(images)), "pixels": images}


def as_unnamed_dict(images: Tensor) -> Any:
    return {"target": torch.zeros(len(images)), "image": images}


@pytest.mark.parametrize("pack", [as_tensor, as_tuple, as_dict, as_unnamed_dict])
def test_batches_of_many_forms(pack: Any) -> None:
    model, images = _WithPositions(), normal_images(4, 16)
    expected = measure_positional_variance(model, [images], [images * 2])
    assert measure_positional_variance(model, [pack(images)], [pack(images * 2)]) == expected


def test_streaming_in_batches_equals_one_batch(model: nn.Module) -> None:
    images = normal_images(8)
    once = measure_positional_variance(model, [images], [images])
    parts = measure_positional_variance(model, images.split(2), iter(images.split(4)))
    assert parts.train.tokens == pytest.approx(once.train.tokens, rel=1e-6)
    assert parts.train.images.mean == pytest.approx(once.train.images.mean, abs=1e-6)
    assert (parts.train.batches, parts.evaluation.batches) == (4, 2)
    assert measure_positional_variance(model, images.split(2), [images], max_batches=3).train.batches == 3


def test_images_that_are_not_square_and_sizes_that_differ() -> None:
    """The balance also counts what interpolation takes from the positions."""
    model = vit(img_size=(32, 64), dynamic_img_size=True)
    images = normal_images(8, (32, 64))
    assert trace_site(model, (images,)).grid == (2, 4)
    report = measure_positional_variance(model, [images], [normal_images(8, (64, 96))])
    assert report.rho == pytest.approx(1.0, abs=0.02)
    assert report.evaluation.positions < 0.85 * report.train.positions
    assert report.balance == pytest.approx(report.rho * report.evaluation.positions / report.train.positions)
    assert f"resample differently: {report.balance:.3f}" in str(report)


def test_positions_are_read_as_the_forward_pass_resamples_them() -> None:
    model = vit(img_size=32, dynamic_img_size=True).eval()
    site = trace_site(model, (normal_images(1),))
    with torch.no_grad():
        blank = torch.zeros(1, 4, 4, 192)
        expected = model._pos_embed(blank)[0] - torch.cat([model.cls_token[0], torch.zeros(16, 192)])
    assert site.is_resampled
    torch.testing.assert_close(added_positions(model, site), expected)


def test_everything_is_as_before() -> None:
    model = vit(norm_layer=nn.LayerNorm).train()
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(normal_images(8)), batch_size=2, shuffle=True, generator=generator)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = (torch.get_rng_state(), generator.get_state(), model.training, model.patch_embed.proj._forward_hooks.copy())
    measure_positional_variance(model, loader, loader)
    after = (torch.get_rng_state(), generator.get_state(), model.training, model.patch_embed.proj._forward_hooks.copy())
    assert [torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, after, strict=True)] == [True] * 4
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_generators_behind_a_prefetcher_are_as_before(model: nn.Module) -> None:
    class Prefetcher:
        def __init__(self, loader: Any) -> None:
            self.loader = loader

        def __iter__(self) -> Any:
            return iter(self.loader)

    generator, data = torch.Generator().manual_seed(3), TensorDataset(normal_images(4))
    sampler = RandomSampler(data, generator=generator)
    before = generator.get_state()
    measure_positional_variance(model, Prefetcher(DataLoader(data, batch_size=2, sampler=sampler)), [normal_images(2)])
    assert torch.equal(generator.get_state(), before)


class _NormOfMaps(nn.LayerNorm):
    """As timm's LayerNorm2d: its norm is over the last dimension, its output has the channels first."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_a_module_that_goes_on_after_its_norm_is_not_mistaken_for_the_tokens() -> None:
    model = _WithPositions()
    model.embed = nn.Sequential(model.embed, _NormOfMaps(8))  # type: ignore[assignment]
    with pytest.raises(NothingMatchedError):
        measure_positional_variance(model, [normal_images(2, 16)], [normal_images(2, 16)])


def test_only_the_patch_embedding_runs(model: nn.Module) -> None:
    calls: list[int] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    images = normal_images(2)
    trace_site(model, (images,))
    traced = len(calls)
    measure_positional_variance(model, [images] * 3, [images] * 3)
    handle.remove()
    assert len(calls) == 3 * traced  # one trace for each loader


@pytest.mark.parametrize(
    "build",
    [
        lambda: timm.create_model("resnet18"),
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=SIZE, window_size=2, depths=(1, 1, 1, 1)),
        lambda: vit("beit_base_patch16_224"),  # relative positions
        lambda: nn.Conv2d(3, 8, 4),
    ],
)
def test_a_model_without_absolute_positions_is_refused(build: Any) -> None:
    with pytest.raises(NothingMatchedError, match="adds no absolute positional embedding to patch tokens"):
        measure_positional_variance(build(), [normal_images(2)], [normal_images(2)])


@pytest.mark.parametrize(
    ("train", "evaluation", "options", "error", "message"),
    [
        ([], [normal_images(2)], {}, DataError, "the loader gave no batch"),
        ([normal_images(2)], [], {}, DataError, "the loader gave no batch"),
        ([torch.zeros(2, 3, 64, 64, dtype=torch.uint8)], [normal_images(2)], {}, DataError, "no normalised images"),
        ([torch.zeros(2, 5)], [normal_images(2)], {}, DataError, "no normalised images"),
        ([normal_images(2)], [torch.zeros(2, 3, 64, 64)], {}, DataError, "constant"),
        ([normal_images(2) * torch.nan], [normal_images(2)], {}, DataError, "not finite\n  where: train_loader"),
        ([normal_images(2)], [normal_images(2) / 0.0], {}, DataError, "not finite\n  where: eval_loader"),
        ([normal_images(2)], [normal_images(2)], {"max_batches": 0}, ConfigError, "at least 1"),
    ],
)
def test_data_that_cannot_be_measured(model: nn.Module, train: Any, evaluation: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        measure_positional_variance(model, train, evaluation, **options)


def test_the_report_speaks(model: nn.Module) -> None:
    images = normal_images(16)
    report = measure_positional_variance(model, images.split(4), (images * 0.7).split(4))
    assert isinstance(report, VarianceReport)
    assert (report.fits(), report.estimate.is_off(TOLERANCE)) == (False, True)
    assert "Var[X_train] / Var[X_eval] = 2.0" in str(report)
    assert measure_positional_variance(model, [images], [images]).fits()


def test_the_error_counts_what_images_of_a_batch_share(model: nn.Module) -> None:
    """Images alike, batches of other contrast: the standard error is that of few batches, not of many images."""
    batches = [normal_images(8) * contrast for contrast in (0.5, 1.0, 1.5, 2.0)]
    variances = torch.tensor([float(model.patch_embed(batch).detach().double().var(-1, correction=0).mean()) for batch in batches])
    report = measure_positional_variance(model, batches, batches)
    assert report.train.error == pytest.approx(float(variances.std() / 2), rel=0.05)
