"""What `add_gaussian_bias` leaves alone, and what it refuses; the model is then as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, ModelSpecError, NothingMatchedError
from pl_normkit.methods.gaussian_bias import add_gaussian_bias
from pl_normkit.methods.gaussian_bias.fix import TOKEN_GRID
from pl_normkit.methods.gaussian_bias.reach import CHILD
from pl_normkit.nn import GaussianAttentionBias
from tests.methods.gaussian_bias.adding import add
from tests.methods.gaussian_bias.families import PlainAttention, PlainViT, biases, build


def test_keys_have_names_of_their_own() -> None:
    model, images = build("vit")
    keys = set(model.state_dict())
    add(model, images)
    assert sorted(set(model.state_dict()) - keys) == [f"blocks.{i}.attn.{CHILD}.{name}" for i in (0, 1) for name in ("amplitude", "sigma")]


def test_the_filter_chooses_layers() -> None:
    model, images = build("vit")
    changes = add(model, images, filter_fn=lambda module, path: path.startswith("blocks.1"))
    assert [path for path, module in model.named_modules() if isinstance(module, GaussianAttentionBias)] == [f"blocks.1.attn.{CHILD}"]
    assert list(map(str, changes.skipped)) == ["blocks.0.attn: not chosen by the filter"]
    with pytest.raises(NothingMatchedError, match="the filter chose no attention module"):
        add(build("vit")[0], images, filter_fn=lambda module, path: False)


def test_a_second_call_adds_what_the_first_left_out() -> None:
    model, images = build("vit")
    add(model, images, filter_fn=lambda module, path: path.startswith("blocks.1"))
    changes = add(model, images)
    assert [change.module for change in changes.made] == ["blocks.0.attn"]
    assert model.patch_embed.proj.get_submodule(TOKEN_GRID) is biases(model)[0]._grid_source[0] is biases(model)[1]._grid_source[0]


def test_what_is_no_self_attention_is_left_alone() -> None:
    model, images = build("vit_siglip")
    changes = add(model, images, example_inputs=images)
    assert list(map(str, changes.skipped)) == ["attn_pool: AttentionPoolLatent: 1 queries look at 16 keys, which is no self-attention"]


@pytest.mark.parametrize("traced", [False, True])
def test_a_model_without_attention_is_refused(traced: bool) -> None:
    model = torchvision.models.resnet18()
    with pytest.raises(NothingMatchedError, match="no self-attention is known"):
        add_gaussian_bias(model, example_inputs=torch.zeros(1, 3, 32, 32) if traced else None)


def test_unknown_attention_asks_for_a_trace() -> None:
    with pytest.raises(NothingMatchedError, match="pass example_inputs"):
        add_gaussian_bias(build("own_fused")[0])


class TwoAttentions(PlainAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Sequence(nn.Module):
    """Self-attention over something that is no image."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize(
    ("model", "images", "message"),
    [
        (lambda: PlainViT(lambda: TwoAttentions(32, 4, fused=True)), torch.zeros(1, 3, 32, 32), "runs 2 attentions and takes no mask"),
        (Sequence, torch.zeros(1, 16, 32), "no convolution before it makes a grid that fits its 16 tokens"),
        (lambda: timm.create_model("cait_xxs24_224", depth=0, depth_token_only=1), torch.zeros(1, 3, 224, 224), "no self-attention"),
    ],
)
def test_attention_that_cannot_take_the_bias_is_refused(model: Callable[[], nn.Module], images: Tensor, message: str) -> None:
    built = model()
    before = list(built.state_dict())
    with pytest.raises(ModelSpecError, match=message):
        add_gaussian_bias(built, example_inputs=images)
    assert list(built.state_dict()) == before


def test_a_grid_that_does_not_match_the_tokens_is_refused() -> None:
    model, images = build("relpos")
    model.blocks[1].attn.rel_pos.window_size = (2, 4)
    with pytest.raises(ModelSpecError, match="16 tokens, its grid has 2 x 4 patches and 0 prefix tokens"):
        add_gaussian_bias(model, example_inputs=images)
    dropping = timm.create_model("vit_tiny_patch16_224", patch_drop_rate=0.5, depth=1)
    with pytest.raises(ModelSpecError, match="drops patches"):
        add_gaussian_bias(dropping)


def test_tokens_that_vanish_later_are_refused_when_they_do() -> None:
    model, images = build("vit")
    add(model, images)
    with pytest.raises(ConfigError, match="9 tokens do not fit a grid of 4 x 4 patches"):
        model.blocks(torch.randn(2, 9, 48))


def test_an_implementation_that_drops_masks_is_refused() -> None:
    model, _ = build("transformers_sdpa")
    model.net.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelSpecError, match="'flash_attention_2' adds no mask"):
        add_gaussian_bias(model)


@pytest.mark.parametrize("options", [{"amplitude": 0}, {"sigma": -1}])
def test_bad_start_values_leave_the_model_untouched(options: dict[str, float]) -> None:
    model, _ = build("vit")
    before = list(model.state_dict())
    with pytest.raises(ConfigError):
        add_gaussian_bias(model, **options)
    assert list(model.state_dict()) == before


def folded() -> nn.Module:
    return PlainViT(lambda: PlainAttention(32, 4, fused=False, folded=True))


def test_a_bias_per_head_needs_an_axis_for_heads() -> None:
    model, images = folded(), torch.randn(2, 3, 32, 32)
    add(model, images, "own_unfused")
    model(images)
    with pytest.raises(ModelSpecError, match="its heads are not known, or have no axis in the logits"):
        add(folded(), images, "own_unfused", per_head=True)


class ChannelAttention(PlainAttention):
    """Channels attend to channels, as in XCiT: four heads of sixteen channels each, as many as there are patches."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q.transpose(1, 2) @ k).softmax(-1).matmul(v.transpose(1, 2)).transpose(1, 2))


class WindowsInBatch(PlainAttention):
    """Two images side by side in the batch, cut into halves: no whole image is seen."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(4, 9, 32)).reshape(2, 18, 32)


class TwoSoftmaxes(PlainAttention):
    """ConViT's way: a second softmax over learned positions stands beside the first."""

    def __init__(self) -> None:
        super().__init__(32, 4, fused=False)
        self.position = nn.Parameter(torch.randn(17, 17))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.position.softmax(-1)[None] @ x * 0 + self.position[None].expand(2, 17, 17).softmax(-1) @ x


@pytest.mark.parametrize(
    ("layer", "prefix", "message"),
    [
        (lambda: ChannelAttention(32, 1, fused=False), 1, "its 32 tokens are not those of its input"),
        (lambda: WindowsInBatch(32, 4, fused=True), 2, "no convolution before it makes a grid|not those of its input"),
        (TwoSoftmaxes, 1, "the model no longer runs"),
    ],
)
def test_look_alikes_are_refused_and_the_model_is_as_it_was(layer: Callable[[], nn.Module], prefix: int, message: str) -> None:
    model, images = PlainViT(layer, prefix), torch.randn(2, 3, 32, 32)
    before, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(ModelSpecError, match=message):
        add_gaussian_bias(model, example_inputs=images)
    assert list(model.state_dict()) == before
    assert [type(module) for module in model.modules()] == kinds
