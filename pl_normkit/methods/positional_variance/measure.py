"""The probe: does the training data weigh the positional embedding as the evaluation data does?"""

from __future__ import annotations

__all__ = ["SplitVariance", "VarianceReport", "generators_kept", "measure_positional_variance", "observe", "watch"]

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from pl_normkit.errors import ConfigError, DataError, NothingMatchedError
from pl_normkit.graph import call_arguments
from pl_normkit.methods.positional_variance.find import PositionalSite, added_positions, patch_variance, trace_site
from pl_normkit.methods.positional_variance.moments import Estimate, ImageMoments, MomentSums
from pl_normkit.preserve import preserved
from pl_normkit.wrappers import unwrapped

TOLERANCE = 0.05


@dataclass(frozen=True)
class SplitVariance:
    """What one loader puts before the first attention.

    Attributes:
        tokens: Var[X] of the patch tokens, over channels per token, mean over tokens.
        positions: Var[P] of the positional embedding of the patch tokens, as added at this resolution.
        images: moments per channel of the image that the patch projection reads.
        batches: number of batches seen.
        error: standard error of `tokens`: how far it may be off for the images that were not drawn.
    """

    tokens: float
    positions: float
    images: ImageMoments
    batches: int
    error: float = 0.0

    @property
    def ratio(self) -> float:
        """Var[X] / Var[P]; infinite for an embedding of zeros."""
        return self.tokens / self.positions if self.positions > 0 else float("inf")


@dataclass(frozen=True)
class VarianceReport:
    """Training against evaluation.

    Attributes:
        train: with the training loader's augmentation.
        evaluation: without it.
    """

    train: SplitVariance
    evaluation: SplitVariance

    @property
    def rho(self) -> float:
        """Var[X_train] / Var[X_eval]; 1 where augmentation does not change how much positions weigh."""
        return self.train.tokens / self.evaluation.tokens

    @property
    def estimate(self) -> Estimate:
        """`rho` with its standard error."""
        return Estimate(self.train.tokens, self.train.error).over(Estimate(self.evaluation.tokens, self.evaluation.error))

    @property
    def balance(self) -> float:
        """(Var[X] / Var[P]) at train over the same at evaluation; differs from `rho` where the two resolutions differ."""
        return self.rho * self.evaluation.positions / self.train.positions if self.train.positions > 0 else self.rho

    def fits(self, tolerance: float = TOLERANCE) -> bool:
        """Whether the balance is within `tolerance` of 1."""
        return abs(self.balance - 1.0) <= tolerance

    def __str__(self) -> str:
        rows = [f"rho = Var[X_train] / Var[X_eval] = {self.rho:.3f} +- {self.estimate.error:.3f} (should be 1 within {TOLERANCE:.0%})"]
        if abs(self.balance / self.rho - 1.0) > 1e-3:
            rows.append(
                f"with Var[P], which the two image sizes resample differently: {self.balance:.3f} (should be 1 within {TOLERANCE:.0%})"
            )
        for name, split in (("train", self.train), ("eval", self.evaluation)):
            mean = ", ".join(f"{value:.3f}" for value in split.images.mean)
            square = ", ".join(f"{value:.3f}" for value in split.images.second_moment)
            rows.append(
                f"{name:>5}: Var[X] {split.tokens:.4g}, Var[P] {split.positions:.4g}, X/P {split.ratio:.4g}; "
                f"image E[I] ({mean}), E[I^2] ({square}); {split.batches} batches"
            )
        return "\n".join(rows)


def measure_positional_variance(
    model: nn.Module, train_loader: Iterable[Any], eval_loader: Iterable[Any], *, max_batches: int = 8
) -> VarianceReport:
    """Measure the variance of patch tokens and positions on training and evaluation data, through the model's own patch embedding.

    Each batch runs through the model up to the patch embedding and no further. The model, its buffers, its mode, every RNG and
    the loaders' generators are as before. What the training step does to a batch is measured by handing it in:
    `(mixup(*batch) for batch in train_loader)`.

    Args:
        model: a vision transformer with absolute positional embedding and real weights.
        train_loader: batches as training sees them: tensors, tuples or lists (the first 4-D floating tensor is the image), or
            dicts (entries that `forward` names, else the image).
        eval_loader: batches as evaluation sees them.
        max_batches: at most so many batches are drawn from each.

    Raises:
        ConfigError: for max_batches < 1.
        DataError: for a loader without batches, batches without floating images (N, C, H, W), or values that are not finite.
        NothingMatchedError: where the model adds no absolute positional embedding to patch tokens.
        TraceError: where the model cannot be traced.

    Source: the condition Var[X_train]/Var[P_train] = Var[X_test]/Var[P_test] is published (public reviews of arXiv 2405.14115);
    over what the variance is taken is derived here.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    >>> train, test = [torch.randn(8, 3, 32, 32)], [torch.randn(8, 3, 32, 32)]
    >>> report = measure_positional_variance(model, train, test)
    >>> 0.8 < report.rho < 1.25
    True
    """
    if max_batches < 1:
        raise ConfigError("max_batches must be at least 1", evidence=str(max_batches))
    network = unwrapped(model)
    with preserved(network, buffers=True), generators_kept(train_loader), generators_kept(eval_loader):
        train = _measure_split(network, train_loader, max_batches, training=True)
        evaluation = _measure_split(network, eval_loader, max_batches, training=False)
    for name, split in (("train_loader", train), ("eval_loader", evaluation)):
        if not math.isfinite(split.tokens):
            raise DataError("images or weights hold values that are not finite", where=name, evidence=f"Var[X] is {split.tokens}")
    if evaluation.tokens == 0.0 or max(evaluation.images.std) < 1e-6:
        raise DataError("the evaluation images are constant: no ratio can be taken", where="eval_loader")
    return VarianceReport(train, evaluation)


