"""Variance that resampling takes from positions, and the fix that gives it back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from pl_normkit.errors import EditError, NothingMatchedError
from pl_normkit.methods.positional_variance import rescale_positional_embedding
from pl_normkit.methods.positional_variance.find import patch_variance, trace_site
from pl_normkit.methods.positional_variance.pipelines.resampling import find_resampling, looks_trained, recover_original
from tests.methods.positional_variance.images import normal_images, vit


def white(side: int, width: int = 192) -> Tensor:
    return torch.randn(1, width, side, side)


def trained_like(side: int, width: int = 192, length: float = 1.0) -> Tensor:
    """White noise smoothed so that neighbours are alike."""
    reach = torch.arange(-3, 4, dtype=torch.float32)
    line = torch.exp(-((reach / length) ** 2) / 2)
    kernel = (line[:, None] * line[None]).expand(width, 1, 7, 7)
    return F.conv2d(torch.randn(1, width, side + 6, side + 6), kernel, groups=width)


def resize(positions: Tensor, side: int, mode: str, antialias: bool) -> Tensor:
    return F.interpolate(positions, size=(side, side), mode=mode, antialias=antialias)


def rows(positions: Tensor) -> Tensor:
    return positions[0].flatten(1).T


@pytest.mark.parametrize(
    ("old", "new", "mode", "antialias", "border", "k"),
    [
        (14, 28, "bilinear", False, 4, 0.3906),
        (14, 56, "bilinear", False, 8, 0.4307),
        (14, 24, "bicubic", True, 0, 0.693),
        (14, 24, "bicubic", False, 0, 0.758),
        (24, 14, "bicubic", True, 0, 0.232),
    ],
)
def test_k_of_white_positions(old: int, new: int, mode: str, antialias: bool, border: int, k: float) -> None:
    """timm resamples with antialias, transformers without; bilinear values hold inside the border."""
    before = white(old, 2048)
    after = resize(before, new, mode, antialias)[:, :, border : new - border, border : new - border]
    assert patch_variance(rows(after)) / patch_variance(rows(before)) == pytest.approx(k, rel=0.02)


@pytest.mark.parametrize(("mode", "antialias"), [("bicubic", True), ("bicubic", False), ("bilinear", False)])
@pytest.mark.parametrize(("old", "new"), [(14, 24), (14, 16), (4, 8)])
@pytest.mark.parametrize("make", [white, trained_like])
def test_the_original_is_recovered_from_what_was_made_of_it(make: Any, old: int, new: int, mode: str, antialias: bool) -> None:
    before = make(old)
    found = recover_original(rows(resize(before, new, mode, antialias)), (new, new))
    assert found is not None
    assert found[1] == (old, old)
    torch.testing.assert_close(found[0].float(), rows(before), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [white, trained_like])
def test_positions_that_were_not_enlarged_are_left_alone(make: Any) -> None:
    assert recover_original(rows(make(14)), (14, 14)) is None
    assert recover_original(rows(resize(make(24), 14, "bicubic", True)), (14, 14)) is None
    trained_on = rows(resize(make(7), 14, "bicubic", True)) + 0.01 * torch.randn(196, 192)
    assert recover_original(trained_on, (14, 14)) is None


def test_trained_positions_are_told_from_white_ones() -> None:
    assert (looks_trained(rows(trained_like(14)), (14, 14)), looks_trained(rows(white(14)), (14, 14))) == (True, False)


def resized_vit(**options: Any) -> tuple[nn.Module, Tensor]:
    """A model that was enlarged from 64 to 112 pixels, with the positions it had."""
    model = vit(**options)
    original = model.pos_embed.detach().clone()
    model.set_input_size((112, 112))
    return model, original


def share_of_patches(model: nn.Module, original: Tensor, prefix: int) -> float:
    return patch_variance(model.pos_embed.detach()[0, prefix:]) / patch_variance(original[0, prefix:])


@pytest.mark.parametrize("given", ["nothing", "tensor", "state_dict"])
@pytest.mark.parametrize(("options", "prefix"), [({}, 1), ({"reg_tokens": 2}, 3), ({"name": "deit3_small_patch16_224"}, 0)], ids=str)
def test_the_variance_comes_back(options: dict[str, Any], prefix: int, given: str) -> None:
    model, original = resized_vit(**options)
    before, keys = model.pos_embed.detach().clone(), list(model.state_dict())
    parameter = model.pos_embed
    known: dict[str, Any] = {"nothing": {}, "tensor": {"original": original}, "state_dict": {"original": {"pos_embed": original}}}[given]
    changes = rescale_positional_embedding(model, **known)
    assert len(changes.made) == 1
    assert share_of_patches(model, original, prefix) == pytest.approx(1.0, abs=1e-6 if given != "nothing" else 1e-5)
    assert torch.equal(model.pos_embed[:, :prefix], before[:, :prefix])
    assert (model.pos_embed is parameter, list(model.state_dict())) == (True, keys)
    scaled = model.pos_embed.detach().clone()
    for again in ({}, {"original": original}):
        assert not rescale_positional_embedding(model, **again)
    assert not rescale_positional_embedding(copy.deepcopy(model))
    assert torch.equal(model.pos_embed, scaled)
    changes.undo()
    assert torch.equal(model.pos_embed, before)
    assert rescale_positional_embedding(model, **known)


def test_positions_that_the_forward_pass_resamples_are_scaled_for_that_size() -> None:
    model = vit(img_size=32, dynamic_img_size=True)
    original, inputs = model.pos_embed.detach().clone(), (normal_images(1),)
    changes = rescale_positional_embedding(model, inputs)
    used = resample_abs_pos_embed(model.pos_embed.detach(), (4, 4))[0, 1:]
    assert patch_variance(used) == pytest.approx(patch_variance(original[0, 1:]), rel=1e-6)
    assert torch.equal(model.pos_embed[:, :1], original[:, :1])
    assert not rescale_positional_embedding(model, inputs)
    changes.undo()
    assert torch.equal(model.pos_embed, original)


def test_k_is_told() -> None:
    model, original = resized_vit()
    found = find_resampling(model, trace_site(model, (normal_images(1, 112),)))
    assert found is not None
    assert (found.old_grid, found.new_grid, found.in_forward) == ((4, 4), (7, 7), False)
    assert found.k == pytest.approx(share_of_patches(model, original, 1), rel=1e-5)
    assert f"4x4 -> 7x7, k = {found.k:.4f}" in str(rescale_positional_embedding(model))


def test_a_smaller_grid_needs_the_original() -> None:
    model = vit(img_size=112)
    original = model.pos_embed.detach().clone()
    model.set_input_size((64, 64))
    with pytest.raises(NothingMatchedError, match="shows no resampling") as caught:
        rescale_positional_embedding(model)
    assert "pass original=" in caught.value.fix
    rescale_positional_embedding(model, original=original)
    assert share_of_patches(model, original, 1) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (vit, {}, NothingMatchedError, "shows no resampling"),
        (lambda: timm.create_model("resnet18"), {}, NothingMatchedError, "no example inputs"),
        (lambda: timm.create_model("resnet18"), {"example_inputs": (normal_images(2),)}, NothingMatchedError, "adds no absolute"),
        (vit, {"original": torch.zeros(1, 17, 8)}, EditError, "does not fit"),
        (vit, {"original": {"other": torch.zeros(1)}}, EditError, "does not fit"),
        (lambda: vit().to("meta"), {}, EditError, "meta device"),
    ],
)
def test_what_cannot_be_rescaled(build: Any, options: dict[str, Any], error: Any, message: str) -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        rescale_positional_embedding(model, **options)
    if not any(value.is_meta for value in before.values()):
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
