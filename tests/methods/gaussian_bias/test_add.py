"""`add_gaussian_bias` on a tiny model of each family: the bias reaches the logits on every path, and nothing else changes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

from pl_normkit.errors import ConfigError
from pl_normkit.methods.gaussian_bias import add_gaussian_bias
from pl_normkit.methods.gaussian_bias.reach import CHILD
from pl_normkit.methods.weight_decay import parameter_roles
from pl_normkit.nn import GaussianAttentionBias
from tests.methods.gaussian_bias.adding import add
from tests.methods.gaussian_bias.families import FAMILIES, OWN, PlainAttention, PlainViT, biases, build

ALL = [*FAMILIES, *OWN]
TRACED = ["own_multihead", "vit", "beit", "swin_v2", "torchvision_vit", "transformers_sdpa"]
CLASS_TOKEN_ALONE = {
    "vit", "vit_rectangular", "vit_parallel", "vit_registers", "deit_distilled", "deit3",
    "torchvision_vit", "transformers_sdpa", "transformers_eager",
}  # fmt: skip
"""Classify by prefix tokens, whose bias is 0: the last layer's bias gets a gradient of 0."""


@pytest.mark.parametrize("per_head", [False, True], ids=["layer", "head"])
@pytest.mark.parametrize("name", ALL)
def test_the_bias_is_there_is_trained_and_is_gone_after_undo(name: str, per_head: bool) -> None:
    model, images = build(name)
    before, keys = copy.deepcopy(model.state_dict()), list(model.state_dict())
    parameters = {name: id(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        plain = model(images)
    changes = add(model, images, name, per_head=per_head)
    added = biases(model)
    with torch.no_grad():
        assert not torch.allclose(model(images), plain, atol=1e-6)
        for bias in added:
            bias.enabled = False
        assert torch.equal(model(images), plain)
        for bias in added:
            bias.enabled = True
    assert len(added) == (3 if "swin" in name else 2)
    model(images).square().sum().backward()
    dead = [not (bias.amplitude.grad.any() and bias.sigma.grad.any()) for bias in added]
    assert dead == [False] * (len(added) - 1) + [name in CLASS_TOKEN_ALONE]
    assert [key for key in model.state_dict() if key in set(keys)] == keys
    assert {key.rpartition(".")[2] for key in model.state_dict() if key not in set(keys)} == {"amplitude", "sigma"}
    assert {name: id(p) for name, p in model.named_parameters() if name in parameters} == parameters
    changes.undo()
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(images), plain)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("swin_v2", "torchvision_swin", "torchvision_swin_v2")])
def test_amplitude_zero_is_the_plain_model(name: str) -> None:
    """Up to the rounding of the kernel that takes a mask."""
    model, images = build(name)
    plain = model(images)
    add(model, images, name)
    with torch.no_grad():
        for bias in biases(model):
            bias.amplitude.zero_()
    torch.testing.assert_close(model(images), plain)


@pytest.mark.parametrize("per_head", [False, True], ids=["layer", "head"])
@pytest.mark.parametrize("name", ["vit", "vit_parallel", "deit3", "beit", "beit_shared", "eva", "dinov3", "relpos", "srelpos", "swin"])
def test_fused_and_unfused_attention_agree(name: str, per_head: bool) -> None:
    model, images = build(name)
    add(model, images, per_head=per_head)
    found = {}
    for fused in (True, False):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        model.zero_grad()
        output = model(images)
        output.square().sum().backward()
        found[fused] = [output, *(bias.sigma.grad.clone() for bias in biases(model))]
    torch.testing.assert_close(found[True], found[False])


@pytest.mark.parametrize("name", ["own", "transformers"])
def test_the_implementations_of_one_model_agree(name: str) -> None:
    pair = {"own": ("own_fused", "own_unfused"), "transformers": ("transformers_sdpa", "transformers_eager")}[name]
    outputs = []
    for member in pair:
        model, images = build(member)
        add(model, images, member, per_head=True)
        outputs.append(model(images))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("attention", [lambda: PlainAttention(32, 4, fused=True), lambda: nn.MultiheadAttention(32, 4, batch_first=True)])
def test_the_logits_get_the_bias_and_nothing_else(attention: Callable[[], nn.Module], prefix: int) -> None:
    """With queries and keys of zero the attention weights are the softmax of the bias: checked against that formula."""
    model, images = PlainViT(attention, prefix), torch.randn(2, 3, 32, 32)
    layer = model.layers[0]
    projection = layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.qkv.weight
    output = layer.out_proj if isinstance(layer, nn.MultiheadAttention) else layer.out
    with torch.no_grad():
        nn.init.zeros_(projection)
        projection[64:] = torch.eye(32)
        nn.init.eye_(output.weight)
        nn.init.zeros_(output.bias)
        nn.init.zeros_(layer.in_proj_bias if isinstance(layer, nn.MultiheadAttention) else layer.qkv.bias)
    add(model, images, "own_fused")
    tokens = torch.randn(2, 16 + prefix, 32)
    model(images)  # the grid is seen
    found = layer(tokens) if not isinstance(layer, nn.MultiheadAttention) else layer(tokens, tokens, tokens)[0]
    bias = GaussianAttentionBias((4, 4), None, prefix, 2.0, 1.5)()[0]
    torch.testing.assert_close(found, bias.softmax(-1) @ tokens)