def _measure_split(model: nn.Module, loader: Iterable[Any], max_batches: int, *, training: bool) -> SplitVariance:
    sums, positions, batches = MomentSums(), 0.0, 0
    sites: dict[tuple[int, ...], PositionalSite] = {}
    model.train(training)
    for batch in islice(loader, max_batches):
        inputs, image = model_inputs(model, batch)
        size = tuple(image.shape[1:])
        if size not in sites:
            sites[size] = trace_site(model, inputs)
        observe(model, sites[size], inputs, sums)
        if not sites[size].images:
            sums.add_images(image)
        positions += variance_of_positions(model, sites[size])
        batches += 1
    if not batches:
        raise DataError("the loader gave no batch", where="train_loader" if training else "eval_loader")
    tokens = Estimate.from_totals(sums.totals)
    return SplitVariance(tokens.value, positions / batches, sums.images, batches, tokens.error)


def variance_of_positions(model: nn.Module, site: PositionalSite) -> float:
    """Var[P] of the patch tokens' positions, as the forward pass of the site's trace adds them."""
    return patch_variance(added_positions(model, site)[site.first : site.first + site.count])


def model_inputs(model: nn.Module, batch: Any) -> tuple[Any, Tensor]:
    """What `model` is called with for `batch`, on its device, and the image in it. Raises DataError where there is none."""
    weight = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    image = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() == 4), None)
    if image is None or not image.is_floating_point():
        seen = "none" if image is None else f"{image.dtype} {tuple(image.shape)}"
        raise DataError(
            "a batch holds no normalised images: a floating tensor (N, C, H, W)",
            evidence=f"4-D tensor: {seen}",
            fix="normalise them first",
        )
    inputs: Any = (image,)
    if isinstance(batch, Mapping):
        wanted = inspect.signature(model.forward).parameters
        inputs = {key: value for key, value in batch.items() if key in wanted} or inputs

    def move(tensor: Tensor) -> Tensor:
        dtype = weight.dtype if weight is not None and tensor.is_floating_point() else None
        return tensor.to(weight.device if weight is not None else None, dtype)

    return tree_map_only(Tensor, move, inputs), image


class _Reached(Exception):  # noqa: N818 - it ends a forward pass early and is no error
    """The patch embedding has run."""


@torch.no_grad()
def observe(model: nn.Module, site: PositionalSite, inputs: Any, sums: MomentSums) -> None:
    """Run `model` up to its patch embedding and add what is seen to `sums`. Raises NothingMatchedError where it does not run."""
    args, kwargs = call_arguments(inputs)
    with watch(model, site, sums):
        handle = model.get_submodule(site.tokens).register_forward_hook(_stop)
        try:
            model(*args, **kwargs)
        except _Reached:
            return
        finally:
            handle.remove()
    raise NothingMatchedError("the patch embedding did not run", where=site.tokens, fix="give batches that the traced forward reads")


def _stop(*_: Any) -> None:
    raise _Reached


@contextmanager
def watch(model: nn.Module, site: PositionalSite, sums: MomentSums) -> Iterator[None]:
    """While the block runs, every pass through the patch embedding adds its tokens and images to `sums`."""
    handles = [model.get_submodule(site.tokens).register_forward_hook(lambda _m, _a, out: sums.add_tokens(out, site.channel_dim))]
    if site.images:
        handles.append(model.get_submodule(site.images).register_forward_pre_hook(lambda _m, args: sums.add_images(args[0])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def generators_kept(loader: Any) -> Iterator[None]:
    """Iterating a DataLoader draws from its own generators too; what prefetches from it holds it as `loader`."""
    loaders = [loader, getattr(loader, "loader", None), getattr(getattr(loader, "loader", None), "loader", None)]
    holders = [*loaders, *(getattr(inner, name, None) for inner in loaders for name in ("sampler", "batch_sampler"))]
    found = {id(g): g for holder in holders if isinstance(g := getattr(holder, "generator", None), torch.Generator)}
    states = [(generator, generator.get_state()) for generator in found.values()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
