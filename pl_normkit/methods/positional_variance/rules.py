"""NK7xx: augmentation and resampling that change how much the positional embedding of a vision transformer weighs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from pl_normkit.findings import Evidence, FixSafety, Place, Severity
from pl_normkit.methods.positional_variance.find import PositionalSite
from pl_normkit.methods.positional_variance.fix import is_rescaled, rescale_positional_embedding
from pl_normkit.methods.positional_variance.measure import TOLERANCE
from pl_normkit.methods.positional_variance.pipelines.effects import (
    Border,
    Candidate,
    Erasing,
    Mixing,
    Normalization,
    Step,
    natural_second_moment,
)
from pl_normkit.methods.positional_variance.pipelines.resampling import as_rows, find_resampling, looks_trained, patch_rows
from pl_normkit.methods.positional_variance.pipelines.variance import (
    Data,
    difference,
    expected_ratio,
    has_unread_mixing,
    is_trained,
    measured,
    read_data,
    read_site,
    residual,
    unnormalised,
)
from pl_normkit.methods.positional_variance.scaling_rules import scaling_mistakes
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule
from pl_normkit.surgery import Changes, Filter

REVIEWS = "arXiv 2405.14115, as public reviews of it report"
_FITTING = 0.25  # how far E[I^2] may be from 1, and E[I] from 0
_RHO = "Var[X] of all batches, training over evaluation"


def _rho(subject: Subject, step: Step | None = None) -> list[Evidence]:
    """The measured ratio; not beside a step that acts behind the loaders, which the measured batches have not seen."""
    report = subject.once(measured)
    is_seen = step is None or step in subject.once(read_data).train
    return [Evidence(_RHO, report.rho, expected="0.95 to 1.05")] if report is not None and is_seen else []


def _settings(ratio: float) -> Evidence:
    return Evidence("Var[X] by the settings of this step, training over evaluation", ratio, expected="1", is_measured=False)


def _place(site: PositionalSite) -> list[Place]:
    return [Place(site.parameter, site.source)]


def _rescale(model: nn.Module, example_inputs: Any, *, filter_fn: Filter | None = None) -> Changes:
    """A model has one positional embedding, so there is nothing to choose."""
    return rescale_positional_embedding(model, example_inputs)


@rule("NK701", "mixup-shifts-positions", mark=Mark.PUBLISHED, source=REVIEWS, needs=(Needs.GRAPH, Needs.LOADERS))
def mixup_shifts_positions(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds Mixup, or another linear mixing of images, in the training data of a vision transformer with absolute positions.

    Why it hurts
    A weighted mean of two images has less variance than either. The positional embedding is added to patch tokens of that
    variance and both are normalised together, so positions weigh more in training than in evaluation, where no image is
    mixed. With weights lam and 1 - lam the variance is lam^2 + (1 - lam)^2 of the plain one (derived; independent images
    of zero mean).

    Evidence
    The expected ratio (alpha + 1) / (2 alpha + 1) for lam from Beta(alpha, alpha) (derived), and the ratio measured on this
    model's patch embedding where both loaders may be read.

    Example
    ```python
    from timm.data import Mixup

    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0)  # as in the recipe of DeiT: ratio 0.85 over the whole run
    ```

    Use instead
    ```python
    mixup = Mixup(mixup_alpha=0.0, cutmix_alpha=1.0)
    ```

    CutMix takes each pixel from one image and keeps the variance. Or pl_normkit.nn.VarianceSafeMixup, our extension: it mixes the labels
    alike and gives the images their variance back.

    Fix and its safety
    Advice only: the data are not part of the model. suggest_augmentation prints a configuration.

    Source
    Published: that Mixup breaks the balance and CutMix does not is what public reviews of arXiv 2405.14115 report; its full text
    was not at hand. Derived: the ratios. VarianceSafeMixup is ours and not shown to be in the paper.
    """
    site, data = subject.once(read_site), subject.once(read_data)
    found = [step for step in (*data.train, *data.later) if isinstance(step, Mixing)]
    if site is not None and (found or subject.once(has_unread_mixing)):
        worst = min(found, key=lambda step: step.recipe_ratio or 0.0, default=None)
        what = f"{worst.what} lowers" if worst is not None else "Labels are mixtures of two classes, and something lowers"
        where = f" ({worst.where})" if worst is not None else ""
        yield Observation(
            message=f"{what} the variance of the images in training and not in evaluation{where}",
            places=_place(site),
            evidence=[*(_mixing_evidence(worst) if worst is not None else []), *_rho(subject, worst)],
            advice="Use CutMix alone (mixup_alpha=0, cutmix_alpha=1), or pl_normkit.nn.VarianceSafeMixup after normalization",
            cause=worst.where if worst is not None else "mixed labels",
        )


