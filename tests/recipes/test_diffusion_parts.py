import math

import pytest
import scipy.linalg
import torch
from torch import Tensor

from pl_normkit.errors import ConfigError, DataError
from pl_normkit.graph import ModelGraph
from pl_normkit.methods.timestep_embedding import find_time_injections
from pl_normkit.recipes.diffusion import DiffusionModule, DigitImages, FrechetDistance, NoiseSchedule, UNet, frechet_distance


def test_samples_of_the_best_predictor_have_the_distribution_of_the_data():
    """Of independent normal pixels the best prediction of the noise is known in closed form."""
    schedule, mean, deviation = NoiseSchedule(500), 0.2, 0.1
    kept = schedule.kept.float()

    def predict(x: Tensor, times: Tensor) -> Tensor:
        a = kept[times].view(-1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * deviation**2 + 1 - a)

    samples = schedule.sample(predict, torch.randn(4000, 501, 2, generator=torch.Generator().manual_seed(0)))

    assert float(samples.mean()) == pytest.approx(mean, abs=4 * deviation / math.sqrt(8000))
    assert float(samples.std()) == pytest.approx(deviation, rel=0.05)


def test_noise_grows_from_almost_none_to_almost_all():
    kept = NoiseSchedule(200).kept
    assert bool((kept.diff() < 0).all())
    assert (float(kept[0]) > 0.999, float(kept[-1]) < 1e-4) == (True, True)
    noisy = NoiseSchedule(200).add_noise(torch.ones(4000, 1), torch.randn(4000, 1), torch.full((4000,), 120))
    assert float(noisy.mean() ** 2 / noisy.square().mean()) == pytest.approx(float(kept[120]), abs=0.04)


def test_the_frechet_distance_is_that_of_matrix_square_roots():
    one, two = (torch.randn(60, 5, generator=torch.Generator().manual_seed(seed)).double() @ torch.randn(5, 5).double() for seed in (1, 2))
    first, second = one.T.cov(), two.T.cov()
    root = scipy.linalg.sqrtm((first @ second).numpy()).real
    expected = float((one.mean(0) - two.mean(0)).square().sum() + first.trace() + second.trace()) - 2 * root.trace()

    assert frechet_distance(one.mean(0), first, two.mean(0), second) == pytest.approx(expected)

    metric = FrechetDistance(5)
    for real, made in zip(one.split(13), two.split(13), strict=True):
        metric.update(real, made)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-6)


def test_a_distance_of_values_that_are_not_finite_is_nan():
    metric = FrechetDistance(2)
    metric.update(torch.randn(4, 2), torch.tensor([[0.0, math.nan]] * 4))
    assert math.isnan(metric.compute())


@pytest.mark.parametrize(
    ("norm", "injection", "expected"),
    [
        ("group", "add", [("add", 0.75), ("add", 0.875), ("add", 0.875), ("add", 0.75)]),
        ("instance", "add", [("add", 0.0)] * 4),
        ("layer", "add", [("add", 1.0)] * 4),
        ("batch", "add", [("add", 1.0)] * 4),
        ("instance", "after_norm", []),
        ("instance", "film", []),
    ],
)
def test_where_the_time_enters(norm, injection, expected):
    network = UNet(channels=32, norm=norm, injection=injection)
    graph = ModelGraph.from_model(network, (torch.randn(2, 1, 8, 8), torch.tensor([0, 5])))
    found = [(each.kind, norm.kept) for each in find_time_injections(graph) for norm in each.norms if norm.module.endswith("norm2")]
    assert found == expected


@pytest.mark.parametrize("injection", ["add", "positional", "after_norm", "film"])
@torch.no_grad()
def test_a_network_of_instance_norms_sees_the_time_unless_it_is_added_before_them(injection):
    """Circular padding, and the convolution's output right behind the norm: what is left of the time there is rounding."""
    torch.manual_seed(0)
    block = UNet(channels=16, norm="instance", injection=injection).down
    embedding, x = torch.randn(2, 64), torch.randn(1, 16, 8, 8)
    for conv in (block.conv1, block.conv2):
        conv.padding_mode = "circular"
    one, two = (block(x, embedding[index : index + 1]) for index in (0, 1))
    assert (float((one - two).square().mean()) < 1e-10) == (injection == "add")


def test_samples_do_not_depend_on_how_they_are_batched():
    module = DiffusionModule(["a"], channels=8, steps=6, sample_steps=3)
    together = module.sample([0, 1, 7])
    assert torch.allclose(together[2:], module.sample([7]), atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_odd_sizes_and_colours():
    module = DiffusionModule(["a"], image_size=7, in_chans=3, channels=8, steps=4, sample_steps=1)
    assert module.sample([0]).shape == module(*module.example_input_array)[:1].shape == (1, 3, 7, 7)


def test_the_classifier_knows_digits_and_leaves_the_random_state():
    data = DigitImages()
    state = torch.get_rng_state()
    data.setup("validate")

    assert data.scorer is not None
    assert data.scorer.accuracy > 0.97
    assert 0 < data.scorer.floor < 1
    assert torch.equal(torch.get_rng_state(), state)


def test_digits_are_scaled_to_one():
    data = DigitImages()
    data.sources.update(data.build_sources(("train", "val", "test")))
    images = data.sources["train"][0]
    assert {part: len(source[1]) for part, source in data.sources.items()} == {"train": 1079, "val": 359, "test": 359}
    assert (images.shape[1:], float(images.min()), float(images.max())) == ((1, 8, 8), -1.0, 1.0)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"channels": 3}, "--model.channels"),
        ({"norm": "grup"}, "--model.norm"),
        ({"injection": "none"}, "--model.injection"),
        ({"groups": 0}, "--model.groups"),
        ({"steps": 0}, "--model.steps"),
        ({"sample_steps": 300}, "--model.sample_steps"),
        ({"lr": 0.0}, "--model.lr"),
        ({"ema_decay": 1.0}, "--model.ema_decay"),
    ],
)
def test_options_that_make_no_model(options, where):
    with pytest.raises(ConfigError) as caught:
        DiffusionModule(["a"], **options)
    assert caught.value.where == where


@pytest.mark.parametrize("options", [{"samples": 0}, {"image_size": 2}, {"batch_size": 0}])
def test_options_that_make_no_data(options):
    with pytest.raises(DataError, match=next(iter(options))):
        DigitImages(**options)


def test_half_precision_under_autocast_and_a_scaler():
    """As 16-mixed does on a GPU."""
    torch.manual_seed(0)
    module = DiffusionModule(["a"], channels=8)
    images, noise, times = torch.rand(8, 1, 8, 8) * 2 - 1, torch.randn(8, 1, 8, 8), torch.arange(8) * 25
    exact = module._loss(images, noise, times)
    scaler = torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", torch.float16):
        loss = module._loss(images, noise, times)
    scaler.scale(loss).backward()

    assert (loss.dtype, loss.item()) == (torch.float32, pytest.approx(exact.item(), rel=1e-2))
    assert all(bool(parameter.grad.isfinite().all()) for parameter in module.network.parameters())
