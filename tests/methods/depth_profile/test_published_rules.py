"""NK909 to NK914 at what they name, and quiet on real networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, AdamW

from pl_normkit import audit
from pl_normkit.graph import ModelGraph
from pl_normkit.graph.sharing import TraceStore, shared_traces
from pl_normkit.methods.depth_profile import published_rules
from pl_normkit.nn import CausalTransformer
from pl_normkit.rules import Subject, load_rules
from tests.methods.depth_profile.networks import GPT2, LLAMA, Network

CODES = ["NK909", "NK910", "NK911", "NK912", "NK913", "NK914"]
TOKENS = torch.arange(16).reshape(2, 8)


def decoder(placement: str, depth: int = 4, **options: Any) -> CausalTransformer:
    torch.manual_seed(0)
    return CausalTransformer(31, width=8, depth=depth, heads=2, length=8, placement=placement, **options)


def trained(model: CausalTransformer) -> CausalTransformer:
    nn.init.uniform_(model.blocks[0].norm2.weight, 0.5, 1.5)
    return model


def small_start(model: CausalTransformer) -> CausalTransformer:
    for block in model.blocks:
        block.attn.proj.weight.data *= 0.3
        block.mlp.fc2.weight.data *= 0.3
    return model


class Scaled(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def with_layer_scale(model: CausalTransformer) -> CausalTransformer:
    for block in model.blocks:
        block.out1, block.out2 = Scaled(8), Scaled(8)
    return model


def found(model: nn.Module, inputs: Any, *optimizers: Any) -> list[tuple[str, str]]:
    graph = ModelGraph.from_model(model, inputs)
    subject = Subject(model, example_inputs=inputs, graph=graph, optimizers=list(optimizers))
    return [(code, finding.message) for code in CODES for finding in load_rules()[code].judge(subject)]


DECODERS: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, str]]]] = {
    "24 post-norm blocks": (lambda: decoder("post", 24), [("NK909", "A post-norm transformer has 24 blocks")]),
    "layer-norm scaling": (lambda: decoder("lns"), []),
    "and a small start": (
        lambda: small_start(decoder("lns")),
        [("NK910", "Layer-norm scaling meets a start that is scaled by depth")],
    ),
    "a small start alone": (lambda: small_start(decoder("pre")), []),
    "and LayerScale": (lambda: with_layer_scale(decoder("lns")), [("NK910", "Layer-norm scaling meets LayerScale")]),
    "LayerScale alone": (lambda: with_layer_scale(decoder("pre")), []),
    "a quarter of post-norm": (lambda: decoder("mix"), []),
    "half": (lambda: decoder("mix", share=0.5), [("NK911", "2 of 4 blocks are post-norm before pre-norm ones")]),
    "half, trained": (lambda: trained(decoder("mix", share=0.5)), []),
    "peri": (lambda: decoder("peri", 2), []),
    "sdd": (lambda: decoder("sdd", 2), []),
    "deepnorm": (lambda: decoder("deepnorm", 2), []),
}


@pytest.fixture(scope="module", autouse=True)
def _shared() -> Any:
    with shared_traces(TraceStore()):
        yield


@pytest.mark.parametrize("case", DECODERS)
def test_where_the_norms_stand(case: str) -> None:
    build, expected = DECODERS[case]
    assert found(build(), TOKENS) == expected


def test_what_is_no_plain_deep_post_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_rules, "DEEP", 2)
    assert found(decoder("post", 2), TOKENS) == [("NK909", "A post-norm transformer has 2 blocks")]
    for model in (decoder("deepnorm", 2), decoder("sdd", 2), trained(decoder("post", 2)), decoder("pre", 2)):
        assert found(model, TOKENS) == []


def test_weights_of_a_network_on_the_sphere() -> None:
    model = decoder("ngpt", 2)
    optimizer = Adam(model.parameters(), 0.1)
    assert found(model, TOKENS, optimizer) == []
    assert found(model, TOKENS, AdamW(model.parameters(), 0.1)) == [("NK912", "Weights that are kept at length 1 are decayed")]
    model(TOKENS).square().mean().backward()
    optimizer.step()
    assert found(model, TOKENS, optimizer) == [("NK912", "12 of 12 weight matrices of a network on the sphere are off length 1")]
    model.normalize_weights()
    assert found(model, TOKENS, optimizer) == []


class UnitRows(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return F.normalize(weight)


class RMSByLength(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5


def test_a_pre_norm_by_length_is_no_sphere_and_matrices_made_of_unit_rows_are_on_it() -> None:
    model = decoder("pre", 2)
    for block in model.blocks:
        block.norm1, block.norm2 = RMSByLength(), RMSByLength()
    model.norm = RMSByLength()
    assert found(model, TOKENS) == []

    model = decoder("ngpt", 2)
    for layer in [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]:
        nn.init.normal_(layer.weight)
        nn.utils.parametrize.register_parametrization(layer, "weight", UnitRows())
    assert found(model, TOKENS) == []


class PlainBlock(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.down, self.factor = nn.Linear(16, 64), nn.Linear(64, 16), factor
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.factor * self.attention(h, h, h, need_weights=False)[0]
        return x + self.factor * self.down(self.up(self.norm2(x)).relu())


@pytest.mark.parametrize(("factor", "fires"), [(1.0, False), (8.0, True)])
def test_how_the_stream_starts(factor: float, fires: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(PlainBlock(factor) for _ in range(3))), torch.randn(2, 6, 16)
    message = "The residual stream does not start as plain pre-norm blocks with Xavier's weights do"
    assert found(model, x) == ([("NK914", message)] if fires else [])
    for parameter in model.parameters():  # another start is not judged
        parameter.data *= 0.5
    assert found(model, x) == []


class PooledByAttention(nn.Module):
    """Three plain blocks, and a head of another start, as SigLIP has one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*(PlainBlock(1.0) for _ in range(3))), PlainBlock(8.0)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.head(self.blocks(x).mean(1, keepdim=True))
        return pooled


