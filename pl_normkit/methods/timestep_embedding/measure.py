"""How much of the difference between two times each norm lets through, measured on one input. Nothing in the model changes."""

from __future__ import annotations

__all__ = ["NormAwareness", "TimeAwareness", "compare_calls", "measure_time_awareness"]

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves

from pl_normkit.errors import ConfigError, NothingMatchedError
from pl_normkit.graph import call_arguments
from pl_normkit.methods.timestep_embedding.share import surviving_share
from pl_normkit.preserve import preserved
from pl_normkit.wrappers import unwrapped

VANISHED = 0.1
WEAKENED = 0.6
ROUNDING = 1e-10
"""A sensitivity below it is float32's rounding behind a norm that took everything, and no time."""

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class NormAwareness:
    """One norm and the difference that a change of time makes before and behind it.

    A sensitivity is the mean square of the difference over the variance of the value. Norms are taken without their affine parameters,
    batch norms in training mode.

    Attributes:
        module: path of the norm.
        kind: class of the norm.
        channels: channels it normalizes.
        groups: its groups, 0 for a batch norm.
        arriving: sensitivity of its input; 0 where the time enters elsewhere.
        leaving: sensitivity of its output.
        share: leaving / arriving; NaN where nothing arrives.
        circular: the same share with circular padding in every convolution. Zero padding lets a constant plane leak at the border, which
            hides that a norm takes it away, the more so the smaller the image is.
        evaluation: for a batch norm the share with its running statistics; for other norms NaN.
        relative_variance: variance over channels of the difference's spatial means, over the spatial variance of the input.
        predicted: sensitivity that the formula of `surviving_share` gives for the output of a group norm; NaN for other norms.
    """

    module: str
    kind: str
    channels: int
    groups: int
    arriving: float
    leaving: float
    share: float
    circular: float
    evaluation: float
    relative_variance: float
    predicted: float

    @property
    def verdict(self) -> str:
        """ "vanished" below a share of .1, "weakened" below .6 (both thresholds derived), "kept" above; "no time" where none arrives."""
        if math.isnan(self.circular):
            return "no time"
        return "vanished" if self.circular < VANISHED else "weakened" if self.circular < WEAKENED else "kept"


