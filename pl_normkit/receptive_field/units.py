"""Which unit of a network is looked at: the output, a named layer, or the last map before a classifier pools it."""

from __future__ import annotations

__all__ = ["Unit", "find_unit"]

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pl_normkit.errors import ConfigError, nearest

MOST_PREFIX_TOKENS = 8
"""Class, distillation and register tokens that may stand before the spatial ones."""
FORWARD_FEATURES = "forward_features"
Layout = Literal["NCHW", "NHWC", "tokens"]


class _Reached(Exception):  # noqa: N818 - it ends the forward pass, and is no error
    """The layer has run; what follows it is not needed."""


@dataclass(frozen=True)
class Unit:
    """One place in the output of `layer`.

    Attributes:
        layer: module path, "" for the model itself, "forward_features" for that method.
        layout: how the output is laid out.
        grid: its (height, width).
        prefix: tokens before the spatial ones.
        position: (y, x) in the grid.
        calls: how often the layer runs in one forward pass; its last output counts.
    """

    layer: str
    layout: Layout
    grid: tuple[int, int]
    prefix: int
    position: tuple[int, int]
    calls: int = 1

    def values(self, model: nn.Module, images: Tensor) -> Tensor:
        """The unit's value for each image (N,): mean over channels, classes or features."""
        output = _map_in(run_to(model, self.layer, images, self.calls))
        y, x = self.position
        assert output is not None
        if self.layout == "NCHW":
            return output[:, :, y, x].mean(1)
        if self.layout == "NHWC":
            return output[:, y, x].mean(1)
        return output[:, self.prefix + y * self.grid[1] + x].mean(1)


def run_to(model: nn.Module, layer: str, images: Tensor, calls: int = 1) -> Any:
    """The output of the `calls`-th call of `layer`; the model runs no further than that."""
    if not layer:
        return model(images)
    if layer == FORWARD_FEATURES:
        return model.forward_features(images)  # type: ignore[operator]
    outputs: list[Any] = []

    def stop(_module: nn.Module, _arguments: Any, output: Any) -> None:
        outputs.append(output)
        if len(outputs) == calls:
            raise _Reached

    handle = model.get_submodule(layer).register_forward_hook(stop)
    try:
        model(images)
    except _Reached:
        pass
    finally:
        handle.remove()
    return outputs[-1]