def test_the_additions_of_a_head_are_not_the_streams() -> None:
    torch.manual_seed(0)
    assert found(PooledByAttention(), torch.randn(2, 6, 16)) == []


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **sizes, **options)


def small_patches(model: Any) -> nn.Module:
    """A stream that starts small: the first norm makes the gradient before it large."""
    model.patch_embed.proj.weight.data *= 0.01
    model.pos_embed.data *= 0.01
    return model


def silent(model: Any) -> nn.Module:
    """Blocks that hand on zeros, whose matrices get no gradient."""
    for block in model.blocks:
        for layer in (block.norm1, block.norm2, block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
    return model


VITS: dict[str, tuple[Callable[[], Any], bool, bool]] = {
    "as it is": (vit, False, False),
    "a small start": (lambda: small_patches(vit(global_pool="avg")), True, True),
    "blocks without gradient": (lambda: silent(vit(global_pool="avg")), True, False),
    "LayerScale, whose blocks get little": (lambda: vit(global_pool="avg", init_values=1e-3), True, False),
}


@pytest.mark.parametrize("case", VITS)
def test_gradient_of_the_patch_embedding(case: str) -> None:
    build, is_large, fires = VITS[case]
    model, x = build(), torch.randn(4, 3, 16, 16)
    F.cross_entropy(model(x), torch.arange(4)).backward()
    patches = model.patch_embed.proj.weight.grad.norm()
    parts = [[block.attn.qkv, block.attn.proj] for block in model.blocks] + [[block.mlp.fc1, block.mlp.fc2] for block in model.blocks]
    norms = sorted(sum(float(layer.weight.grad.square().sum()) for layer in part) ** 0.5 for part in parts)
    assert (float(patches) > 10 * (norms[2] + norms[3]) / 2) is is_large
    assert found(model, x) == ([("NK913", "The patch embedding gets many times the gradient of the blocks")] if fires else [])


@pytest.mark.parametrize("network", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_real_networks_are_quiet(network: Network) -> None:
    model = network.build()
    report = audit(model, network.batch(), select=CODES, optimizers=[AdamW(model.parameters(), 1e-3)])
    assert [finding.code for finding in report.findings] == []
    assert [str(note) for note in report.notes] == []