@dataclass(frozen=True)
class TimeAwareness:
    """What `measure_time_awareness` found.

    Attributes:
        norms: norms in execution order.
        sensitivity: mean square of the difference of the outputs at the two times, over the variance of the output.
        circular: the same with circular padding in every convolution.
        loss: loss on the batch; NaN where no loss was given.
        shuffled_loss: loss when each sample gets the time of the one before it; NaN where no loss was given or all samples share one time.
    """

    norms: tuple[NormAwareness, ...]
    sensitivity: float
    circular: float
    loss: float = math.nan
    shuffled_loss: float = math.nan

    def to_json(self) -> str:
        """A JSON object; what is not finite becomes null."""
        return json.dumps(_finite(asdict(self)), indent=2, allow_nan=False)

    def curves(self) -> dict[str, dict[str, float]]:
        """For the page of a report: the share of the time that each norm leaves, with circular padding, and what arrives there."""
        reached = [norm for norm in self.norms if not math.isnan(norm.circular)]
        return {
            "share that leaves the norm": {norm.module: norm.circular for norm in reached},
            "sensitivity that arrives": {norm.module: norm.arriving for norm in reached},
        }

    def __str__(self) -> str:
        width = max([len(norm.module) for norm in self.norms] + [4])
        lines = [f"{'norm':{width}}  channels  groups  arriving   leaving  share  circular  verdict"]
        for norm in self.norms:
            numbers = f"{norm.arriving:9.2e} {norm.leaving:9.2e} {norm.share:6.2f} {norm.circular:9.2f}"
            lines.append(f"{norm.module:{width}}  {norm.channels:8}  {norm.groups or '-':>6} {numbers}  {norm.verdict}")
        lines.append(f"output: sensitivity to time {self.sensitivity:.2e}, with circular padding {self.circular:.2e}")
        if not math.isnan(self.loss):
            lines.append(f"loss {self.loss:.4g}, with times shuffled in the batch {self.shuffled_loss:.4g}")
        lines.append("Zero padding leaks a constant plane at the border; the circular columns show the norms alone.")
        return "\n".join(lines)

    def plot(self, path: Path) -> None:
        """A picture of the share along depth, with circular padding and as the model is."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2 + 0.3 * len(self.norms), 4), layout="constrained")
        axes = figure.subplots()
        depth = range(len(self.norms))
        axes.plot(depth, [max(norm.circular, 1e-4) for norm in self.norms], "o-", label="circular padding")
        axes.plot(depth, [max(norm.share, 1e-4) for norm in self.norms], "x:", label="as it is")
        for threshold in (VANISHED, WEAKENED):
            axes.axhline(threshold, color="grey", linewidth=0.8, linestyle="--")
        axes.set_yscale("log")
        axes.set_ylabel("share of the time signal behind the norm")
        axes.set_xticks(depth, [norm.module for norm in self.norms], rotation=90, fontsize=7)
        axes.legend()
        figure.savefig(path)


def measure_time_awareness(
    model: nn.Module,
    batch: Any,
    times: Sequence[Any] | None = None,
    *,
    time: int | str | None = None,
    loss: Callable[[Any], Tensor] | None = None,
) -> TimeAwareness:
    """Run a model at two times on the same input and compare what arrives at each norm with what leaves it.

    Dropout is off and batch norms use the statistics of the batch. A norm that runs several times counts with its first run.

    Args:
        model: any module, also one that cannot be traced; modes, buffers, attributes and every RNG stay as they are.
        batch: what it is called with: a tensor, a tuple of positional or a dict of keyword arguments; the time among them.
        times: two times, each a number that the whole batch shares or a tensor like the time in the batch. Batch norms take away a time
            that is shared and leave most of one that differs from sample to sample: give them the times of your training.
        time: which argument is the time, by position or name; by default the only one with at most one dimension.
        loss: from the model's output to the loss on this batch; with it the loss at the batch's own times and at shuffled ones is reported.

    Returns:
        numbers norm by norm and end to end.

    Raises:
        ConfigError: where it is not known which argument is the time, or `times` are not two different ones.
        NothingMatchedError: when no norm ran.

    Source: definitions derived here: tests/methods/timestep_embedding/test_measure.py.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.InstanceNorm2d(8)
    ...     def forward(self, t, x):
    ...         return self.norm(self.conv(torch.cat([t * torch.ones_like(x[:, :1]), x], 1)))
    >>> found = measure_time_awareness(Block(), (torch.tensor(0.0), torch.randn(2, 3, 8, 8)), (0.0, 1.0))
    >>> found.norms[0].verdict, found.circular < 1e-10
    ('vanished', True)
    """
    model = unwrapped(model)
    arguments = call_arguments(batch)
    key = _time_argument(arguments) if time is None else time
    times = _own_times(_argument(arguments, key)) if times is None else times
    if len(times) != 2:
        raise ConfigError("two times are compared", where="times", evidence=f"{len(times)} were given")
    first, second = (_with_time(arguments, key, value) for value in times)
    if torch.equal(torch.as_tensor(_argument(first, key)), torch.as_tensor(_argument(second, key))):
        raise ConfigError("the two times are the same", where="times", evidence=repr(times[0]))
    found = compare_calls(model, first, second)
    if not found.norms:
        raise NothingMatchedError("no norm ran")
    if loss is None:
        return found
    before, shuffled = _losses(model, arguments, key, loss)
    return replace(found, loss=before, shuffled_loss=shuffled)


def compare_calls(model: nn.Module, first: Call, second: Call) -> TimeAwareness:
    """What two calls of a model that differ in time alone make of its norms and output; norms that are no modules are not seen."""
    with _measuring(model):
        plain, sensitivity = _differences(model, first, second)
        with _circular(model):
            circular, circular_sensitivity = _differences(model, first, second)
        has_statistics = any(isinstance(module, _BatchNorm) and module.running_mean is not None for module in model.modules())
        evaluation = _differences(_evaluating(model), first, second)[0] if has_statistics else {}
    norms = []
    for path, found in plain.items():
        module = model.get_submodule(path)
        is_batch = isinstance(module, _BatchNorm) and path in evaluation
        norms.append(replace(found, circular=circular[path].share, evaluation=evaluation[path].share if is_batch else math.nan))
    return TimeAwareness(tuple(norms), sensitivity, circular_sensitivity)


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but for norms that have statistics of the batch."""
    with preserved(model, buffers=True), torch.no_grad():
        model.eval()
        for module in model.modules():
            if isinstance(module, _NormBase):
                module.train()
        yield