def _mixing_evidence(step: Mixing) -> list[Evidence]:
    if step.ratio is None or step.recipe_ratio is None:
        return []
    found = [Evidence("Var[X] of a mixed batch over a plain one, by its settings", step.ratio, expected="1", is_measured=False)]
    if step.share < 1.0:
        what = f"the same over the run ({step.share:.0%} of the images mixed)"
        found.append(Evidence(what, step.recipe_ratio, expected="1", is_measured=False))
    return found


@rule("NK702", "erasing-shifts-positions", mark=Mark.PUBLISHED, source=REVIEWS, needs=(Needs.GRAPH, Needs.LOADERS))
def erasing_shifts_positions(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds random erasing that writes a constant (the default of timm and torchvision), or noise that does not fit the
    normalization of the images, in the training data of a vision transformer with absolute positions.

    Why it hurts
    A constant block has no variance: with the share f of the pixels erased the second moment of the image is 1 - f of what it is
    in evaluation, and positions weigh more. Noise N(0, 1) fits images of second moment 1; elsewhere the ratio is
    1 - f + f / E[I^2] (derived).

    Size and limits (docs/value.md, 6 seeds, a ViT of four blocks on 800 digits, a quarter of every image erased): noise in place of the
    constant made no difference that these runs could show (held-out loss +0.02, 95 % interval -0.07 to +0.11). The constant with its
    variance restored did better than noise (0.44 against 0.56), so the variance counts there and the noise itself costs something. Images
    and networks of common size were not measured.

    Evidence
    The expected ratio for this erasing and normalization (derived), and the ratio measured on this model's patch embedding where both
    loaders may be read. Constants are always reported, noise from a deviation of 5 % on.

    Example
    ```python
    from timm.data import create_transform

    transform = create_transform(224, is_training=True, re_prob=0.25)  # re_mode is "const" unless it is given
    ```

    Use instead
    ```python
    transform = create_transform(224, is_training=True, re_prob=0.25, re_mode="pixel")
    ```

    That fits the default mean and std. With other statistics take pl_normkit.nn.VarianceSafeErasing(mean, std) with the mean and std of
    the normalised images, which measure_positional_variance reports.

    Fix and its safety
    Advice only: the data are not part of the model. suggest_augmentation prints a configuration.

    Source
    Published: mode "pixel" together with the default normalization is what public reviews of arXiv 2405.14115 report. Derived: the
    formulas, the threshold, and that one colour per block (mode "rand") keeps the variance over images but not within a patch.
    """
    site, data = subject.once(read_site), subject.once(read_data)
    for step in (*data.train, *data.later):
        if site is None or not isinstance(step, Erasing):
            continue
        ratio = expected_ratio(subject, step)
        if step.mode == "pixel" and (ratio is None or abs(ratio - 1.0) <= TOLERANCE):
            continue
        is_noise = step.mode != "const"
        fits = is_noise and (ratio is None or abs(ratio - 1.0) <= TOLERANCE)
        yield Observation(
            message=f"{step.what} erases with {_FILLS[step.mode] if fits or not is_noise else _MISFIT} ({step.where})",
            places=_place(site),
            evidence=[
                *([_settings(ratio)] if ratio is not None else []),
                *_rho(subject, step),
            ],
            advice="Erase pixel by pixel with the statistics of the normalised images: mode='pixel' with the default mean and std, "
            "else pl_normkit.nn.VarianceSafeErasing(mean, std)",
            severity=Severity.NOTE if fits else None,
            cause=step.where,
        )


_FILLS = {"const": "a constant, which has no variance", "rand": "one colour per block, which has no variance within a patch"}
_MISFIT = "noise that does not fit the normalization of the images"


@rule("NK703", "normalization-shifts-positions", mark=Mark.PUBLISHED, source=REVIEWS, needs=(Needs.GRAPH, Needs.LOADERS))
def normalization_shifts_positions(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds normalization that differs between training and evaluation, or is missing in one of them (where measured), and, as a note,
    statistics that leave the images without zero mean and unit second moment, in the data of a vision transformer with absolute positions.
    The note is silent where the positional embedding looks trained: a checkpoint keeps the statistics it was trained with.

    Why it hurts
    The variance of patch tokens is proportional to the second moment of the normalised image (derived). Two normalizations are two
    weights of the positional embedding. And with a second moment far from 1 the noise of random erasing is too strong, and with a mean
    far from 0 mixing changes the mean as well.

    Evidence
    Mean and second moment of the images, measured where both loaders may be read, else as natural images have them under these statistics
    (ImageNet's mean and std; derived): 0.22 for mean = std = 0.5.

    Example
    ```python
    from torchvision import transforms

    train = transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    evaluation = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ```

    Use instead
    ```python
    train = evaluation = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ```

    From scratch that is ImageNet's mean and std, or those of your own images. When fine-tuning, keep the checkpoint's and fit the erasing
    noise to it (pl_normkit.nn.VarianceSafeErasing).

    Fix and its safety
    Advice only: the data are not part of the model. suggest_augmentation prints a configuration.

    Source
    Published: default mean-std normalization is what a public review of arXiv 2405.14115 reports. Derived: the second moments, the
    thresholds (5 % between the loaders, 25 % from unit second moment or 0.25 from zero mean), and the exception for checkpoints.
    """
    site, data = subject.once(read_site), subject.once(read_data)
    if site is None or subject.once(scaling_mistakes):  # NK706 says it
        return
    ratio = difference(*data.normalizations)
    if ratio is not None:
        yield Observation(
            message="Training and evaluation images are normalised with different statistics",
            places=_place(site),
            evidence=[
                Evidence("second moment of natural images, training over evaluation", ratio, expected="1", is_measured=False),
                *_rho(subject),
            ],
            advice="Give both loaders the same mean and std",
            cause="different statistics",
        )
    elif lacking := subject.once(unnormalised):
        yield Observation(
            message=f"No normalization was found for the {lacking} images, and the others are normalised",
            places=_place(site),
            evidence=_rho(subject),
            advice="Normalise both with the same mean and std",
            cause="normalised on one side",
        )
    elif not is_trained(subject, site):
        yield from _misfit(subject, site, data.normalizations[0])


def _misfit(subject: Subject, site: PositionalSite, normalization: Normalization | None) -> Iterator[Observation]:
    report = subject.once(measured)
    mean, second = 0.0, natural_second_moment(normalization)
    if report is not None:
        mean, second = report.evaluation.images.overall_mean, report.evaluation.images.overall_second_moment
    if abs(second - 1.0) <= _FITTING and abs(mean) <= _FITTING:
        return
    whose = "evaluation" if report is not None else "natural"
    what = f"second moment of {whose} images after normalization"
    evidence = [Evidence(what, second, expected="1", is_measured=report is not None)]
    if report is not None:
        evidence.append(Evidence("mean of evaluation images after normalization", mean, expected="0"))
    yield Observation(
        message="The normalised images have no zero mean and unit second moment",
        places=_place(site),
        evidence=evidence,
        advice="Train from scratch with the mean and std of the images (ImageNet's defaults for natural images)",
        severity=Severity.NOTE,
        cause="second moment",
    )


@rule(
    "NK704",
    "resampled-positions-lost-variance",
    mark=Mark.PUBLISHED,
    source=f"{REVIEWS}; k and how it is measured are derived here",
    needs=(Needs.GRAPH,),
    fix=_rescale,
    fix_safety=FixSafety.UNSAFE,
)
def resampled_positions_lost_variance(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds an absolute positional embedding that was interpolated to another grid, in the forward pass or when it was loaded, and lost or
    gained more than 5 % of its variance by it.

    Why it hurts
    The patch tokens have the variance they had before, so positions weigh less than the network was trained for.

    Evidence
    k, the variance of the patch positions now over that of the original ones (variance over channels, mean over positions), measured
    on this model's own values. An interpolated embedding has no more rank along rows and columns than the original grid had, so both the
    grid and the original are recovered from it (derived). Depends on the checkpoint: white noise from 14x14 to 24x24 gives 0.69, a smooth
    embedding about 1.

    Example
    ```python
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=1)  # with pretrained=True
    model.set_input_size((384, 384))  # as create_model(..., img_size=384) and transformers' interpolate_pos_encoding=True do
    ```

    Use instead
    ```python
    import torch

    from pl_normkit import rescale_positional_embedding

    rescale_positional_embedding(model, torch.zeros(2, 3, 384, 384))
    ```

    It multiplies the patch positions by 1 / sqrt(k); those of class and other prefix tokens stay.

    Fix and its safety
    rescale_positional_embedding does that, reversibly, once; unsafe: it changes what the network computes until it is fine-tuned.
    An embedding that is interpolated in every forward pass is scaled for the size of the example inputs.

    Source
    Published: the scaling by 1 / sqrt(k) is what public reviews of arXiv 2405.14115 report. Derived: the definition of k, the
    recovery of the original, the threshold, and that an embedding that still is white noise (from scratch) is left alone where the forward
    pass interpolates it.
    """
    site = subject.once(read_site)
    if site is None or subject.model is None:
        return
    model = subject.model
    found = find_resampling(model, site)
    if found is None or abs(found.k - 1.0) <= TOLERANCE or is_rescaled(model, site):
        return
    if found.in_forward and found.old_grid is not None:
        values = as_rows(model.get_parameter(site.parameter).detach(), site)[patch_rows(model, site)]
        if not looks_trained(values, found.old_grid):
            return
    yield Observation(
        message=f"The positional embedding was resampled ({found}) and its variance with it",
        places=_place(site),
        evidence=[Evidence("variance of patch positions, resampled over original (k)", found.k, expected="1")],
        advice="rescale_positional_embedding(model, example_inputs) multiplies the patch positions by 1 / sqrt(k)",
    )


@rule(
    "NK705",
    "border-shifts-positions",
    mark=Mark.DERIVED,
    source="derived here from the condition of arXiv 2405.14115: the formula 1 - f + f v^2 / E[I^2], test_positional_variance_rules",
    needs=(Needs.GRAPH, Needs.LOADERS),
)
def border_shifts_positions(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds constant padding, and constant values where rotation, translation or shear leave the image empty, in the training data of a vision
    transformer with absolute positions. And where both loaders may be read: any measured difference that the settings of all steps do not
    explain, as a note with the steps that can (random resized crops, colour jitter, policies).

    Why it hurts
    Black before normalization has a second moment of 3.96 in normalised units (default mean and std), zeros after it have none: on the
    share f of the image the ratio becomes 1 - f + 3.96 f or 1 - f (derived). In evaluation these borders are absent. Crops that are scaled
    up lose high frequencies.

    Evidence
    The expected ratio where the filled area is known from the settings, and the ratio measured on this model's patch embedding where both
    loaders may be read; the measured one decides. From a deviation of 5 % and two standard errors on.

    Example
    ```python
    from torchvision import transforms

    crop = transforms.RandomCrop(32, padding=4)  # before Normalize on CIFAR: ratio 1.40; RandomRotation(30): 1.28
    ```

    Use instead
    ```python
    crop = transforms.RandomCrop(32, padding=4, padding_mode="reflect")
    ```

    Or rotate a larger image that is then cropped, fill with the mean colour where the area is small, raise the lower bound for the scale
    of random resized crops.

    Fix and its safety
    Advice only: the data are not part of the model.

    Source
    Derived: from the published condition that augmentation must not move the statistics of the input; padding and fill are not among
    the augmentations that the reviews of arXiv 2405.14115 name. That random resized crop can break the balance is published there;
    its remedy is not known to us.
    """
    site, data = subject.once(read_site), subject.once(read_data)
    if site is None:
        return
    report = subject.once(measured)
    for step in (*data.train, *data.later):
        if not isinstance(step, Border) or (step in data.later and step.what == "Pad"):  # a module may keep that for evaluation
            continue
        ratio = expected_ratio(subject, step)
        is_refuted = step in data.train and report is not None and not report.estimate.is_off(TOLERANCE)
        if ratio is not None and abs(ratio - 1.0) > TOLERANCE and not is_refuted:
            yield _border_observation(subject, site, step, ratio)
    yield from _unexplained(subject, site, data)


def _unexplained(subject: Subject, site: PositionalSite, data: Data) -> Iterator[Observation]:
    """What is left of the measured ratio when all that the settings tell is taken out."""
    report, expected = subject.once(measured), subject.once(residual)
    if subject.once(scaling_mistakes):
        return
    if report is None or expected is None or subject.once(has_unread_mixing):
        return
    train, evaluation = ([step.what for step in steps if isinstance(step, Candidate)] for steps in (data.train, data.evaluation))
    candidates = list(dict.fromkeys(what for what in train if what not in evaluation))
    candidates += [f"{what} in evaluation" for what in dict.fromkeys(evaluation) if what not in train]
    named = f"{' or '.join(candidates)} can explain it" if candidates else "nothing that could be read off the loaders explains it"
    yield Observation(
        message=f"The patch tokens of training images have another variance than those of evaluation images; {named}",
        places=_place(site),
        evidence=[
            Evidence(_RHO, report.rho, expected="1" if expected == 1.0 else f"1, and {expected:.3g} by the settings"),
            Evidence("standard error of that", report.estimate.error),
        ],
        advice="Measure with one step after the other off (measure_positional_variance); raise the lower bound of crop scales, weaken "
        "brightness and contrast, fill with the mean colour",
        severity=Severity.NOTE,  # measured, but what causes it is not known
        cause="unexplained",
    )


def _border_observation(subject: Subject, site: PositionalSite, step: Border, ratio: float) -> Observation:
    return Observation(
        message=f"{step.what} fills the border with a constant in training ({step.where})",
        places=_place(site),
        evidence=[_settings(ratio), *_rho(subject, step)],
        advice="Reflect at the border (padding_mode='reflect'), or fill with the mean colour where the area is small",
        cause=step.where,
    )
