"""The filter behind real networks, taken back by undo, kept by copies and checkpoints."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from torch import Tensor, nn

from pl_normkit.errors import DataError, EditError
from pl_normkit.methods.guided_upsampling import add_guided_upsampling


def fcn() -> nn.Module:
    return torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)


class Coarse(nn.Module):
    """Returns a map of a quarter of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 4, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "smp": lambda: smp.Unet("resnet18", encoder_weights=None, classes=2),
    "torchvision": fcn,
    "coarse": Coarse,
}


def map_of(output: Tensor | dict[str, Tensor]) -> Tensor:
    return output["out"] if isinstance(output, dict) else output


@pytest.mark.parametrize("name", NETWORKS)
def test_real_networks(name: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    x = torch.rand(2, 3, 64, 64)
    before, keys = map_of(model(x)), set(model.state_dict())
    changes = add_guided_upsampling(model)
    after = map_of(model(x))
    assert after.shape == (2, before.shape[1], 64, 64)
    assert {key for key in model.state_dict() if not key.startswith("guided_upsampling.")} == keys
    map_of(model.train()(x)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.guided_upsampling.parameters())
    clone = copy.deepcopy(model).eval()
    model.eval()
    assert torch.allclose(map_of(clone(x)), map_of(model(x)), atol=1e-5)
    with pytest.raises(EditError):
        add_guided_upsampling(model)
    changes.undo()
    assert set(model.state_dict()) == keys
    assert map_of(model(x)).shape == before.shape


def test_a_copy_uses_its_own_filter_and_pickles() -> None:
    model = Coarse().eval()
    add_guided_upsampling(model)
    clone = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        clone.guided_upsampling.target.weights.bias.fill_(-50.0)  # no weight, so taps of 0: the filter does nothing
        clone.guided_upsampling.target.weights.weight.zero_()
    x = torch.rand(1, 3, 32, 32)
    expected = nn.functional.interpolate(clone.conv(x), (32, 32), mode="bicubic", align_corners=False)
    assert torch.allclose(clone(x), expected, atol=1e-5)
    assert not torch.allclose(model(x), expected, atol=1e-5)


def test_outputs_that_are_no_map_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Flatten())

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    classifier = Classifier()
    add_guided_upsampling(classifier)
    with pytest.raises(DataError, match="needs an image"):
        classifier(torch.rand(1, 3, 8, 8))
