"""`equalize_scales` in the two stages of a training run: the structure when the model is built, its statistics before the first step."""

from __future__ import annotations

__all__ = ["StagedEqualization"]

from collections.abc import Iterable
from typing import Any

from torch import nn

from pl_normkit.errors import EditError
from pl_normkit.methods.fusion_scale.calibrate import Granularity, calibrate_scales, equalizers_of
from pl_normkit.methods.fusion_scale.find import Site
from pl_normkit.methods.fusion_scale.fix import Mode, check_options, has_statistics, insert_at, plan_sites, split_trained
from pl_normkit.methods.fusion_scale.fold import Border, fold, why_not_foldable
from pl_normkit.methods.fusion_scale.running import InputsOf, Progress
from pl_normkit.surgery import Change, Changes
from pl_normkit.wrappers import unwrapped


class StagedEqualization:
    """Equalizers whose keys are there before a checkpoint is loaded, and whose statistics are taken before training, once.

        staged = StagedEqualization(model, images)
        staged.insert()                                  # now load a checkpoint, build optimizers, wrap the model
        staged.calibrate(train_loader, max_batches=32)   # does nothing where the checkpoint held statistics

    Args:
        network: the model; edited in place.
        example_inputs: what it is traced with, once, here.
        mode: as for `equalize_scales`; with "init" only what cannot be folded is inserted by `insert`.
        granularity: as for `equalize_scales`.
        sums: as for `equalize_scales`.
        border: as for `equalize_scales`.
        allow_trained: calibrate although batch norms behind the fusions have been trained.

    Attributes:
        network: the model without wrappers.

    Raises:
        ConfigError, NothingMatchedError, TraceError: as `equalize_scales`.
    """

    def __init__(
        self,
        network: nn.Module,
        example_inputs: Any,
        *,
        mode: Mode = "explicit",
        granularity: Granularity = "branch",
        sums: bool = False,
        border: Border = "keep",
        allow_trained: bool = False,
    ) -> None:
        check_options(mode, granularity, border)
        self.network = unwrapped(network)
        self._mode: Mode = mode
        self._granularity: Granularity = granularity
        self._border: Border = border
        self._allow_trained = allow_trained
        self._sites, self._skipped = plan_sites(self.network, example_inputs, sums=sums)

    def insert(self) -> Changes:
        """Put the modules in whose keys a checkpoint may hold; they are the identity until `calibrate`."""
        return insert_at(self.network, [site for site in self._sites if self._stands_alone(site)], self._skipped)

    def calibrate(
        self, loader: Iterable[Any], *, max_batches: int | None = None, inputs: InputsOf | None = None, progress: Progress | None = None
    ) -> Changes:
        """Take the statistics where there are none yet, and with "init" fold them; the model is as it was where that fails.

        Arguments and errors are those of `calibrate_scales`; EditError also where all fusions are trained already.
        """
        waiting = [site for site in self._sites if not has_statistics(self.network, site)]
        skipped: list[Change] = []
        if waiting and not self._allow_trained:
            waiting, skipped = split_trained(self.network, waiting)
        if not waiting:
            return Changes(skipped=skipped)
        changes = insert_at(self.network, waiting, skipped)
        try:
            hosts = [site.host for site in waiting]
            options: dict[str, Any] = {"granularity": self._granularity, "max_batches": max_batches, "inputs": inputs}
            changes.add(calibrate_scales(self.network, loader, hosts=hosts, progress=progress, **options))
            if self._mode == "init":
                changes.add(fold(self.network, border=self._border))
                self._check_keys()
        except BaseException:
            changes.undo()
            raise
        return changes

    def _stands_alone(self, site: Site) -> bool:
        """Whether a module of its own stays at the site: always for "explicit", for "init" where it cannot be folded."""
        return self._mode == "explicit" or bool(why_not_foldable(self.network, site.host, site.folds_into, site.obstacle, self._border))

    def _check_keys(self) -> None:
        """What should have been folded and was not would add keys that a checkpoint's reader does not expect."""
        hosts = {path.rpartition(".")[0] for path in equalizers_of(self.network)}
        left = [site.host for site in self._sites if site.host in hosts and not self._stands_alone(site)]
        if left:
            raise EditError(
                'mode="init" cannot write to these weights', where=", ".join(left), evidence="sharded", fix='use mode="explicit"'
            )
