"""Which batches of a training run are compared with which: those right after a validation pass with it, so both meet the same weights."""

from __future__ import annotations

__all__ = ["PairedPasses", "PassSums", "observe_calls", "trace_first_site"]

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pl_normkit.errors import NormkitError
from pl_normkit.methods.positional_variance.find import PositionalSite, trace_site
from pl_normkit.methods.positional_variance.measure import observe
from pl_normkit.methods.positional_variance.moments import Estimate, MomentSums
from pl_normkit.preserve import preserved
from pl_normkit.wrappers import unwrapped


@dataclass
class PassSums:
    """Batches of one kind, counted also where nothing could be measured: ranks must agree on when they add up."""

    sums: MomentSums = field(default_factory=MomentSums)
    batches: int = 0


class PairedPasses:
    """Sums of validation passes and of the training batches after them.

    Args:
        limit: batches of each kind.

    Attributes:
        train: of the pass that counts now.
        validation: the last one.
        is_done: whether the comparison was made, or there is nothing to compare.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.train, self.validation, self._unpaired = PassSums(), PassSums(), PassSums()
        self.is_done = self._is_paired = self._by_images = False

    def wants(self, part: PassSums) -> bool:
        return not self.is_done and part.batches < self.limit

    def count(self, part: PassSums) -> None:
        part.batches += self.wants(part)

    def start_validation(self) -> bool:
        """Whether to compare first: an epoch was shorter than `limit`."""
        if self.is_done:
            return False
        if self._is_paired and self.train.batches:
            return True
        self.validation = PassSums()
        return False

    def end_validation(self) -> None:
        if not self.is_done and self.validation.batches:
            self._unpaired = self.train
            self.train, self._is_paired = PassSums(), True

    @property
    def is_full(self) -> bool:
        return not self.is_done and self._is_paired and self.train.batches >= self.limit

    def fall_back(self) -> bool:
        """Whether anything can be compared at the end; without a pair it is the images, whose moments do not depend on the weights."""
        if self.is_done or not self.validation.batches:
            return False
        self._by_images = not self.train.batches
        if self._by_images:
            self.train = self._unpaired
        return True

    @property
    def compared(self) -> str:
        return "image second moments" if self._by_images else "patch-token variance"

    def totals(self) -> Tensor:
        """What ranks add up, (2, 8): of training and validation."""
        return torch.stack([self.train.sums.totals, self.validation.sums.totals])

    def ratio(self, totals: Tensor) -> Estimate:
        """Training over validation, of the sums of all ranks; not finite where nothing was measured."""
        train, evaluation = totals.double().cpu()
        ratio = Estimate.from_totals(train).over(Estimate.from_totals(evaluation))
        if self._by_images:
            value = float(train[7] / train[6] / (evaluation[7] / evaluation[6]))
            ratio = Estimate(value if math.isfinite(value) else math.nan, ratio.error)
        return ratio


def trace_first_site(calls: Iterable[tuple[nn.Module, Any]]) -> tuple[nn.Module, PositionalSite]:
    """Of networks and what they are called with, the first that adds positions. Raises what kept the last from being read."""
    failure: Exception = NormkitError("no network ran in the first batch")
    for network, inputs in calls:
        try:
            with torch.inference_mode(False), torch.enable_grad():
                return network, trace_site(network, tree_map_only(Tensor, torch.zeros_like, inputs))
        except NormkitError as error:
            failure = error
    raise failure


def observe_calls(network: nn.Module, site: PositionalSite, calls: Iterable[tuple[nn.Module, Any]], sums: MomentSums) -> None:
    """Run the patch embedding of `network` on what it was called with, and add it to `sums`; nothing else changes."""
    original = unwrapped(network)
    for called, inputs in calls:
        if called is network:
            with preserved(original, buffers=True):
                observe(original, site, inputs, sums)
