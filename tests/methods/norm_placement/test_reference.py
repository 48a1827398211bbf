"""The reference decoder: what edits make of it and torch's own block where both exist, and nGPT by its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit import measure_depth_profile, place_norms
from pl_normkit.errors import ConfigError
from pl_normkit.graph.sharing import TraceStore, shared_traces
from pl_normkit.nn import CausalTransformer

TOKENS = torch.arange(16).reshape(2, 8) * 3 % 31
EDITS: dict[str, tuple[str, dict[str, Any]]] = {
    "peri": ("pre", {}),
    "lns": ("pre", {}),
    "mix": ("pre", {"share": 0.5}),
    "normformer": ("pre", {"scale_residual": True}),
    "hybrid": ("pre", {}),
    "post": ("pre", {}),
    "deepnorm": ("post", {}),
    "sdd": ("post", {}),
}
NAMES = {
    "attn.placed_norm": "out1",
    "attn.proj.placed_norm": "out1",
    "mlp.fc2.placed_norm": "out2",
    "attn.proj.placed_heads.weight": "attn.gains",
    "out2.placed_shortcut.weight": "shortcut",
}


def make(placement: str, **options: Any) -> CausalTransformer:
    torch.manual_seed(0)
    return CausalTransformer(31, width=8, depth=2, heads=2, length=8, placement=placement, **options).double().eval()


def stirred(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return model


def own_name(name: str, placement: str) -> str:
    """Of a parameter that an edit has added, in the decoder that is built with it."""
    if placement == "sdd":
        return name.replace("placed_norm.weight", "gain")
    if placement == "normformer":
        name = name.replace("mlp.fc2.placed_norm", "mlp.norm")
    for layer in ("query", "key", "value"):
        name = name.replace(f"attn.{layer}.placed_head_norm", f"attn.norms.{layer}")
    for placed, own in NAMES.items():
        name = name.replace(placed, own)
    return name


def test_built_and_placed_are_the_same() -> None:
    with shared_traces(TraceStore()):
        for placement, (start, options) in EDITS.items():
            built_options = {"share": 0.5} if placement == "mix" else {}
            model, built = make(start), make(placement, **built_options)
            place_norms(model, placement, TOKENS, **options)
            if placement == "post":
                model.norm = nn.Identity()  # which a post-norm decoder is built without
            stirred(model)
            values = {own_name(name, placement): value for name, value in model.state_dict().items()}
            missing = built.load_state_dict(values, strict=False)
            idle = [f"blocks.1.norm1.{name}" for name in ("weight", "bias")] if placement == "hybrid" else []
            assert (missing.missing_keys, missing.unexpected_keys) == ([], idle), placement
            for module in (*model.modules(), *built.modules()) if placement == "deepnorm" else ():
                if isinstance(module, nn.LayerNorm):
                    module.eps = 0.0  # which the gain form moves
            with torch.no_grad():
                found, expected = model(TOKENS), built(TOKENS)
            assert float((found - expected).abs().max() / expected.abs().max()) < 1e-12, placement


@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_has_the_same_block(norm_first: bool) -> None:
    model = stirred(make("pre" if norm_first else "post"))
    block: Any = model.blocks[0]
    layer: Any = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first).double()
    attention = block.attn
    parts = {
        "self_attn.in_proj_weight": torch.cat([attention.query.weight, attention.key.weight, attention.value.weight]),
        "self_attn.in_proj_bias": torch.cat([attention.query.bias, attention.key.bias, attention.value.bias]),
    }
    pairs = {"self_attn.out_proj": attention.proj, "linear1": block.mlp.fc1, "linear2": block.mlp.fc2}
    pairs |= {"norm1": block.norm1, "norm2": block.norm2}
    parts |= {f"{name}.{part}": getattr(module, part) for name, module in pairs.items() for part in ("weight", "bias")}
    layer.load_state_dict(parts)
    x = torch.randn(2, 8, 8, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(8, dtype=torch.float64)
    expected = layer.train()(x, src_mask=mask, is_causal=True)
    assert torch.allclose(block(x), expected, atol=1e-12, rtol=0)


def unit(x: Tensor, dim: int = -1) -> Tensor:
    return x / x.square().sum(dim, keepdim=True).sqrt()


def test_ngpt_by_its_formula() -> None:
    """From the sheet of formulas: arXiv 2410.01131 and its code."""
    model: Any = make("ngpt")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale.weight") or "rates" in name:
                parameter.mul_(torch.linspace(0.5, 1.5, parameter.numel(), dtype=torch.float64))
    width, heads, size = 8, 2, 4
    h = unit(model.tokens.weight[TOKENS] + model.positions.weight)
    causal = torch.ones(8, 8, dtype=torch.bool).triu(1)
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        s_qk = (attn.scale.weight * math.sqrt(width)).reshape(heads, 1, size)
        q, k, v = ((h @ layer.weight.T).reshape(2, 8, heads, size).transpose(1, 2) for layer in (attn.query, attn.key, attn.value))
        scores = (s_qk * unit(q)) @ (s_qk * unit(k)).transpose(-1, -2) * math.sqrt(size)
        mixed = scores.masked_fill(causal, -torch.inf).softmax(-1) @ v
        attended = mixed.transpose(1, 2).reshape(2, 8, width) @ attn.proj.weight.T
        alphas = [rate.weight * 0.05 * math.sqrt(width) for rate in block.rates]
        h = unit(h + alphas[0].abs() * (unit(attended) - h))
        u, gate = (mlp.scale.weight * math.sqrt(width) * (h @ mlp.fc1.weight.T)).chunk(2, -1)
        h = unit(h + alphas[1].abs() * (unit((u * F.silu(gate)) @ mlp.fc2.weight.T) - h))
    expected = (h @ model.head.weight.T) * model.scale.weight * math.sqrt(width)
    assert torch.allclose(model(TOKENS), expected, atol=1e-12, rtol=0)


def test_weights_of_ngpt_keep_length_1() -> None:
    model = make("ngpt")
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    optimizer.register_step_post_hook(lambda *_: model.normalize_weights())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(TOKENS).square().mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            axis = 0 if name.endswith(("proj.weight", "fc2.weight")) else 1
            assert torch.allclose(parameter.norm(dim=axis), torch.ones(parameter.shape[1 - axis], dtype=torch.float64))
            assert parameter.shape[axis] == 8  # along the stream
    assert not any(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("placement", ["pre", "post", "peri", "lns", "mix", "normformer", "hybrid", "deepnorm", "sdd"])
def test_each_can_be_profiled(placement: str) -> None:
    profile = measure_depth_profile(make(placement), TOKENS, lambda logits: logits.square().mean())
    assert len(profile.stream) == 4
    assert profile.gradient_ratio is not None


def test_starts() -> None:
    deep, plain, hybrid = make("deepnorm"), make("pre"), make("hybrid")
    spread = lambda model, path: float(model.get_parameter(path).detach().square().mean().sqrt())  # noqa: E731 - used twice
    name = "blocks.0.mlp.fc2.weight"
    assert spread(hybrid, name) / spread(plain, name) == pytest.approx(0.5, rel=0.2)
    assert spread(deep, name) == pytest.approx(16**-0.25 * math.sqrt(2 / 40), rel=0.2)
    with pytest.raises(ConfigError, match="there is no placement 'sand'"):
        make("sand")
    with pytest.raises(ConfigError, match="multiple of the heads"):
        CausalTransformer(31, width=9, heads=2)
