"""NK706: images that are scaled or normalised twice, not at all, or in the wrong order."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pl_normkit.findings import Evidence, Place
from pl_normkit.methods.positional_variance.measure import generators_kept
from pl_normkit.methods.positional_variance.pipelines.effects import Normalization, steps_of
from pl_normkit.methods.positional_variance.pipelines.scaling import Mistake, mistakes_of_loader
from pl_normkit.methods.positional_variance.pipelines.variance import as_fed
from pl_normkit.methods.positional_variance.pipelines.walk import read_loader, read_owner
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

log = logging.getLogger(__name__)

_SECOND = "second moment of the images of a batch, {}"
_BEYOND = 4.0  # noise that replaces pixels, and overshoot of resampling, leave the range of the pixels too


@rule(
    "NK706",
    "images-scaled-wrongly",
    mark=Mark.DERIVED,
    source="derived here: test_scaling_rules",
    needs=(Needs.LOADERS,),
)
def images_scaled_wrongly(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds images that reach a network, of any kind, with the wrong scale: normalised twice, divided by 255 twice, never divided by 255, or
    changed in colour after Normalize by a step that takes them for values in [0, 1]. Read off the transforms of both loaders, step by
    step; where they show none of it and batches may be drawn, off the values of a batch of each.

    Why it hurts
    Such a run trains and its loss falls, so nothing looks wrong: the first layer sees values hundreds of times too large or nearly
    constant, and a pretrained network sees images unlike any it was trained on.

    Evidence
    The second moment of a batch where one may be drawn. Images in [0, 1] under Normalize(mean, std) lie between -mean / std and
    (1 - mean) / std, so that their second moment is at most 7 with ImageNet's statistics, about 1 over many images; bytes under the same
    step have about 50,000 to 480,000.

    Example
    ```python
    import torch
    from torchvision.transforms import v2

    # ToDtype scales nothing unless it is told to
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    ```

    Use instead
    ```python
    transform = v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    ```

    Fix and its safety
    Advice only: the data are not part of the model.

    Source
    Derived: from the documented ranges of the transforms (torchvision's "Transforming images", timm's prefetcher, albumentations'
    Normalize), and from the range that Normalize leaves.
    """
    drawn = subject.once(_second_moments)
    for mistake, names in subject.once(scaling_mistakes).items():
        yield Observation(
            message=f"{mistake.what} in the {' and the '.join(names)} pipeline ({mistake.where})",
            places=[Place("")],
            evidence=[Evidence(_SECOND.format(name), drawn[name], expected="about 1") for name in names if name in drawn],
            advice=mistake.advice,
            cause=mistake.what,
        )


def scaling_mistakes(subject: Subject) -> dict[Mistake, list[str]]:
    """Each mistake with the names of the pipelines that make it, "training" or "evaluation"."""
    loaders = subject.loaders
    assert loaders is not None
    later = [step for owner in loaders.transforms for step in steps_of(read_owner(owner, type(owner).__name__), (1, 1))]
    is_normalised_later = any(isinstance(step, Normalization) for step in later)
    found: dict[str, tuple[Mistake, list[str]]] = {}
    for name, loader in (("training", loaders.train), ("evaluation", loaders.evaluation)):
        mistakes = mistakes_of_loader(loader, f"{name} loader")
        if not mistakes and not is_normalised_later:
            mistakes = list(_seen_in_batch(subject, name, loader))
        for mistake in mistakes:
            if not (is_normalised_later and mistake.is_left_over):
                found.setdefault(mistake.what, (mistake, []))[1].append(name)
    return dict(found.values())


def _seen_in_batch(subject: Subject, name: str, loader: Any) -> Iterator[Mistake]:
    """What the values of a batch show whatever made them, beside the normalization that was read."""
    image = subject.once(_drawn).get(name)
    if image is None:
        return
    normalization = next((step for step in steps_of(read_loader(loader, name), (1, 1)) if isinstance(step, Normalization)), None)
    where, advice = "read off the values of a batch", "Scale images to [0, 1] once, then normalise them once"
    second = float(image.square().mean())
    if normalization is None:
        if float(image.max()) > 100 and float(image.min()) >= 0:
            yield Mistake("Images of 0 to 255 are not scaled to [0, 1]", advice, where)
        return
    if len(normalization.mean) not in (1, image.shape[1]) or max(normalization.mean) > 1.5:
        return
    mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in (normalization.mean, normalization.std))
    bound = float((torch.maximum(mean, 1 - mean) / std).square().max())
    pixels = image * std + mean
    if second > _BEYOND * bound:
        yield Mistake("The normalised images lie far outside of what images in [0, 1] give", advice, where)
    elif 0 <= float(pixels.mean()) < 0.01 and float(pixels.std()) < 0.01:
        yield Mistake("Images in [0, 1] are divided by 255 once more", advice, where)


def _drawn(subject: Subject) -> dict[str, Tensor]:
    """A batch of images (N, C, H, W) of each loader, where drawing is allowed; floating-point ones only."""
    if not subject.measure:
        return {}
    found = {}
    with as_fed(subject) as (train, evaluation):
        for name, loader in (("training", train), ("evaluation", evaluation)):
            if loader is None or iter(loader) is loader:  # an iterator would lose the batch
                continue
            with generators_kept(loader):
                try:
                    leaves = tree_leaves(next(iter(loader), None))
                except Exception as error:  # a batch hook that needs a run, or data that the run itself will fail on
                    log.info("no batch of the %s loader (%s: %s): its settings are judged alone", name, type(error).__name__, error)
                    continue
            image = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() == 4), None)
            if image is not None and image.is_floating_point() and image.shape[1] in (1, 3) and not image.is_meta:
                found[name] = image.detach().float().cpu()
    return found


def _second_moments(subject: Subject) -> dict[str, float]:
    return {name: float(image.square().mean()) for name, image in subject.once(_drawn).items()}
