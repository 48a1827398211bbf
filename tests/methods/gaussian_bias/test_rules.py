"""NK601 and NK602: what fires, and stock models that must stay quiet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.layers.pos_embed_rel import RelPosMlp
from torch import Tensor, nn

from pl_normkit.auditing import audit
from pl_normkit.findings import Finding
from pl_normkit.methods.gaussian_bias import add_gaussian_bias, gaussian_bias
from pl_normkit.nn import GaussianAttentionBias
from tests.methods.gaussian_bias.families import FAMILIES, OWN, PlainViT, build


def findings(model: nn.Module, images: Tensor, code: str) -> list[Finding]:
    return [finding for finding in audit(model, images, select=[code]).findings if finding.code == code]


class LateGaussian(RelPosMlp):
    """The authors' way: the Gaussian is added in forward, which fused attention does not call."""

    def with_gaussian(self, learned: bool) -> LateGaussian:
        values = [torch.ones(1), torch.full((1,), 5.0)]
        for name, value in zip(("a", "s"), values, strict=True):
            setattr(self, name, nn.Parameter(value) if learned else value)
        return self

    def forward(self, attn: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        return super().forward(attn, shared_rel_pos) + gaussian_bias(self.window_size, self.a, self.s)


def trapped(learned: bool, fused: bool = True) -> tuple[nn.Module, Tensor]:
    model, images = build("relpos")
    for block in model.blocks:
        block.attn.rel_pos.__class__ = LateGaussian
        block.attn.rel_pos.with_gaussian(learned)
        block.attn.fused_attn = fused
    return model, images


def test_the_trap_is_one() -> None:
    """On the fused path nothing changes, on the unfused path something does."""
    plain, images = build("relpos")
    expected = plain(images)
    assert torch.equal(trapped(True)[0](images), expected)
    assert not torch.allclose(trapped(True, fused=False)[0](images), expected, atol=1e-5)


@pytest.mark.parametrize("learned", [True, False])
def test_a_bias_in_a_forward_that_fused_attention_never_calls(learned: bool) -> None:
    model, images = trapped(learned)
    found = findings(model, images, "NK602")
    assert [finding.cause for finding in found] == ["forward overridden", "unfused only"][: 2 if learned else 1]
    assert [place.module for place in found[0].places] == ["blocks.0.attn.rel_pos", "blocks.1.attn.rel_pos"]
    assert found[0].evidence[0].value == pytest.approx(1.0, rel=1e-4)
    if learned:
        assert "blocks.0.attn.rel_pos.a" in found[1].message
        assert [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")] == [True, True]


def test_on_the_meta_device_the_trace_alone_tells() -> None:
    model, images = trapped(learned=True)
    found = findings(model.to("meta"), images, "NK602")
    assert [finding.cause for finding in found] == ["unfused only"]


def test_the_same_bias_on_the_unfused_path_is_right() -> None:
    assert findings(*trapped(learned=True, fused=False), "NK602") == []


class CausalBias(nn.Module):
    """Self-attention with a bias in its mask, and the hint that makes torch drop it."""

    def __init__(self, is_causal: bool, scale: float = 1.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.is_causal = is_causal
        causal = torch.zeros(17, 17).masked_fill(torch.ones(17, 17, dtype=torch.bool).triu(1), float("-inf"))
        self.register_buffer("mask", causal + scale * GaussianAttentionBias(4, None, 1)()[0].detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, attn_mask=self.mask, is_causal=self.is_causal, need_weights=False)[0]


@pytest.mark.parametrize(("is_causal", "scale", "fires"), [(True, 1.0, True), (True, 0.0, False), (False, 1.0, False)])
def test_a_mask_that_the_causal_hint_replaces(is_causal: bool, scale: float, fires: bool) -> None:
    found = findings(PlainViT(lambda: CausalBias(is_causal, scale)), torch.randn(2, 3, 32, 32), "NK602")
    assert [finding.cause for finding in found] == ["is_causal"] * fires
    if fires:
        assert [place.module for place in found[0].places] == ["layers.0.attention", "layers.1.attention"]
        assert found[0].evidence[0].value == pytest.approx(1.0)


WINDOW = torch.ones(17, 17, dtype=torch.bool).tril(-4)
FUTURE = torch.ones(17, 17, dtype=torch.bool).triu(1)


def additive(blocked: Any) -> Any:
    return torch.zeros(17, 17).masked_fill(blocked, float("-inf"))


MASKS = {
    "boolean window": (WINDOW | FUTURE, True),
    "-inf window": (additive(WINDOW | FUTURE), True),
    "window of very negative numbers": (additive(WINDOW | FUTURE).clamp(min=-1e9), True),
    "boolean, causal": (FUTURE, False),
    "-inf, causal": (additive(FUTURE), False),
    "the future alone hidden less": (additive(FUTURE & (torch.arange(17) > 8)), True),
}


@pytest.mark.parametrize(("mask", "fires"), MASKS.values(), ids=MASKS)
def test_masks_that_nn_multihead_attention_replaces(mask: Any, fires: bool) -> None:
    """Whether the output differs from that of the mask alone says what is right."""

    def attention() -> nn.Module:
        made = CausalBias(True)
        made.register_buffer("mask", mask)
        return made

    model = PlainViT(attention).train()  # no dropout; in eval mode torch's fast path takes a boolean mask after all
    images = torch.randn(2, 3, 32, 32)
    found = findings(model, images, "NK602")
    replaced = model(images)
    for module in model.modules():
        if isinstance(module, CausalBias):
            module.is_causal = False
    assert torch.allclose(replaced, model(images), atol=1e-5) is not fires
    assert [finding.cause for finding in found] == ["is_causal"] * fires


@pytest.mark.parametrize(("kind", "device"), [("ViT", "cpu"), ("Dinov2", "cpu"), ("Idefics3Vision", "meta")])
def test_an_all_true_mask_of_transformers_is_no_position(kind: str, device: str) -> None:
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64}
    config = getattr(transformers, f"{kind}Config")(**settings, patch_size=16)
    model = getattr(transformers, f"{kind}Transformer" if "Vision" in kind else f"{kind}Model")(config).to(device)
    (found,) = findings(model, torch.zeros(2, 3, 64, 64, device=device), "NK601")
    assert (found.code, len(found.places)) == ("NK601", 2)


def test_timm_s_unfused_attention_drops_a_mask_beside_is_causal_too() -> None:
    model, images = build("vit")
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.register_forward_pre_hook(causal_and_mask, with_kwargs=True)
    assert [finding.cause for finding in findings(model, images, "NK602")] == ["is_causal"]


def causal_and_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "attn_mask": torch.ones(17, 17), "is_causal": True}


PLAIN = {"vit", "vit_rectangular", "vit_average", "vit_siglip", "deit_distilled", "deit3", "vit_registers", "vit_parallel"}
PLAIN |= {"torchvision_vit", "transformers_sdpa", *OWN}
QUICK = {"vit_registers", "beit", "eva", "relpos", "swin", "swin_v2", "torchvision_vit", "transformers_sdpa", "own_unfused"}
MODELS = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.zoo) for name in (*FAMILIES, *OWN)]