def find_unit(model: nn.Module, images: Tensor, layer: str | None, position: tuple[int, int] | None) -> Unit:
    """The unit for `images` (N, C, H, W) that require grad.

    Raises ConfigError for an unknown layer, an output that is no map, and a position outside it.
    """
    with _watching(model) as seen:
        name, output = _output_of(model, images, layer, seen)
    layout, grid, prefix = _layout_of(model, output, images, seen)
    if position is None:
        rows, columns = grid
        position = (rows // 2, columns // 2) if layout == "NCHW" else ((rows - 1) // 2, (columns - 1) // 2)
    elif not all(0 <= at < length for at, length in zip(position, grid, strict=True)):
        raise ConfigError(f"position {position} is outside the map", where=name or "the output", evidence=f"{grid[0]} x {grid[1]} cells")
    return Unit(name, layout, grid, prefix, position, seen.calls[name] or 1)


@dataclass
class _Seen:
    """What ran: how often each module, the last map of all and of each module, and the sizes of all 4-D maps."""

    calls: Counter[str] = dataclasses.field(default_factory=Counter)
    maps: dict[str, Tensor | None] = dataclasses.field(default_factory=dict)
    last: str = ""
    sizes: list[tuple[int, int]] = dataclasses.field(default_factory=list)


@contextmanager
def _watching(model: nn.Module) -> Iterator[_Seen]:
    seen = _Seen()

    def watch(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _arguments: Any, output: Any) -> None:
            seen.calls[name] += 1
            found = seen.maps[name] = _map_in(output)
            if found is not None:
                seen.last = name
                if found.dim() == 4:
                    seen.sizes.append((found.shape[2], found.shape[3]))

        return keep

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _output_of(model: nn.Module, images: Tensor, layer: str | None, seen: _Seen) -> tuple[str, Tensor]:
    if layer:
        return layer, _named_output(model, images, layer, seen)
    output = _map_in(model(images))
    if output is not None:
        return "", output
    if _has_features(model):
        output = _map_in(model.forward_features(images))  # type: ignore[operator]
        if output is not None:
            return FORWARD_FEATURES, output
    output = seen.maps.get(seen.last)
    if output is None:
        raise ConfigError("no layer of the model gives a map that depends on the image", fix="check the model: it may detach the image")
    return seen.last, output


def _named_output(model: nn.Module, images: Tensor, layer: str, seen: _Seen) -> Tensor:
    names = {name for name, _ in model.named_modules()} | ({FORWARD_FEATURES} if _has_features(model) else set())
    if layer not in names:
        raise ConfigError(f"the model has no layer {layer!r}", fix=nearest(layer, names) or "see model.named_modules()")
    if layer == FORWARD_FEATURES:
        output = _map_in(model.forward_features(images))  # type: ignore[operator]
    else:
        model(images)
        if not seen.calls[layer]:
            raise ConfigError(f"the layer {layer!r} is not called when the model runs", fix="name a layer that its forward calls")
        output = seen.maps[layer]
    if output is None:
        raise ConfigError(f"the output of {layer!r} is no map", fix="name a layer that gives (N, C, H, W) or (N, tokens, C)")
    return output


def _has_features(model: nn.Module) -> bool:
    return callable(getattr(model, FORWARD_FEATURES, None))


def _map_in(output: Any) -> Tensor | None:
    """The first 4-D tensor of more than one cell that depends on the image, else such tokens (N, T, C)."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) or dataclasses.is_dataclass(leaf)]
    tensors = [tensor for leaf in leaves for tensor in (tree_leaves(vars(leaf)) if not isinstance(leaf, Tensor) else [leaf])]
    maps = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad and t.dim() in (3, 4)]
    maps = [t for t in maps if math.prod(t.shape[1:]) > t.shape[1] and (t.dim() == 4 or t.shape[1] > 1)]
    return min(maps, key=lambda t: -t.dim(), default=None)


def _layout_of(model: nn.Module, output: Tensor, images: Tensor, seen: _Seen) -> tuple[Layout, tuple[int, int], int]:
    size = (images.shape[2], images.shape[3])
    if output.dim() == 4:
        channels_first, channels_last = (output.shape[2], output.shape[3]), (output.shape[1], output.shape[2])
        if _covers(channels_first, size) or not _covers(channels_last, size):
            return "NCHW", channels_first, 0
        return "NHWC", channels_last, 0
    grid, prefix = _token_grid(model, output.shape[1], size, seen)
    return "tokens", grid, prefix


def _covers(grid: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a map of these cells can be one of the image: no larger, and with its proportions up to a cell."""
    (rows, columns), (height, width) = grid, size
    return rows <= height and columns <= width and abs(rows * width - columns * height) <= max(height, width)


def _token_grid(model: nn.Module, tokens: int, size: tuple[int, int], seen: _Seen) -> tuple[tuple[int, int], int]:
    """The grid of the spatial tokens and how many stand before it: as the model says, as a map that ran, or as the image's proportions."""
    said: int | None = next((n for m in model.modules() if isinstance(n := getattr(m, "num_prefix_tokens", None), int)), None)
    prefixes = range(MOST_PREFIX_TOKENS + 1) if said is None else (said, 0)
    for prefix in prefixes:
        for grid in seen.sizes:
            if grid[0] * grid[1] == tokens - prefix and _covers(grid, size):
                return grid, prefix
    for prefix in prefixes:
        rows = round(math.sqrt((tokens - prefix) * size[0] / size[1])) if tokens > prefix else 0
        if rows and (tokens - prefix) % rows == 0 and _covers((rows, (tokens - prefix) // rows), size):
            return (rows, (tokens - prefix) // rows), prefix
    raise ConfigError(f"{tokens} tokens are no grid over an image of {size[0]} x {size[1]}", fix="name a layer whose output is a map")
