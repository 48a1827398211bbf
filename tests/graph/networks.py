"""Small networks whose structure is counted by hand, and what a reading must leave alone."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pl_normkit.graph import ModelGraph


def structure(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """Counts of what `ModelGraph` names, without the zeros, after checking that reading changed nothing."""
    before = state_of(model)
    graph = ModelGraph.from_model(model, example_inputs)
    assert state_of(model) == before
    counts = Counter(f"{add.kind} adds" for add in graph.residual_adds)
    counts += Counter(f"{norm.kind} norms" for norm in graph.norms)
    counts += Counter({"heads": len(graph.heads), "attentions": len(graph.attentions), "dropouts": len(graph.dropouts)})
    return dict(counts + Counter({"fusions": len(graph.fusions)}))


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything a reading could change, as values that compare with ==."""
    tensors = {
        name: (id(tensor), tensor._version, tensor.requires_grad, _bits(tensor), _bits(tensor.grad)) for name, tensor in _tensors(model)
    }
    modules = {name: (id(module), module.training, _plain(module), sorted(vars(module))) for name, module in model.named_modules()}
    return {
        "tensors": tensors,
        "modules": modules,
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": repr(np.random.get_state()),  # noqa: NPY002
        "grad mode": torch.is_grad_enabled(),
    }


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _bits(tensor: Tensor | None) -> bytes | None:
    if tensor is None or tensor.is_meta:
        return None
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else repr(tensor.item()).encode()


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in vars(module).items() if isinstance(value, (bool, int, float, str, list, tuple))}


def conv_norm(channels_in: int, channels_out: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), norm(channels_out))


class Block(nn.Module):
    """Post-activation block with every operation in place: two norms, one identity addition."""

    def __init__(self, channels: int = 8, *, inplace: bool = True, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.first = conv_norm(channels, channels, norm)
        self.second = conv_norm(channels, channels, norm)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(nn.functional.relu(self.first(x), inplace=self.inplace))
        if self.inplace:
            y += x
            return y.relu_()
        return (y + x).relu()


class Down(nn.Module):
    """Block whose shortcut is a strided convolution and a norm: one projection addition."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(channels_out)
        self.second = conv_norm(channels_out, channels_out)
        self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride=2), nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.norm(self.first(x)))).add_(self.shortcut(x)))


class Classifier(nn.Module):
    """Stem, blocks, global pool, dropout, linear layer."""

    def __init__(self, *blocks: nn.Module, width: int = 8, checkpointed: bool = False) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(width, 5))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


class AttentionBlock(nn.Module):
    """Pre-norm transformer block: attention and MLP, each with its addition."""

    def __init__(self, width: int = 16, *, fused: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(self.attend(*self.qkv(self.norm1(x)).chunk(3, dim=-1)))
        return x + self.mlp(self.norm2(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fused:
            return nn.functional.scaled_dot_product_attention(q, k, v)
        return (q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ v


class TiedLanguageModel(nn.Module):
    """The output layer uses the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.block = AttentionBlock()
        self.norm = nn.LayerNorm(16)
        self.output = nn.Linear(16, 11, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.norm(self.block(self.embedding(tokens))))


class TwoStreams(nn.Module):
    """Takes a dict of an image and a (scale, shift) tuple, returns a dict with a tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.block = Block(inplace=False)
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, image: Tensor, affine: tuple[Tensor, Tensor]) -> dict[str, Any]:
        scale, shift = affine
        x = self.block(self.stem(image) * scale + shift)
        left, right = self.left(x), self.right(x)
        return {"joined": torch.cat([left, right], dim=1), "parts": (left, right)}


class MixedRegions(nn.Module):
    """One block under autocast, a frozen one under no_grad, and one outside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.frozen, self.cast, self.plain = Block(inplace=False), Block(inplace=False), Block(inplace=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        with torch.no_grad():
            x = self.frozen(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.cast(x)
        return self.plain(x.float())


class Counting(nn.Module):
    """A forward that keeps a counter, a cache and a buffer of what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.calls = 0
        self.cache: dict[str, Tensor] = {}
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache["x"] = x
        self.seen += x.detach().mean((0, 2, 3))
        return self.block(x + torch.rand_like(x))


class Rotary(nn.Module):
    """A rotary embedding rescales and rotates; its sum is no residual addition and no fusion."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * 0.5 + torch.cat([-second, first], dim=-1) * 0.5


class Hierarchy(nn.Module):
    """Res2Net's cascade: each convolution adds its predecessor's output to another slice of the input, which is no residual."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = x.chunk(3, dim=1)
        y = self.convs[0](first)
        z = self.convs[1](y + second)
        return torch.cat([y, z, self.convs[2](z + third)], dim=1)


class Decoder(nn.Module):
    """Tokens that read a memory: the cross-attention's addition has a branch with a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.remember, self.project = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 16)

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        x, memory = torch.tanh(self.embed(tokens)), self.remember(memory)
        return x + self.project(nn.functional.scaled_dot_product_attention(x, memory, memory))


class Shortcut(nn.Module):
    """Two 3x3 convolutions beside a given shortcut."""

    def __init__(self, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv_norm(8, 8), nn.ReLU(), conv_norm(8, 8), nn.ReLU(), conv_norm(8, 8))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)


class TwoClassifiers(nn.Module):
    """Pool, dropout, and the average of a classifier and a distilled one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.drop = nn.Dropout(0.2)
        self.head, self.distilled = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.stem(x).mean((2, 3)))
        return (self.head(x) + self.distilled(x)) / 2


class Written(nn.Module):
    """A branch, a projection, an embedding of a second input, and whatever `forward` the case gives."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.project = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.embed = nn.Linear(4, 8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(1))
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(20, 8)
        self.experts = nn.Parameter(torch.ones(3, 8))
        self.written = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.written(self, *inputs)


def adds(forward: Callable[..., Any], *inputs: Tensor) -> tuple[int, int]:
    kinds = [add.kind for add in ModelGraph.from_model(Written(forward), inputs).residual_adds]
    return kinds.count("identity"), kinds.count("projection")


def fusions(forward: Callable[..., Any], *inputs: Tensor) -> int:
    return len(ModelGraph.from_model(Written(forward), inputs).fusions)
