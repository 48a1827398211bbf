"""Stochastic average pooling as functions, with torch's own arguments plus `keep` and `scale`."""

from __future__ import annotations

__all__ = [
    "check_keep",
    "check_scale",
    "matching_scale",
    "pool_spec",
    "second_moments",
    "stochastic_adaptive_avg_pool",
    "stochastic_avg_pool",
]

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional as F

from pl_normkit.errors import ConfigError, DataError
from pl_normkit.methods.stochastic_pooling.geometry import PoolSpec, Windows, windows_of
from pl_normkit.methods.stochastic_pooling.ops import stochastic_pool

Size = int | Sequence[int]
Scale = Literal["sqrt", "none", "match"] | float
SCALES = ("sqrt", "none", "match")
SEED_LIMIT = 2**63 - 1


def check_keep(keep: float) -> float:
    """`keep` as a float. Raises ConfigError outside (0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0.0 < keep <= 1.0:
        raise ConfigError(
            "keep must lie in (0, 1]",
            where="stochastic average pooling",
            evidence=f"keep={keep!r}",
            fix="keep is the share of elements that stay, 1 - p of torch's Dropout(p); 0.5 is usual",
        )
    return float(keep)


def check_scale(scale: Scale) -> Scale:
    """`scale` unchanged. Raises ConfigError unless it is "sqrt", "none", "match" or a positive finite number."""
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale in SCALES or (is_number and 0.0 < float(scale) < math.inf):
        return scale
    raise ConfigError(
        "unknown scale of stochastic average pooling",
        evidence=f"scale={scale!r}",
        fix='use "sqrt", "none", "match" or a positive number',
    )


def _numbers(value: Size | None, dims: int, name: str, least: int) -> tuple[int, ...]:
    """`value` once per spatial dimension. Raises ConfigError for anything but integers of at least `least`."""
    numbers = (value,) * dims if isinstance(value, int) else tuple(value or ())
    if len(numbers) == 1:
        numbers = numbers * dims
    if len(numbers) != dims or any(not isinstance(number, int) or isinstance(number, bool) or number < least for number in numbers):
        raise ConfigError(f"{name} must be {dims} integer(s) of at least {least}", evidence=f"{name}={value!r}")
    return numbers


def _two(numbers: tuple[int, ...], height: int) -> tuple[int, int]:
    return (numbers[-2] if len(numbers) == 2 else height, numbers[-1])


def _check_input(x: Tensor, dims: int) -> None:
    if x.dim() not in (dims + 1, dims + 2):
        expected = "(N, C, L) or (C, L)" if dims == 1 else "(N, C, H, W) or (C, H, W)"
        raise DataError(
            f"stochastic average pooling in {dims}-D takes {expected}",
            evidence=f"a tensor of shape {tuple(x.shape)}",
            fix=f"use the {3 - dims}-D form" if x.dim() <= 4 else "flatten the leading dimensions into the batch",
        )
    if not x.is_floating_point():
        raise DataError(
            "stochastic average pooling takes floating point numbers", evidence=f"a tensor of {x.dtype}", fix="convert it with .float()"
        )


def _check_map(spec: PoolSpec, x: Tensor, dims: int) -> None:
    """Raises DataError where a window does not fit the padded map or the map is empty."""
    for axis in range(2 - dims, 2):
        length = x.shape[axis - 2]
        room = length if spec.adaptive else length + 2 * spec.padding[axis]
        if length < 1 or (not spec.adaptive and spec.size[axis] > room):
            raise DataError(
                "a pooling window is larger than the map",
                evidence=f"window {spec.size[2 - dims :]}, padding {spec.padding[2 - dims :]}, map {tuple(x.shape[-dims:])}",
                fix="use a smaller kernel, an adaptive pool, or a larger input",
            )


def stochastic_avg_pool(
    x: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    dims: int = 2,
    keep: float = 0.5,
    scale: Scale = "sqrt",
    training: bool = True,
) -> Tensor:
    """Average a random subset of each sliding window while training, all of it otherwise.

    Of a window of N cells (padding is never drawn) `n = max(1, round(keep * N))` are drawn without replacement, the same for
    all channels and afresh for each sample and window; their mean is multiplied by the scale and by torch's own factor for
    padding (`count_include_pad`, `divisor_override`). A keep that leaves every window whole gives torch's result.

    Args:
        x: (N, C, H, W) or (C, H, W), with `dims=1` (N, C, L) or (C, L); float16, bfloat16, float32 or float64.
        kernel_size: window, as in torch.
        stride: step, default the kernel size.
        padding: zero cells on each side.
        ceil_mode: round the output size up.
        count_include_pad: count padded cells in the divisor.
        divisor_override: divisor instead of the window's size; 2-D only.
        dims: 1 or 2.
        keep: keep probability in (0, 1].
        scale: "sqrt" (sqrt(n / N), what public summaries of the paper state), "none", "match" (the factor that keeps the
            second moment of the output on this very batch, see `matching_scale`) or a number.
        training: False gives `torch.nn.functional.avg_pool1d` / `avg_pool2d`, bit for bit.

    Returns:
        Tensor of the size torch's pooling gives, in the dtype and memory format of `x`, accumulated in float32 or wider.

    Raises:
        ConfigError: for arguments out of range.
        DataError: for tensors of another rank, of integers, or smaller than a window.

    Source: definition derived in this project from public summaries of arXiv 2409.16630 (subset, sqrt scale, shared over channels).

    >>> x = torch.arange(16.0).view(1, 1, 4, 4)
    >>> stochastic_avg_pool(x, 2, training=False).flatten().tolist()
    [2.5, 4.5, 10.5, 12.5]
    """
    keep, scale = check_keep(keep), check_scale(scale)
    spec = _sliding_spec(kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, dims)
    _check_input(x, dims)
    _check_map(spec, x, dims)
    if training and keep < 1.0:
        return _pool(x, spec, keep, scale, dims)
    if dims == 1:
        return F.avg_pool1d(x, spec.size[1], spec.stride[1], spec.padding[1], ceil_mode, count_include_pad)
    return F.avg_pool2d(x, spec.size, spec.stride, spec.padding, ceil_mode, count_include_pad, divisor_override)


def _sliding_spec(
    kernel_size: Size, stride: Size | None, padding: Size, ceil_mode: bool, count_include_pad: bool, divisor: int | None, dims: int
) -> PoolSpec:
    kernel = _numbers(kernel_size, dims, "kernel_size", 1)
    steps = kernel if stride is None or stride == () else _numbers(stride, dims, "stride", 1)
    margins = _numbers(padding, dims, "padding", 0)
    if any(2 * margin > size for margin, size in zip(margins, kernel, strict=True)):
        raise ConfigError("padding may be at most half the kernel", evidence=f"padding={padding!r}, kernel_size={kernel_size!r}")
    if divisor is not None and (divisor == 0 or dims == 1):
        raise ConfigError("divisor_override must be a non-zero integer, in 2-D", evidence=f"divisor_override={divisor!r}")
    return PoolSpec(0, _two(kernel, 1), _two(steps, 1), _two(margins, 0), int(ceil_mode), int(count_include_pad), divisor or 0)


def stochastic_adaptive_avg_pool(
    x: Tensor,
    output_size: Size | Sequence[int | None] | None,
    *,
    dims: int = 2,
    keep: float = 0.5,
    scale: Scale = "sqrt",
    training: bool = True,
) -> Tensor:
    """Average a random subset of each adaptive bin while training, all of it otherwise; every bin is a window of its own.

    Args:
        x: (N, C, H, W) or (C, H, W), with `dims=1` (N, C, L) or (C, L).
        output_size: bins, as in torch; None keeps the input's size along that axis.
        dims: 1 or 2.
        keep: keep probability in (0, 1].
        scale: see `stochastic_avg_pool`.
        training: False gives `torch.nn.functional.adaptive_avg_pool1d` / `adaptive_avg_pool2d`, bit for bit.

    Returns:
        (N, C, *output_size) or (C, *output_size).

    Raises:
        ConfigError, DataError: as `stochastic_avg_pool`.

    Source: as `stochastic_avg_pool`.

    >>> x = torch.arange(16.0).view(1, 1, 4, 4)
    >>> stochastic_adaptive_avg_pool(x, 1, training=False).item()
    7.5
    """
    keep, scale = check_keep(keep), check_scale(scale)
    spec = _adaptive_spec(output_size, dims)
    _check_input(x, dims)
    _check_map(spec, x, dims)
    if training and keep < 1.0:
        return _pool(x, spec, keep, scale, dims)
    bins = [x.shape[axis] if size < 0 else size for axis, size in zip(range(-dims, 0), spec.size[2 - dims :], strict=True)]
    return F.adaptive_avg_pool1d(x, bins) if dims == 1 else F.adaptive_avg_pool2d(x, (bins[0], bins[1]))


def _adaptive_spec(output_size: Size | Sequence[int | None] | None, dims: int) -> PoolSpec:
    wanted = (output_size,) * dims if isinstance(output_size, int) or output_size is None else tuple(output_size)
    if any(size is not None and size < 1 for size in wanted):
        raise ConfigError("output_size must be positive", evidence=f"output_size={output_size!r}")
    return PoolSpec(1, _two(_numbers([-1 if size is None else size for size in wanted], dims, "output_size", -1), 1))


def pool_spec(module: nn.Module) -> tuple[PoolSpec, int]:
    """What an average-pool module of torch, or a stochastic one, does: its specification and 1 or 2 dimensions.

    Raises ConfigError for any other module.
    """
    if isinstance(module, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)):
        dims = 1 if isinstance(module, nn.AdaptiveAvgPool1d) else 2
        return _adaptive_spec(module.output_size, dims), dims
    if isinstance(module, (nn.AvgPool1d, nn.AvgPool2d)):
        dims = 1 if isinstance(module, nn.AvgPool1d) else 2
        divisor = getattr(module, "divisor_override", None)
        flags = (module.ceil_mode, module.count_include_pad, divisor)
        return _sliding_spec(module.kernel_size, module.stride, module.padding, *flags, dims), dims
    raise ConfigError("this module is no average pool in one or two dimensions", evidence=type(module).__name__)


def _pool(x: Tensor, spec: PoolSpec, keep: float, scale: Scale, dims: int) -> Tensor:
    """The training path, for maps of any of the four ranks."""
    maps = x.unsqueeze(-2) if dims == 1 else x
    batched = maps if maps.dim() == 4 else maps.unsqueeze(0)
    factor = float(scale) if isinstance(scale, (int, float)) else 1.0
    seed = torch.randint(SEED_LIMIT, (), dtype=torch.int64, device=x.device)
    out: Tensor = stochastic_pool(batched, seed, _rank(), spec.encode(), keep, factor, scale == "sqrt")
    if scale == "match":
        out = out * matching_scale(batched.detach(), spec, keep).to(out.dtype)
    out = out if maps.dim() == 4 else out.squeeze(0)
    return out.squeeze(-2) if dims == 1 else out


def _rank() -> int:
    """Rank of this process: replicas that start from one seed must still draw different subsets."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


