"""What each number of groups does to the gradient that passes a group norm, measured on the values that reach it. Derived here."""

from __future__ import annotations

__all__ = ["GroupIsometry", "NormIsometry", "measure_isometry"]

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, NothingMatchedError
from pl_normkit.graph.trace import call_arguments
from pl_normkit.methods.group_count.counts import divisors
from pl_normkit.preserve import preserved
from pl_normkit.wrappers import unwrapped


@dataclass(frozen=True)
class NormIsometry:
    """One norm: what every number of groups makes of the variance of a gradient on its way through.

    A ratio is the mean square of the gradient behind the norm's input over that before its output, times the mean square of the input, so
    that the scale of the weights cancels. With the fan ratio it is the ratio per element over the layer and its ReLU.

    Attributes:
        module: path of the norm.
        channels: channels it normalizes.
        groups: its own number of groups; 0 for a batch norm.
        counts: the numbers of groups that were measured.
        random: ratios for a gradient that is independent at every element.
        constant: ratios for a gradient that is constant in space; empty where there is no space.
        predicted: what the first-order formula gives for `random`; NaN where it has no finite value.
        predicted_constant: the same for `constant`.
        mean_share: share of the input's mean square that lies in the spatial means of the channels; NaN where there is no space.
        fan_ratio: outputs over inputs of the convolution or linear layer before it, C_out / (stride^2 C_in); NaN where none is.
    """

    module: str
    channels: int
    groups: int
    counts: tuple[int, ...]
    random: tuple[float, ...]
    constant: tuple[float, ...]
    predicted: tuple[float, ...]
    predicted_constant: tuple[float, ...]
    mean_share: float
    fan_ratio: float


