"""The probe: one forward pass, with a loss one backward pass, and numbers at every residual addition."""

from __future__ import annotations

__all__ = ["DepthProbe", "gradients_of", "measure_depth_profile"]

import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, NothingMatchedError
from pl_normkit.graph import ModelGraph, call_arguments
from pl_normkit.methods.depth_profile.find import Addition, find_additions
from pl_normkit.methods.depth_profile.profile import AdditionProfile, DepthProfile
from pl_normkit.methods.depth_profile.statistics import Tokens, angle_between, entropies_in, massive_in, summarize
from pl_normkit.methods.depth_profile.watch import Step, watched_additions
from pl_normkit.preserve import preserved
from pl_normkit.wrappers import unwrapped

LossFunction = Callable[[Any], Tensor]


def measure_depth_profile(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None = None,
    *,
    mask: Tensor | None = None,
    span: int = 2,
    skip: bool = False,
    entropy: bool = False,
) -> DepthProfile:
    """What each residual addition does to the stream: variances, angles, largest activations; with a loss also gradients.

    The batch runs once forward, in the model's own mode, and with a loss once backward. Parameters, their `.grad`, buffers, mode and
    every RNG stay as they are. Dropout in train mode acts as it does in training: call `model.eval()` before to leave it out.

    Args:
        model: any module with residual additions; one that is compiled or wrapped for several devices is read through to the original.
        batch: a tensor, a tuple of positional or a dict of keyword arguments.
        loss_fn: from the model's output to the scalar loss: `lambda output: output.loss`.
        mask: (N, T), True or 1 at tokens that count; an `attention_mask` of that shape in `batch` is taken by itself.
        span: additions between the two streams of the angle; two are one transformer block.
        skip: also measure the loss without each branch, one forward pass an addition; needs `loss_fn`.
        entropy: also measure the entropy of attention weights, which fused attention makes anew of queries and keys: memory for
            (N, heads, T, T) in float32. `nn.MultiheadAttention` shows neither.

    Raises:
        NothingMatchedError: when no residual addition was found, or none ran as it was traced.
        TraceError: when `torch.export` cannot read the model.
        ConfigError: for `skip` without a loss, a loss that is not a scalar, a span below 1, or a model on the meta device.

    Source: derived here. Variances by depth are those of arXiv 2502.05795, the angle is that of its section 2 without the rescaling of
    its plots; the definition of massive activations is that of arXiv 2402.17762.

    >>> from torch import nn
    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
    >>> profile = measure_depth_profile(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 4, 8))
    >>> [row.module for row in profile.additions]
    ['layers.0', 'layers.0', 'layers.1', 'layers.1']
    """
    return DepthProbe(model, batch, span=span).measure(batch, loss_fn, mask=mask, skip=skip, entropy=entropy)


