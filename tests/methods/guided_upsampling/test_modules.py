"""The filter against unfolded patches, DKN against 16 shifted passes of its strided form, counts of parameters."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, DataError
from pl_normkit.nn import DeformableKernelNetwork, JointFilter


def by_patches(core: JointFilter, weights: Tensor, offsets: Tensor, target: Tensor) -> Tensor:
    """Every sample computed by hand: four pixels around it, zero outside the image."""
    n, _, height, width = target.shape
    taps = core.taps(weights)
    out = target.clone() if core.residual else torch.zeros_like(target)
    half = core.kernel_size // 2
    for b, q, y, x in itertools.product(range(n), range(taps.shape[1]), range(height), range(width)):
        dx, dy = offsets[b, q, :, y, x].clamp(-core.reach, core.reach)
        at_y, at_x = y + q // core.kernel_size - half + float(dy), x + q % core.kernel_size - half + float(dx)
        for row, column in itertools.product((int(at_y // 1), int(at_y // 1) + 1), (int(at_x // 1), int(at_x // 1) + 1)):
            if 0 <= row < height and 0 <= column < width:
                share = (1 - abs(at_y - row)) * (1 - abs(at_x - column))
                out[b, :, y, x] += taps[b, q, y, x] * share * target[b, :, row, column]
    return out


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("kernel_size", "filter_size"), [(3, 15), (3, 5), (1, 3), (5, 7)])
def test_the_core_is_a_sum_of_bilinear_samples(kernel_size: int, filter_size: int, residual: bool) -> None:
    core = JointFilter(kernel_size, filter_size, residual)
    count = kernel_size**2
    weights, offsets = torch.rand(2, count, 5, 7, dtype=torch.float64), 4 * torch.randn(2, count, 2, 5, 7, dtype=torch.float64)
    target = torch.randn(2, 2, 5, 7, dtype=torch.float64)
    assert torch.allclose(core(weights, offsets, target), by_patches(core, weights, offsets, target), atol=1e-10)


def test_gradients_by_finite_differences() -> None:
    core = JointFilter(3, 7)
    shapes = [(1, 9, 3, 4), (1, 9, 2, 3, 4), (1, 1, 3, 4)]
    inputs = [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(core, inputs)


def test_a_delta_on_the_centre_tap_is_the_identity() -> None:
    """The half-pixel test: fails where samples are shifted against pixel centres."""
    core = JointFilter(residual=False)
    weights = torch.zeros(1, 9, 6, 9)
    weights[:, 4] = 1
    target = torch.randn(1, 1, 6, 9)
    assert torch.allclose(core(weights, torch.zeros(1, 9, 2, 6, 9), target), target, atol=1e-6)


def test_a_flat_target_stays_flat_away_from_the_border() -> None:
    core = JointFilter()
    target = torch.full((1, 1, 30, 30), 2.5)
    out = core(torch.rand(1, 9, 30, 30), 3 * torch.randn(1, 9, 2, 30, 30), target)
    assert torch.allclose(out[..., 8:-8, 8:-8], target[..., 8:-8, 8:-8], atol=1e-5)


def test_half_precision_addresses_every_pixel() -> None:
    core = JointFilter(residual=False)
    weights = torch.zeros(1, 9, 2, 3000, dtype=torch.bfloat16)
    weights[:, 4] = 1
    target = torch.arange(6000.0).view(1, 1, 2, 3000).bfloat16()
    assert torch.equal(core(weights, torch.zeros_like(weights)[:, :, None].expand(-1, -1, 2, -1, -1), target), target)


@pytest.mark.parametrize(("fast", "count"), [(False, 1_158_070), (True, 693_856)])
def test_the_number_of_parameters(fast: bool, count: int) -> None:
    assert sum(parameter.numel() for parameter in DeformableKernelNetwork(fast).parameters()) == count


def strided(features: nn.Sequential) -> nn.Sequential:
    """The public form with the very same weights: stride where the one-pass form dilates."""
    layers: list[nn.Module] = []
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            twin = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, stride=2 if layer.kernel_size == (2, 2) else 1)
            twin.weight, twin.bias = layer.weight, layer.bias
            layers.append(twin)
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("size", [(8, 12), (4, 4)])
def test_one_pass_equals_sixteen_shifted_ones(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = DeformableKernelNetwork().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    branch = network.guidance
    image = torch.rand(1, 3, *size)
    weights, offsets = branch(image)
    features = strided(branch.features)
    expected_weights, expected_offsets = torch.empty_like(weights), torch.empty_like(offsets)
    for i, j in itertools.product(range(4), range(4)):
        passed = features(F.pad(image, (25 - j, 22 + j, 25 - i, 22 + i)))
        expected_weights[..., i::4, j::4] = branch.weights(passed).sigmoid()
        expected_offsets[..., i::4, j::4] = branch.offsets(passed)
    assert torch.allclose(weights, expected_weights, atol=1e-5)
    assert torch.allclose(offsets, expected_offsets, atol=1e-5)


def test_the_receptive_field_is_fifty_pixels() -> None:
    branch = DeformableKernelNetwork().eval().guidance
    image = torch.rand(1, 3, 70, 70, requires_grad=True)
    branch(image)[1][0, :, 35, 35].sum().backward()
    assert image.grad is not None
    rows = image.grad[0].abs().sum((0, 2)).nonzero().flatten()
    assert (int(rows.min()), int(rows.max())) == (10, 59)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("size", [(13, 18), (16, 16)])
def test_any_size_and_any_number_of_channels(fast: bool, size: tuple[int, int]) -> None:
    """Channels are filtered alone: each comes out as it would by itself."""
    torch.manual_seed(0)
    network = DeformableKernelNetwork(fast).eval()
    guidance, target = torch.rand(2, 3, *size), torch.rand(2, 3, *size)
    out = network(guidance, target)
    assert out.shape == target.shape
    for channel in range(3):
        assert torch.allclose(out[:, channel : channel + 1], network(guidance, target[:, channel : channel + 1]), atol=1e-5)


def test_bad_inputs_are_named() -> None:
    network = DeformableKernelNetwork(fast=True)
    for guidance, target in [((1, 3, 8, 8), (1, 1, 4, 4)), ((1, 1, 8, 8), (1, 1, 8, 8)), ((3, 8, 8), (1, 8, 8))]:
        with pytest.raises(DataError, match="guidance is"):
            network(torch.rand(guidance), torch.rand(target))
    for sizes in [(2, 15), (3, 14), (5, 3), (3.0, 15)]:
        with pytest.raises(ConfigError):
            JointFilter(*sizes)  # type: ignore[arg-type]