def matching_scale(x: Tensor, spec: PoolSpec, keep: float) -> Tensor:
    """Factor that gives the unscaled training output the second moment of the evaluation output, on `x`.

    With m the mean and S^2 the unbiased variance of a window of N cells of which n are kept,
    `s^2 = E[m^2] / E[m^2 + S^2 / n * (1 - n / N)]`, E over samples, channels and windows; exact over the draw of the subsets.

    Args:
        x: (N, C, H, W).
        spec: the pooling layer.
        keep: keep probability.

    Returns:
        Scalar in (0, 1], float32 or float64; 1 where the second moment is zero.

    Source: derived here.
    """
    evaluation, training, _ = second_moments(x, windows_of(spec, (x.shape[2], x.shape[3]), keep))
    return torch.where(training > 0, (evaluation / training).sqrt(), torch.ones_like(training))


def second_moments(x: Tensor, windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
    """Second moments of the pooled output: in evaluation, in training unscaled, and in training under sqrt(n / N); scalars.

    Exact expectations over the subsets; `windows` supplies the pooling layer and its subset sizes.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    cells, kept, padding_factor = _per_window(windows, wide)
    means = _plain_mean(wide, windows)
    spread = (_plain_mean(wide.square(), windows) - means.square()).clamp_min(0.0) * (cells / (cells - 1).clamp_min(1))
    evaluation = (means * padding_factor).square()
    training = evaluation + spread * (1 / kept - 1 / cells) * padding_factor.square()
    return evaluation.mean(), training.mean(), (training * (kept / cells)).mean()


def _per_window(windows: Windows, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of cells, subset size, and torch's factor for padding, each (out height, out width)."""
    cells = [window.cells for window in windows.all]
    kept = [window.kept for window in windows.all]
    factors = [window.padding_factor for window in windows.all]
    made = [torch.tensor(values, dtype=like.dtype, device=like.device).view(windows.out_size) for values in (cells, kept, factors)]
    return made[0], made[1], made[2]


def _plain_mean(x: Tensor, windows: Windows) -> Tensor:
    """Mean of the real cells of each window."""
    spec = windows.spec
    if spec.adaptive:
        return F.adaptive_avg_pool2d(x, windows.out_size)
    return F.avg_pool2d(x, spec.size, spec.stride, spec.padding, bool(spec.ceil_mode), False)