class DepthProbe:
    """A model whose residual additions are known, to be measured on any number of batches; tracing costs more than measuring.

    Args:
        model: as for `measure_depth_profile`.
        batch: inputs to trace it with.
        span: additions between the two streams of the angle.

    Attributes:
        model: the module under compile and DDP.
        additions: its residual additions in depth order.
    """

    def __init__(self, model: nn.Module, batch: Any, *, span: int = 2, graph: ModelGraph | None = None) -> None:
        if span < 1:
            raise ConfigError("the span of the angle is at least one addition", evidence=str(span))
        self.model = unwrapped(model)
        if any(parameter.is_meta for parameter in self.model.parameters()):
            raise ConfigError("a model on the meta device has no values to measure", fix="build it on the CPU")
        graph = ModelGraph.from_model(self.model, batch, training=self.model.training) if graph is None else graph
        self.span = span
        self.additions = find_additions(graph)
        if not self.additions:
            raise NothingMatchedError("no residual addition was found", fix="profile the network that holds the blocks")
        self._parameters = dict(self.model.named_parameters())

    def measure(
        self, batch: Any, loss_fn: LossFunction | None = None, *, mask: Tensor | None = None, skip: bool = False, entropy: bool = False
    ) -> DepthProfile:
        """The profile on one batch; see `measure_depth_profile`."""
        if skip and loss_fn is None:
            raise ConfigError("the cost of skipping a branch needs a loss", fix="give loss_fn")
        mask = _mask_in(batch) if mask is None else mask
        rows: dict[Addition, AdditionProfile] = {}
        history: deque[Tokens] = deque(maxlen=self.span)
        with _measuring(self.model), torch.set_grad_enabled(loss_fn is not None):
            visit = lambda step: rows.__setitem__(step.addition, _row(step, mask, history))  # noqa: E731 - the watch calls it
            with watched_additions(self.model, self.additions, visit, attends=entropy) as list_unread:
                output = _call(self.model, batch)
            unread = list_unread()
            found = {addition: row for addition, row in rows.items() if addition not in unread}
            if not found:
                raise NothingMatchedError(
                    "no residual addition ran as it was traced", where=", ".join(add.module for add in self.additions)
                )
            loss = None
            if loss_fn is not None:
                scalar = _scalar(loss_fn(output))
                found, loss = self._with_gradients(found, scalar), float(scalar.detach())
        if skip and loss_fn is not None and loss is not None:
            found = self._with_skip_costs(found, batch, loss_fn, loss)
        missing = tuple(addition.module for addition in self.additions if addition not in found)
        return DepthProfile(tuple(found.values()), self.span, loss, missing)

    def _with_gradients(self, rows: dict[Addition, AdditionProfile], loss: Tensor) -> dict[Addition, AdditionProfile]:
        names = {name: p for addition in rows for name, p in self._weights(addition) if p.requires_grad}
        if not names or not loss.requires_grad:
            return rows
        gradients = dict(zip(names, torch.autograd.grad(loss, list(names.values()), allow_unused=True), strict=True))
        return {addition: _with_gradient(row, [gradients.get(n) for n, _ in self._weights(addition)]) for addition, row in rows.items()}

    def _with_skip_costs(
        self, rows: dict[Addition, AdditionProfile], batch: Any, loss_fn: LossFunction, loss: float
    ) -> dict[Addition, AdditionProfile]:
        costs = {}
        for addition in rows:
            with _measuring(self.model), torch.no_grad(), watched_additions(self.model, self.additions, _ignore, skipped=addition):
                costs[addition] = float(_scalar(loss_fn(_call(self.model, batch)))) - loss
        return {addition: replace(row, skip_cost=costs[addition]) for addition, row in rows.items()}

    def _weights(self, addition: Addition) -> list[tuple[str, nn.Parameter]]:
        """The weight matrices and kernels of its branches."""
        known = [(name, self._parameters[name]) for name in addition.parameters if name in self._parameters]
        return [(name, parameter) for name, parameter in known if parameter.dim() > 1]

    @property
    def is_one_stack(self) -> bool:
        """Whether the main stream has as many channels everywhere, and its first and last quarter have blocks of one list in common.

        Gradients of stages of different width, of an encoder and its decoder, and of blocks that read a single token (CaiT) are not
        comparable.
        """
        stream = [addition for addition in self.additions if not addition.is_nested]
        lists = [re.sub(r"\d+", "", addition.block) for addition in stream]
        quarter = max(1, len(lists) // 4)
        return len({addition.width for addition in stream}) == 1 and not set(lists[:quarter]).isdisjoint(lists[-quarter:])

    def live_gradients(self) -> list[tuple[str, float | None, int]]:
        """(block, root mean square gradient, number of elements) of the `.grad` that the weights hold now, for `gradient_ratio`."""
        stream = [addition for addition in self.additions if not addition.is_nested]
        return [(addition.block, *gradients_of([p.grad for _, p in self._weights(addition)])) for addition in stream]


def gradients_of(gradients: Sequence[Tensor | None]) -> tuple[float | None, int]:
    """Root mean square over all elements, and their number; None where there is no gradient."""
    present = [gradient.detach() for gradient in gradients if gradient is not None]
    count = sum(gradient.numel() for gradient in present)
    if not count:
        return None, 0
    norms = torch.stack(
        [torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32)) for gradient in present]
    )
    return float(torch.linalg.vector_norm(norms)) / math.sqrt(count), count


def _with_gradient(row: AdditionProfile, gradients: Sequence[Tensor | None]) -> AdditionProfile:
    gradient, weights = gradients_of(gradients)
    return replace(row, gradient=gradient, weights=weights)


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Nothing lasts, compiled parts run as they are written, and torch's encoder does not take the fused path that adds unseen."""
    fused = torch.backends.mha.get_fastpath_enabled()
    with preserved(model, buffers=True), torch.compiler.set_stance("force_eager"):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def _call(model: nn.Module, batch: Any) -> Any:
    arguments, keywords = call_arguments(batch)
    return model(*arguments, **keywords)


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        seen = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError("loss_fn gives no scalar tensor", evidence=str(seen))
    return loss


def _mask_in(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _ignore(_: Step) -> None:
    return


@torch.no_grad()
def _row(step: Step, mask: Tensor | None, history: deque[Tokens]) -> AdditionProfile:
    addition = step.addition
    stream, branch, shortcut = (
        Tokens.of(value.expand_as(step.stream), addition.channel_axis, mask) for value in (step.stream, step.branch, step.shortcut)
    )
    numbers = summarize(stream)
    branch_variance, shortcut_variance = branch.variance(), shortcut.variance()
    entropy, entropy_lowest = entropies_in(step.entropies, mask) or (None, None)
    angle = None
    if not addition.is_nested:
        angle = angle_between(history[0], stream) if len(history) == history.maxlen else None
        history.append(stream.directions())
    return AdditionProfile(
        module=addition.module,
        source=addition.source,
        block=addition.block,
        dtype=str(step.stream.dtype).removeprefix("torch."),
        is_nested=addition.is_nested,
        branch_variance=branch_variance,
        ratio=branch_variance / shortcut_variance if shortcut_variance > 0.0 else math.inf,
        angle=angle,
        massive=massive_in(stream, numbers.median),
        variance=numbers.variance,
        mean_square=numbers.mean_square,
        largest=numbers.largest,
        largest_elsewhere=numbers.largest_elsewhere,
        median=numbers.median,
        entropy=entropy,
        entropy_lowest=entropy_lowest,
    )