def _evaluating(model: nn.Module) -> nn.Module:
    return model.eval()


def _differences(model: nn.Module, first: Call, second: Call) -> tuple[dict[str, NormAwareness], float]:
    before: dict[str, Tensor] = {}
    found: dict[str, NormAwareness] = {}

    def keep(path: str, module: nn.Module, value: Tensor) -> None:
        before.setdefault(path, value.detach().clone())

    def compare(path: str, module: nn.Module, value: Tensor) -> None:
        if path not in found and path in before and before[path].shape == value.shape:
            found[path] = _awareness(path, module, before.pop(path), value)

    state = torch.get_rng_state()
    with _watching(model, keep):
        output = _first_tensor(model(*first[0], **first[1]))
    torch.set_rng_state(state)  # a model that draws noise draws the same
    with _watching(model, compare):
        changed = _first_tensor(model(*second[0], **second[1]))
    return found, _sensitivity(output, changed)


@contextmanager
def _watching(model: nn.Module, act: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)):

                def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], path: str = path) -> None:
                    act(path, module, arguments[0] if arguments else next(iter(keywords.values())))

                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def _circular(model: nn.Module) -> Iterator[None]:
    """Circular padding in every convolution whose input is large enough for it."""

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, _ConvNd)
        pads = module._reversed_padding_repeated_twice
        sizes = reversed(arguments[0].shape[2:])
        fits = all(max(pads[2 * axis : 2 * axis + 2]) <= size for axis, size in enumerate(sizes))
        module.padding_mode = "circular" if fits else modes[module]

    convs = [module for module in model.modules() if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)]
    modes = {module: module.padding_mode for module in convs}
    with ExitStack() as stack:
        for conv in convs:
            stack.callback(conv.register_forward_pre_hook(hook).remove)
        try:
            yield
        finally:
            for conv, mode in modes.items():
                conv.padding_mode = mode


def _awareness(path: str, module: nn.Module, before: Tensor, after: Tensor) -> NormAwareness:
    before, after = before.float(), after.float()
    is_last = isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    channels = before.shape[-1] if is_last else before.shape[1]
    groups = 1 if is_last else module.num_groups if isinstance(module, nn.GroupNorm) else 0 if isinstance(module, _BatchNorm) else channels
    arriving = _sensitivity(before, after)
    leaving = _sensitivity(_normalized(module, before), _normalized(module, after))
    relative, predicted = (math.nan, math.nan) if is_last or before.dim() < 3 else _variances(before, after, channels, groups)
    share = leaving / arriving if arriving > ROUNDING else math.nan
    return NormAwareness(
        path,
        type(module).__name__,
        channels,
        groups,
        arriving,
        leaving,
        share,
        math.nan,
        math.nan,
        relative,
        predicted if groups else math.nan,
    )


