from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pl_normkit.errors import ConfigError
from pl_normkit.recipes.segmentation import SegmentationModule
from pl_normkit.recipes.segmentation.tiling import predict_tiled, window_starts


@settings(derandomize=True, deadline=None, max_examples=100)
@given(length=st.integers(1, 200), size=st.integers(1, 64), share=st.floats(0, 0.9))
def test_windows_cover_the_axis_and_overlap_as_asked(length, size, share):
    overlap = min(int(size * share), size - 1)
    starts = window_starts(length, size, overlap)

    assert starts[0] == 0
    assert starts[-1] == max(length - size, 0)
    assert all(later - earlier <= size - overlap for earlier, later in pairwise(starts))
    assert starts == sorted(set(starts))


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (70, 131), (33, 32), (1, 200)])
@pytest.mark.parametrize("overlap", [0, 8, 31])
def test_a_constant_comes_out_bit_for_bit(size, overlap):
    values = torch.rand(2, 5, 1, 1)

    def network(images: torch.Tensor) -> torch.Tensor:
        assert max(images.shape[-2:]) <= 32
        return values.expand(2, 5, *images.shape[-2:]).clone()

    logits = predict_tiled(network, torch.rand(2, 3, *size), 32, overlap)

    assert torch.equal(logits, values.expand(2, 5, *size))


def test_a_map_without_context_is_that_of_the_whole_image():
    torch.manual_seed(0)
    network = nn.Conv2d(3, 4, 1)
    images = torch.rand(1, 3, 80, 112)

    assert torch.allclose(predict_tiled(network, images, 32, 16), network(images), atol=1e-6)
    assert torch.equal(predict_tiled(network, images, 112, 16), network(images))


def test_the_centre_of_a_window_counts_more_than_its_border():
    """Two windows that answer 0 and 1: over their overlap the answer rises from one to the other."""
    answers = iter((0.0, 1.0))
    logits = predict_tiled(lambda images: torch.full_like(images[:, :1], next(answers)), torch.rand(1, 3, 4, 24), 16, 8)

    row = logits[0, 0, 0]
    assert (row[:8] == 0).all()
    assert (row[16:] == 1).all()
    assert (row[8:16].diff() > 0).all()
    assert torch.allclose(row[8:16] + row[8:16].flip(0), torch.ones(8))


def test_the_module_predicts_in_tiles_where_asked():
    module = SegmentationModule(["a", "b"], "Unet", encoder_name="tu-test_resnet", tile_size=32, tile_overlap=0.5).eval()
    images, seen = torch.rand(1, 3, 64, 64), []
    handle = module.network.register_forward_hook(lambda network, args, output: seen.append(tuple(args[0].shape[-2:])))

    labels = module.predict_step((images, ["x"], torch.tensor([[64, 64]])), 0)

    assert labels.shape == (1, 64, 64)
    assert seen == [(32, 32)] * 9
    handle.remove()
    whole = SegmentationModule(["a", "b"], "Unet", encoder_name="tu-test_resnet", tile_size=64).eval()
    whole.load_state_dict(module.state_dict())
    assert torch.equal(whole.predict_logits(images), whole(images))


@pytest.mark.parametrize(
    ("options", "named"), [({"tile_size": 50}, "tile_size"), ({"tile_size": 0}, "tile_size"), ({"tile_overlap": 1.0}, "tile_overlap")]
)
def test_tiles_that_cannot_be_used_are_named(options, named):
    with pytest.raises(ConfigError) as caught:
        SegmentationModule(["a", "b"], "Unet", encoder_name="tu-test_resnet", **options)
    assert named in caught.value.where