@pytest.mark.parametrize("name", ALL)
def test_twice_is_as_once(name: str) -> None:
    model, images = build(name)
    add(model, images, name)
    once = {path: id(module) for path, module in model.named_modules()}
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    assert not add(model, images, name, amplitude=1.0)
    assert {path: id(module) for path, module in model.named_modules()} == once
    assert [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()] == hooks
    with pytest.raises(ConfigError, match="there is a Gaussian bias already"):
        add(model, images, name, per_head=True)


@pytest.mark.parametrize("name", TRACED)
def test_a_trace_finds_the_same_grid(name: str) -> None:
    model, images = build(name)
    add_gaussian_bias(model, example_inputs=images)
    found = [(bias.grid_size, bias.num_prefix_tokens) for bias in biases(model)]
    prefix = {"own_multihead": 3, "swin_v2": 0}.get(name, 1)
    assert found == [((4, 4), prefix)] * (3 if "swin" in name else 2)


@pytest.mark.parametrize("through", ["deepcopy", "save"])
@pytest.mark.parametrize("name", ["vit", "relpos", "swin", "swin_v2", "torchvision_vit", "torchvision_swin", "own_fused"])
def test_a_copy_uses_its_own_bias(name: str, through: str) -> None:
    model, images = build(name)
    add(model, images, name)
    copied = copy.deepcopy(model) if through == "deepcopy" else saved_and_loaded(model)
    expected = model(images)
    assert torch.equal(copied(images), expected)
    with torch.no_grad():
        for bias in biases(copied):
            bias.sigma.fill_(0.5)
    assert torch.equal(model(images), expected)
    assert not torch.allclose(copied(images), expected, atol=1e-6)
    assert {id(module) for module in copied.modules()} & {id(module) for module in model.modules()} == set()


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("name", ["vit", "relpos", "torchvision_vit"])
def test_weights_from_before_load_strictly_before_and_after(name: str) -> None:
    model, images = build(name)
    weights = {key: torch.randn_like(value) if value.is_floating_point() else value for key, value in model.state_dict().items()}
    other, _ = build(name)
    other.load_state_dict(weights)
    add(model, images)
    add(other, images)
    model.load_state_dict(weights)
    assert [(bias.amplitude.item(), bias.sigma.item()) for bias in biases(model)] == [(2.0, 1.5)] * 2
    assert torch.equal(model(images), other(images))