@dataclass(frozen=True)
class GroupIsometry:
    """What `measure_isometry` found, norm by norm in execution order. The ratio alone would choose 1 or C nearly always: you choose."""

    norms: tuple[NormIsometry, ...]

    def to_json(self) -> str:
        """A JSON list with one object a norm; what is not finite becomes null."""
        rows = [{name: _finite(value) for name, value in asdict(norm).items()} for norm in self.norms]
        return json.dumps(rows, indent=2, allow_nan=False)

    def __str__(self) -> str:
        lines = ["gradient variance through each norm by its number of groups (1: kept); measured random / constant in space"]
        for norm in self.norms:
            cells = [f"{count}: {_cell(norm, index)}" for index, count in enumerate(norm.counts)]
            fan = "" if math.isnan(norm.fan_ratio) else f", fan ratio {norm.fan_ratio:.3g}"
            lines.append(
                f"{norm.module or '(the model)'} ({norm.channels} channels, {norm.groups or 'batch norm'}{fan})  {'  '.join(cells)}"
            )
        lines.append("The fan ratio moves the gradient more than any number of groups; chosen by this ratio alone, the number is 1 or C.")
        return "\n".join(lines)

    def plot(self, path: Path) -> None:
        """A heat map over norms and numbers of groups: log2 of the ratio for a random gradient."""
        from matplotlib.figure import Figure

        counts = sorted({count for norm in self.norms for count in norm.counts})
        cells = [[math.log2(_at(norm, count)) if _at(norm, count) > 0 else math.nan for count in counts] for norm in self.norms]
        figure = Figure(figsize=(2 + 0.5 * len(counts), 1.5 + 0.25 * len(self.norms)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(cells, cmap="coolwarm", vmin=-1, vmax=1, aspect="auto")
        axes.set_xticks(range(len(counts)), list(map(str, counts)))
        axes.set_yticks(range(len(self.norms)), [norm.module for norm in self.norms], fontsize=7)
        axes.set_xlabel("groups")
        figure.colorbar(image, label="log2 of the gradient's variance ratio")
        figure.savefig(path, dpi=120)


def measure_isometry(model: nn.Module, batch: Any, groups: Sequence[int] | None = None, *, seed: int = 0) -> GroupIsometry:
    """For every group norm and batch norm: the gradient's variance ratio for each divisor of its channels.

    The batch runs once, in the model's own mode; each norm's input is then normalized with every number of groups, and a random and a
    spatially constant gradient are sent back through it. The model, its mode, its buffers and every RNG stay as they are.

    Args:
        model: a model or a layer with `nn.GroupNorm` or batch norms.
        batch: a tensor, a tuple of positional or a dict of keyword arguments.
        groups: numbers of groups to try where they divide the channels; all divisors by default.
        seed: of the gradients.

    Raises:
        NothingMatchedError: when no norm ran.
        ConfigError: for numbers below 1.

    Source: derived here, for iid weights and ReLU in front: linear layers (m - 2) / (m - 3) with m channels per group, convolutions
    (1 - rho / k) / (1 - c / k) to first order, with the measured share c and rho = 0 (random) or 1 (constant).

    >>> import torch
    >>> layer = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(256, 256), torch.nn.GroupNorm(32, 256))
    >>> (norm,) = measure_isometry(layer, torch.randn(512, 256), groups=[32]).norms
    >>> norm.predicted, norm.fan_ratio
    ((1.2,), 1.0)
    """
    if groups is not None and not all(type(count) is int and count >= 1 for count in groups):
        raise ConfigError("numbers of groups must be positive whole numbers", evidence=repr(groups))
    model = unwrapped(model)
    seen = _run(model, batch)
    if not seen:
        raise NothingMatchedError("no group norm or batch norm ran", fix="give a batch that reaches one")
    generator = torch.Generator().manual_seed(seed)
    return GroupIsometry(tuple(_measure(path, norm, z, fan, groups, generator) for path, norm, z, fan in seen))


_Seen = tuple[str, nn.Module, Tensor, float]


def _run(model: nn.Module, batch: Any) -> list[_Seen]:
    """(path, norm, its input, fan ratio of the layer that made this input), in execution order."""
    seen: list[_Seen] = []
    made: dict[int, tuple[Tensor, nn.Module]] = {}
    paths = {module: path for path, module in model.named_modules()}

    def note_output(module: nn.Module, _: Any, output: Tensor) -> None:
        made[id(output)] = (output, module)

    def note_input(module: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        given = arguments[0] if arguments else next(iter(keywords.values()))
        maker = made.get(id(given))
        seen.append((paths[module], module, given.detach().clone(), _fan_ratio(maker[1]) if maker else math.nan))

    with ExitStack() as stack:
        stack.enter_context(preserved(model, buffers=True))
        stack.enter_context(torch.no_grad())
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                stack.enter_context(module.register_forward_hook(note_output))
            elif isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)):
                stack.enter_context(module.register_forward_pre_hook(note_input, with_kwargs=True))
        arguments, keywords = call_arguments(batch)
        model(*arguments, **keywords)
    return seen


def _fan_ratio(layer: nn.Module) -> float:
    if isinstance(layer, nn.Linear):
        return layer.out_features / layer.in_features
    assert isinstance(layer, nn.modules.conv._ConvNd)
    return layer.out_channels / (math.prod(layer.stride) * layer.in_channels)


def _measure(path: str, norm: nn.Module, z: Tensor, fan: float, groups: Sequence[int] | None, generator: torch.Generator) -> NormIsometry:
    channels = z.shape[1]
    counts = tuple(count for count in groups or divisors(channels) if channels % count == 0)
    z = z.double()
    has_space = z.dim() > 2 and math.prod(z.shape[2:]) > 1
    random = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
    constant = torch.randn(z.shape[:2], generator=generator, dtype=z.dtype).to(z.device)
    constant = constant.view(*z.shape[:2], *[1] * (z.dim() - 2)).expand_as(z)
    share = float(z.flatten(2).mean(2).square().mean() / z.square().mean()) if has_space else math.nan
    sizes = [channels // count for count in counts]
    return NormIsometry(
        path,
        channels,
        norm.num_groups if isinstance(norm, nn.GroupNorm) else 0,
        counts,
        tuple(_ratio(z, random, count) for count in counts),
        tuple(_ratio(z, constant, count) for count in counts) if has_space else (),
        tuple(_predicted(size, share, 0.0) for size in sizes),
        tuple(_predicted(size, share, 1.0) for size in sizes) if has_space else (),
        share,
        fan,
    )


def _ratio(z: Tensor, gradient: Tensor, count: int) -> float:
    if z[0].numel() // count < 2:  # one value a group: the output is 0 whatever comes in
        return 0.0
    with torch.enable_grad():
        leaf = z.requires_grad_()
        (behind,) = torch.autograd.grad(F.group_norm(leaf, count, eps=0.0), leaf, gradient)
    return float(behind.square().mean() / gradient.square().mean() * z.detach().square().mean())


def _predicted(size: int, share: float, rho: float) -> float:
    if math.isnan(share):
        return (size - 2) / (size - 3) if size > 3 else math.nan
    return (1 - rho / size) / (1 - share / size)


def _cell(norm: NormIsometry, index: int) -> str:
    constant = f" / {norm.constant[index]:.3f}" if norm.constant else ""
    return f"{norm.random[index]:.3f}{constant}"


def _at(norm: NormIsometry, count: int) -> float:
    return norm.random[norm.counts.index(count)] if count in norm.counts else math.nan


def _finite(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
