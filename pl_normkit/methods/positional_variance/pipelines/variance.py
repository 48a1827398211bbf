"""What a subject says of its data and positions, read once for all rules."""

from __future__ import annotations

__all__ = [
    "Data",
    "as_fed",
    "difference",
    "expected_ratio",
    "has_unread_mixing",
    "image_second_moment",
    "is_trained",
    "measured",
    "read_data",
    "read_site",
    "residual",
    "unnormalised",
]

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pl_normkit.errors import DataError, NothingMatchedError, TraceError
from pl_normkit.methods.positional_variance.find import PositionalSite, find_site
from pl_normkit.methods.positional_variance.measure import TOLERANCE, VarianceReport, measure_positional_variance
from pl_normkit.methods.positional_variance.pipelines.effects import (
    Border,
    Candidate,
    Erasing,
    Mixing,
    Normalization,
    Step,
    natural_second_moment,
    steps_of,
)
from pl_normkit.methods.positional_variance.pipelines.resampling import as_rows, looks_trained, patch_rows
from pl_normkit.methods.positional_variance.pipelines.walk import BATCH_HOOKS, own_hook, read_loader, read_owner
from pl_normkit.preserve import preserved
from pl_normkit.rules import Subject


@dataclass(frozen=True)
class Data:
    """What happens to a batch, in order: in the loaders, and between the training loader and the model.

    `is_read` says whether both loaders show transforms at all, so that what is not among their steps is not there.
    """

    train: Sequence[Step] = ()
    later: Sequence[Step] = ()
    evaluation: Sequence[Step] = ()
    is_read: bool = False

    def normalization(self, step: Step | None = None) -> Normalization | None:
        """The training images' normalization; with `step` only where it is still to come there."""
        steps = [*self.train, *self.later]
        behind = steps if step is None else steps[steps.index(step) :]
        return next((found for found in behind if isinstance(found, Normalization)), None)

    @property
    def normalizations(self) -> tuple[Normalization | None, Normalization | None]:
        """Of training and evaluation images."""
        return self.normalization(), next((found for found in self.evaluation if isinstance(found, Normalization)), None)


def read_site(subject: Subject) -> PositionalSite | None:
    """Where positions are added; None for models that these rules do not concern."""
    assert subject.model is not None
    assert subject.graph is not None
    try:
        return find_site(subject.model, subject.graph)
    except NothingMatchedError:
        return None


def read_data(subject: Subject) -> Data:
    """The steps that can be read off the loaders; none where they cannot matter: patch tokens are normalised."""
    site, loaders = subject.once(read_site), subject.loaders
    if site is None or site.is_normalised or loaders is None:
        return Data()
    train, evaluation = read_loader(loaders.train, "train loader"), read_loader(loaders.evaluation, "evaluation loader")
    later = [found for owner in loaders.transforms for found in read_owner(owner, type(owner).__name__)]
    in_train, between, in_evaluation = (steps_of(found, site.size) for found in (train, later, evaluation))
    return Data(in_train, between, in_evaluation, is_read=bool(train) and bool(evaluation))


def measured(subject: Subject) -> VarianceReport | None:
    """The probe's report, where drawing batches is allowed and both loaders are there; batches pass the run's own batch hooks."""
    loaders, site = subject.loaders, subject.once(read_site)
    if not subject.measure or subject.model is None or loaders is None or site is None or site.is_normalised:
        return None
    if loaders.train is None or loaders.evaluation is None or any(parameter.is_meta for parameter in subject.model.parameters()):
        return None
    if not _hooked(subject) and _is_normalised_later(subject.once(read_data)):
        return None
    with as_fed(subject) as (train, evaluation):
        try:
            return measure_positional_variance(subject.model, train, evaluation)
        except (DataError, TraceError):  # batches of another form than the model's inputs: the settings are judged alone
            return None


def _hooked(subject: Subject) -> list[Any]:
    """Modules and data modules with batch hooks of the user's own."""
    owners = subject.loaders.transforms if subject.loaders is not None else ()
    return [owner for owner in owners if any(own_hook(owner, name) for name in BATCH_HOOKS)]


@contextmanager
def as_fed(subject: Subject) -> Iterator[tuple[Any, Any]]:
    """Both loaders as the model is fed by them; what hooks and modes change is put back."""
    assert subject.loaders is not None
    train, evaluation, owners = subject.loaders.train, subject.loaders.evaluation, _hooked(subject)
    with ExitStack() as stack:
        for owner in owners:
            if isinstance(owner, nn.Module):
                stack.enter_context(preserved(owner, buffers=True))
        yield (_Fed(train, True, owners), _Fed(evaluation, False, owners)) if owners else (train, evaluation)