@pytest.mark.parametrize("name", ["vit", "beit", "relpos", "swin", "eva"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model, images = build(name)
    add(model, images)
    found = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.train()
        model.zero_grad()
        torch.manual_seed(1)
        model(images).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


def test_a_checkpointed_layer_that_runs_again_uses_the_grid_of_its_own_pass() -> None:
    """Two sizes forward, then one backward, as in multi-crop training."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, dynamic_img_size=True)
    add_gaussian_bias(model, amplitude=2.0, sigma=1.5)
    crops = [torch.randn(2, 3, 32, 64), torch.randn(2, 3, 32, 32)]
    found = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        sum(model(crop).square().sum() for crop in crops).backward()
        found.append(biases(model)[0].sigma.grad.clone())
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # timm resizes tables
@pytest.mark.parametrize("name", ["vit", "beit", "relpos", "srelpos", "swin", "swin_v2", "eva"])
def test_another_input_size_gives_another_grid(name: str) -> None:
    """As a model that was built for that size: same weights where the sizes do not matter."""
    model, images = build(name)
    add(model, images)
    options = {"window_size": (2, 4)} if "swin" in name else {}
    model.set_input_size((32, 64), **options)
    wide = torch.randn(2, 3, 32, 64)
    changed = model(wide)
    fresh = copy.deepcopy(model)
    for bias in biases(fresh):
        bias.set_grid_size((2, 4) if "swin" in name else (4, 8))
        if name in ("vit", "beit", "srelpos", "eva"):
            bias._grid_source = ()
    assert torch.equal(changed, fresh(wide))
    assert biases(model)[0]().shape != biases(fresh)[0]().shape  # the two read their grid from different places


def test_images_of_other_sizes_are_followed_without_being_told() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=48, dynamic_img_size=True)
    add_gaussian_bias(model)
    shapes = []
    biases(model)[0].register_forward_hook(lambda module, args, output: shapes.append((args[0], tuple(output.shape))))
    for size in ((32, 32), (16, 64), (64, 16)):
        model(torch.randn(1, 3, *size))
    assert shapes == [((4, 4), (1, 17, 17)), ((2, 8), (1, 17, 17)), ((8, 2), (1, 17, 17))]


@pytest.mark.parametrize("name", ["vit", "relpos", "swin", "swin_v2", "torchvision_vit", "transformers_sdpa", "own_fused"])
def test_autocast_and_half_weights(name: str) -> None:
    model, images = build(name)
    add(model, images, name)
    full = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images)
    assert (mixed.float() - full).norm() < 0.1 * full.norm()
    half = model.to(torch.bfloat16)(images.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() < 0.1 * full.norm()


@pytest.mark.parametrize("name", ["vit", "torchvision_vit", "transformers_sdpa", "own_fused", "own_unfused"])
@pytest.mark.parametrize("late", [False, True])
def test_the_device_and_dtype_of_the_layer_are_taken(name: str, late: bool) -> None:
    model, images = build(name)
    if late:
        add(model, images, name)
    model.double()
    if not late:
        add(model, images.double(), name)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert model(images.double()).dtype == torch.float64


MASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "float": lambda: {"attn_mask": torch.randn(17, 17)},
    "boolean": lambda: {"attn_mask": torch.ones(17, 17, dtype=torch.bool).tril()},
    "per head": lambda: {"attn_mask": torch.randn(2, 3, 17, 17)},
    "causal": lambda: {"is_causal": True},
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_of_the_call_itself_still_acts(mask: str, fused: bool) -> None:
    model, images = build("vit")
    layer = model.blocks[0].attn
    layer.fused_attn = fused
    call, tokens = MASKS[mask](), torch.randn(2, 17, 48)
    bias = GaussianAttentionBias(4, None, 1, 2.0, 1.5)()
    own = call.get("attn_mask", torch.ones(17, 17, dtype=torch.bool).tril() if mask == "causal" else torch.zeros(17, 17))
    own = torch.zeros(17, 17).masked_fill(~own, float("-inf")) if own.dtype == torch.bool else own
    expected = layer(tokens, attn_mask=own + bias)
    add(model, images)
    torch.testing.assert_close(layer(tokens, **call), expected)


@pytest.mark.parametrize("per_head", [False, True])
def test_masks_of_multihead_attention_still_act(per_head: bool) -> None:
    model, images = build("own_multihead")
    layer, tokens = model.layers[0], torch.randn(2, 19, 32)
    hidden = torch.ones(19, 19, dtype=torch.bool).triu(1)
    padding = torch.zeros(2, 19, dtype=torch.bool)
    padding[:, -3:] = True
    bias = GaussianAttentionBias(4, None, 3, 2.0, 1.5)()[0]
    mask = bias.masked_fill(hidden, float("-inf")).masked_fill(padding[0], float("-inf"))
    expected = layer(tokens, tokens, tokens, attn_mask=mask)[0]
    add(model, images, "own_multihead", per_head=per_head)
    found = layer(tokens, tokens, tokens, key_padding_mask=padding, attn_mask=hidden, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(found, expected)


def test_transformer_encoder_layers_use_the_bias_in_their_fast_mode_too() -> None:
    """In evaluation without gradients torch would run a kernel that never calls the attention module."""
    layers = [nn.TransformerEncoderLayer(32, 4, 32, dropout=0.0, batch_first=True) for _ in range(2)]
    model, images = PlainViT(layers.pop).eval(), torch.randn(2, 3, 32, 32)
    changes = add(model, images, "own_fused")
    assert [change.module for change in changes.made] == ["stem", "layers.0.self_attn", "layers.1.self_attn"]
    slow = model(images)
    with torch.no_grad():
        torch.testing.assert_close(model(images), slow)


SLOW = ("relpos", "swin_v2", "own_unfused")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.zoo if name in SLOW else []) for name in ("vit", "torchvision_vit", "own_fused", *SLOW)]
)
def test_an_edited_model_compiles_and_exports(name: str) -> None:
    model, images = build(name)
    add(model, images, name)
    expected = model(images)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(images), expected)
    with torch.no_grad():
        exported = torch.export.export(model, (images,), strict=False).module()(images)
    torch.testing.assert_close(exported, expected)


@pytest.mark.parametrize("name", ["vit", "relpos", "torchvision_vit"])
def test_its_parameters_are_this_library_s_own_and_get_no_decay(name: str) -> None:
    model, images = build(name)
    before = parameter_roles(model, images)
    add(model, images)
    roles = parameter_roles(model, images)
    assert {path: role for path, role in roles.items() if CHILD not in path} == before
    assert {str(role) for path, role in roles.items() if CHILD in path} == {"own"}
    from timm.optim import param_groups_weight_decay

    groups = param_groups_weight_decay(model, weight_decay=0.1)
    undecayed = {id(parameter) for group in groups if group["weight_decay"] == 0 for parameter in group["params"]}
    assert all(id(parameter) in undecayed for bias in biases(model) for parameter in bias.parameters())