def _variances(before: Tensor, after: Tensor, channels: int, groups: int) -> tuple[float, float]:
    """Variance over channels of the difference over the spatial variance of the input; the predicted sensitivity behind the norm."""
    means, moved = before.flatten(2).mean(2), (after - before).flatten(2).mean(2)
    space = float(before.flatten(2).var(2, unbiased=False).mean())
    time = float(moved.var(1, unbiased=False).mean()) if channels > 1 else 0.0
    static = float(means.var(1, unbiased=False).mean()) - time if channels > 1 else 0.0
    return time / space if space > 0 else math.nan, surviving_share(channels, groups or channels, time, space, static)


def _normalized(module: nn.Module, value: Tensor) -> Tensor:
    """The norm without its affine parameters: these take no time away."""
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(value, module.num_groups, eps=module.eps)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(value, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(value, list(module.normalized_shape), eps=module.eps)
    assert isinstance(module, _NormBase)
    uses_batch = module.training or module.running_mean is None
    mean, variance = (None, None) if uses_batch else (module.running_mean, module.running_var)
    if isinstance(module, _InstanceNorm):
        return F.instance_norm(value, mean, variance, use_input_stats=uses_batch, eps=module.eps)
    return F.batch_norm(value, mean, variance, training=uses_batch, eps=module.eps)


def _sensitivity(before: Tensor, after: Tensor) -> float:
    before, after = before.double(), after.double()
    variance = float(before.var(unbiased=False))
    return float((after - before).square().mean()) / variance if variance > 0 else math.nan


def _first_tensor(output: Any) -> Tensor:
    if is_dataclass(output) and not isinstance(output, type):
        output = list(vars(output).values())
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def _time_argument(arguments: Call) -> int | str:
    everything: list[tuple[int | str, Any]] = [*enumerate(arguments[0]), *arguments[1].items()]
    found = [key for key, value in everything if _may_be_time(value)]
    if len(found) != 1:
        raise ConfigError(
            "it is not known which argument is the time",
            evidence=f"{len(found)} arguments have at most one dimension",
            fix="say time=, its position or name",
        )
    return found[0]


def _may_be_time(value: Any) -> bool:
    return value.dim() <= 1 if isinstance(value, Tensor) else isinstance(value, (int, float)) and not isinstance(value, bool)


def _argument(arguments: Call, key: int | str) -> Any:
    positional, keywords = arguments
    known = key in keywords if isinstance(key, str) else 0 <= key < len(positional)
    if not known:
        raise ConfigError("the batch has no such argument", where="time", evidence=repr(key))
    return keywords[key] if isinstance(key, str) else positional[key]


def _own_times(own: Any) -> tuple[Any, Any]:
    """Those of the batch, and each given to the next sample."""
    return own, own.roll(1, 0) if isinstance(own, Tensor) and own.dim() else own


def _with_time(arguments: Call, key: int | str, value: Any) -> Call:
    old = _argument(arguments, key)
    if isinstance(old, Tensor):
        new = torch.as_tensor(value, device=old.device)
        value = new.to(old.dtype).expand(old.shape).contiguous()
    positional, keywords = arguments
    if isinstance(key, str):
        return positional, {**keywords, key: value}
    return (*positional[:key], value, *positional[key + 1 :]), keywords


def _losses(model: nn.Module, arguments: Call, key: int | str, loss: Callable[[Any], Tensor]) -> tuple[float, float]:
    """At the batch's own times, and with each sample's time given to the next."""
    own = _argument(arguments, key)
    shuffled = math.nan
    state = torch.get_rng_state()
    with _measuring(model):
        before = float(loss(model(*arguments[0], **arguments[1])))
        torch.set_rng_state(state)
        if isinstance(own, Tensor) and own.dim() and len(own) > 1:
            positional, keywords = _with_time(arguments, key, own.roll(1, 0))
            shuffled = float(loss(model(*positional, **keywords)))
    return before, shuffled


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