@dataclass(frozen=True)
class _Fed:
    """A loader whose batches pass the batch hooks of modules and data modules, as in a run of Lightning."""

    loader: Any
    training: bool
    owners: Sequence[Any]

    def __iter__(self) -> Iterator[Any]:
        for owner in self.owners:
            if isinstance(owner, nn.Module):
                owner.train(self.training)
        for batch in self.loader:
            yield self._fed(batch)

    def _fed(self, batch: Any) -> Any:
        for name in BATCH_HOOKS:
            owner = next((owner for owner in reversed(self.owners) if own_hook(owner, name)), None)  # a data module's hook goes first
            if owner is None:
                continue
            try:
                batch = getattr(owner, name)(batch, 0)
            except Exception as error:
                raise DataError(
                    "a batch hook does not run outside of a fit",
                    where=f"{type(owner).__name__}.{name}",
                    evidence=f"{type(error).__name__}: {error}",
                ) from error
        return batch


def _is_normalised_later(data: Data) -> bool:
    """Whether batches of the loader are not yet what the model gets."""
    return any(isinstance(step, Normalization) for step in data.later) and not any(isinstance(step, Normalization) for step in data.train)


def image_second_moment(subject: Subject) -> float:
    """E[I^2] of evaluation images: measured, else that of natural images under the normalization that was read."""
    report = subject.once(measured)
    if report is not None and report.evaluation.images.second_moment:
        return report.evaluation.images.overall_second_moment
    return natural_second_moment(subject.once(read_data).normalization())


def expected_ratio(subject: Subject, step: Step) -> float | None:
    """Var[X] with the step over that without, None where its settings do not tell; 1 for steps that change nothing."""
    if isinstance(step, Mixing):
        return step.recipe_ratio
    if isinstance(step, (Erasing, Border)):
        return step.ratio(subject.once(read_data).normalization(step), image_second_moment(subject))
    return 1.0


def unnormalised(subject: Subject) -> str:
    """Training or evaluation: whose images have no normalization while the others have one, as far as is read; "" if rho is not off."""
    report, data = subject.once(measured), subject.once(read_data)
    train, evaluation = data.normalizations
    is_unknown = report is None or not data.is_read or _hooked(subject)
    if report is None or is_unknown or (train is None) is (evaluation is None) or not report.estimate.is_off(TOLERANCE):
        return ""
    return "training" if train is None else "evaluation"


def residual(subject: Subject) -> float | None:
    """The measured ratio that the settings lead to expect, where it is not what was measured; None where all is explained."""
    report, data = subject.once(measured), subject.once(read_data)
    ratios = [expected_ratio(subject, step) for step in data.train]
    if report is None or None in ratios or difference(*data.normalizations) is not None:
        return None
    if _hooked(subject) and any(not isinstance(step, (Normalization, Candidate)) for step in data.later):
        return None  # whether the hooks apply it, or the training step does, is not known
    if subject.once(unnormalised):
        return None
    expected = math.prod(ratio for ratio in ratios if ratio is not None)
    least = expected / math.prod(expected_ratio(subject, step) or 1.0 for step in data.train if isinstance(step, Border) and step.is_most)
    explained = min(max(report.rho, min(least, expected)), max(least, expected))  # the nearest that the settings allow
    is_off = report.estimate.is_off(TOLERANCE) and report.estimate.is_off(TOLERANCE, explained)
    return explained if is_off else None


def has_unread_mixing(subject: Subject) -> bool:
    """Whether images lost variance that no setting explains, and labels of a training batch name two classes: one more batch is drawn."""
    report, expected, loaders = subject.once(measured), subject.once(residual), subject.loaders
    if report is None or expected is None or loaders is None or loaders.train is None or report.rho > expected:
        return False
    with as_fed(subject) as (train, _):
        batch = next(iter(train), None)
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() == 2 and leaf.is_floating_point() and leaf.shape[1] > 2:
            first, second, third = leaf.topk(3).values.unbind(1)
            return bool(((second > third + 1e-3) & (first < 1.0)).any())
    return False


def difference(train: Normalization | None, evaluation: Normalization | None) -> float | None:
    """E[I^2] under the one over that under the other, None where they agree or one is unknown."""
    if train is None or evaluation is None or len(train.mean) != len(evaluation.mean):
        return None
    pairs = zip((*train.mean, *train.std), (*evaluation.mean, *evaluation.std), strict=True)
    if all(abs(one - other) < 0.005 for one, other in pairs):
        return None
    ratio = natural_second_moment(train) / natural_second_moment(evaluation)
    shift = max(abs(one - other) / scale for one, other, scale in zip(train.mean, evaluation.mean, train.std, strict=True))
    return ratio if abs(ratio - 1.0) > TOLERANCE or shift > TOLERANCE else None


def is_trained(subject: Subject, site: PositionalSite) -> bool:
    """Whether the embedding looks as after training; False where that cannot be told."""
    assert subject.model is not None
    parameter = subject.model.get_parameter(site.parameter).detach()
    if parameter.is_meta or site.grid is None or site.is_resampled:
        return False
    return looks_trained(as_rows(parameter, site)[patch_rows(subject.model, site)], site.grid)