@pytest.mark.parametrize("name", MODELS)
def test_stock_models_are_quiet_and_absolute_positions_alone_are_noted(name: str) -> None:
    model, images = build(name)
    found = audit(model, images, select=["NK601", "NK602"]).findings
    assert [finding.code for finding in found] == ["NK601"] * (name in PLAIN)
    for finding in found:
        assert len(finding.places) == 2
        assert abs(finding.evidence[0].value) < 0.2


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("vit", "relpos") else pytest.mark.zoo) for name in (*FAMILIES, *OWN)]
)
def test_models_with_our_bias_are_quiet(name: str) -> None:
    model, images = build(name)
    add_gaussian_bias(model, example_inputs=images if name in OWN else None)
    assert audit(model, images, select=["NK601", "NK602"]).findings == []


def small(**options: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=3, img_size=64, **options)


def trained(model: nn.Module) -> nn.Module:
    """Position embeddings that change slowly over the image, as training makes them."""
    wave = torch.linspace(0, 3, 4)[:, None] * torch.rand(2, 48)[:, None]
    with torch.no_grad():
        model.pos_embed[0, 1:] = (torch.sin(wave[0])[:, None] + torch.cos(wave[1])[None]).reshape(16, 48)
    return model


def gated_positions() -> nn.Module:
    return timm.create_model("convit_tiny", depth=3, local_up_to_layer=2, embed_dim=16, num_heads=4, img_size=64)


QUIET: dict[str, Callable[[], nn.Module]] = {
    "weights of positions behind the softmax": gated_positions,
    "trained": lambda: trained(small()),
    "biased": lambda: (model := small(), add_gaussian_bias(model))[0],
    "no position": lambda: small(pos_embed="none"),
}


@pytest.mark.parametrize("name", QUIET)
def test_trained_biased_or_positionless_models_are_not_noted(name: str) -> None:
    assert findings(QUIET[name](), torch.randn(1, 3, 64, 64), "NK601") == []


def test_it_is_a_preview_and_its_fix_adds_the_bias() -> None:
    model = small()
    report = audit(model, torch.randn(1, 3, 64, 64))
    assert [finding for finding in report.findings if finding.code.startswith("NK6")] == []
    with torch.device("meta"):
        bare = small()
    assert len(findings(bare, torch.zeros(1, 3, 64, 64), "NK601")) == 1
    from pl_normkit.rules import load_rules

    fix = load_rules()["NK601"].fix
    assert fix is not None
    assert len(fix(model, torch.zeros(1, 3, 64, 64)).made) == 3
    assert findings(model, torch.zeros(1, 3, 64, 64), "NK601") == []
