"""`AdaptiveClipping` against the rule written out unit by unit."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from pl_normkit.errors import ConfigError
from pl_normkit.methods.norm_training import AdaptiveClipping


def units(layer: nn.Module, name: str, tensor: Tensor) -> list[Tensor]:
    """Index arrays of the elements of each unit: one loop per kind of layer."""
    index = torch.arange(tensor.numel()).reshape(tensor.shape)
    if sum(size > 1 for size in tensor.shape) <= 1:
        return [index.flatten()]
    if isinstance(layer, nn.ConvTranspose2d):
        share = tensor.shape[0] // layer.groups
        return [
            index[group * share : (group + 1) * share, out].flatten() for group in range(layer.groups) for out in range(tensor.shape[1])
        ]
    if isinstance(layer, transformers.pytorch_utils.Conv1D):
        return [index[:, out] for out in range(tensor.shape[1])]
    return [index[out].flatten() for out in range(tensor.shape[0])]


def clipped(layer: nn.Module, name: str, weight: Tensor, gradient: Tensor, clip: float, eps: float) -> Tensor:
    result = gradient.clone().flatten()
    for unit in units(layer, name, weight):
        length, limit = float(gradient.flatten()[unit].norm()), clip * max(float(weight.flatten()[unit].norm()), eps)
        if length > limit:
            result[unit] *= limit / max(length, 1e-6)
    return result.reshape(weight.shape)


LAYERS = {
    "linear": lambda: nn.Linear(5, 3),
    "one_input": lambda: nn.Linear(1, 4),
    "convolution": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "one_output": lambda: nn.Conv2d(4, 1, 3),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "gpt2": lambda: transformers.pytorch_utils.Conv1D(5, 3),
    "standardized": lambda: timm.layers.ScaledStdConv2d(3, 4, 3),
    "norm": lambda: nn.BatchNorm2d(4),
    "embedding": lambda: nn.Embedding(7, 3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_each_unit_is_clipped_by_the_rule(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = LAYERS[name]().double()
    expected = {}
    for number, (key, parameter) in enumerate(layer.named_parameters()):
        scale = torch.logspace(1, -4, parameter.shape[0], dtype=parameter.dtype).reshape(-1, *[1] * (parameter.ndim - 1))
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * (0 if number == 1 else 1)
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * scale
        expected[key] = clipped(layer, key, parameter.detach(), parameter.grad, 0.05, 1e-3)
        assert not torch.equal(expected[key], parameter.grad)
    AdaptiveClipping(layer, clip_factor=0.05).clip(layer.parameters())
    for key, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-12, atol=1e-15)


def test_head_skipped_and_sparse_gradients_stay() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    tokens = torch.tensor([[1, 2]])
    clipping = AdaptiveClipping(model, tokens, skip=["1.bias"], clip_factor=1e-6)
    assert clipping.skipped == {"5.weight", "5.bias", "1.bias"}
    model(tokens).sum().backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    clipping.clip(model.parameters())
    same = {name for name, parameter in model.named_parameters() if torch.equal(parameter.grad.to_dense(), before[name].to_dense())}
    assert same == {"0.weight", "1.bias", "5.weight", "5.bias"}


@pytest.mark.parametrize("options", [{"clip_factor": 0.0}, {"eps": -1.0}, {"skip": ["nowhere"]}])
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        AdaptiveClipping(nn.Linear(2, 2), **options)  # type: ignore[arg-type]
