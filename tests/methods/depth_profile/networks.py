"""Tiny real networks with the modules at which hand-written hooks see the stream and the branches, in depth order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Network:
    """A network, its inputs and where to look.

    `streams` are ("in" | "out", path): the stream after addition l is what this module is given or returns. `branches` return the branches.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    streams: list[tuple[str, str]]
    branches: list[str]
    tensor_of: Callable[[Any], Tensor] = field(default=lambda output: output)


def _blocks(paths: list[str], second_norm: str, branches: tuple[str, str]) -> tuple[list[tuple[str, str]], list[str]]:
    streams = [stream for path in paths for stream in (("in", f"{path}.{second_norm}"), ("out", path))]
    return streams, [f"{path}.{branch}" for path in paths for branch in branches]


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 32, (2, 8))}


GPT2 = Network(
    lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=32, n_positions=16)),
    tokens,
    *_blocks([f"transformer.h.{i}" for i in range(3)], "ln_2", ("attn", "mlp")),
    lambda output: output.logits,
)
LLAMA = Network(
    lambda: LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)),
    tokens,
    *_blocks([f"model.layers.{i}" for i in range(2)], "post_attention_layernorm", ("self_attn", "mlp")),
    lambda output: output.logits,
)
VIT = Network(
    lambda: VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3, init_values=0.1),
    lambda: torch.randn(2, 3, 16, 16),
    *_blocks([f"blocks.{i}" for i in range(2)], "norm2", ("ls1", "ls2")),
)
SWIN = Network(
    lambda: SwinTransformer(img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2), num_classes=3),
    lambda: torch.randn(2, 3, 32, 32),
    *_blocks([f"layers.{stage}.blocks.{i}" for stage in range(2) for i in range(2)], "norm2", ("attn", "mlp")),
)
BLOOM = Network(  # a function that its forwards call adds
    lambda: BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=32)),
    tokens,
    [("out", f"transformer.h.{i}{part}") for i in range(2) for part in (".self_attention", "")],
    [f"transformer.h.{i}.{part}" for i in range(2) for part in ("self_attention.dense", "mlp.dense_4h_to_h")],
    lambda output: output.logits,
)
NETWORKS = {"gpt2": GPT2, "llama": LLAMA, "vit": VIT, "swin": SWIN, "bloom": BLOOM}


def by_hooks(network: Network, model: nn.Module, batch: Any) -> tuple[list[Tensor], list[Tensor], Any]:
    """Streams and branches as hooks on the modules see them, and the output."""
    streams: dict[str, Tensor] = {}
    branches: dict[str, Tensor] = {}

    def first(value: Any) -> Tensor:
        return (value[0] if isinstance(value, tuple) else value).detach().clone()

    handles = []
    for side, path in network.streams:
        module = model.get_submodule(path)
        if side == "in":
            handles.append(module.register_forward_pre_hook(lambda _m, args, key=path: streams.__setitem__(key, first(args))))
        else:
            handles.append(module.register_forward_hook(lambda _m, _a, output, key=path: streams.__setitem__(key, first(output))))
    for path in network.branches:
        hook = lambda _m, _a, output, key=path: branches.__setitem__(key, first(output))  # noqa: E731
        handles.append(model.get_submodule(path).register_forward_hook(hook))
    output = model(**batch) if isinstance(batch, dict) else model(batch)
    for handle in handles:
        handle.remove()
    return [streams[path] for _, path in network.streams], [branches[path] for path in network.branches], output
