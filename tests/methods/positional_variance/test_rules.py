"""Each rule on loaders as people build them: firing ones and quiet ones."""

from __future__ import annotations

from functools import partial
from typing import Any

import albumentations as A
import numpy as np
import pytest
import timm
import torch
import torchvision.transforms as v1
from timm.data import FastCollateMixup, Mixup
from torch import nn
from torch.utils.data import default_collate
from torchvision.transforms import v2

from pl_normkit import audit
from pl_normkit.findings import Finding
from pl_normkit.methods.positional_variance.pipelines.effects import Border, Normalization, natural_second_moment, steps_of
from pl_normkit.methods.positional_variance.pipelines.walk import Found
from pl_normkit.nn import VarianceSafeErasing, VarianceSafeMixup
from tests.methods.positional_variance.images import HALF, MEAN, SIZE, STD, normal_images, vit
from tests.methods.positional_variance.loaders import INPUTS, V2, albumented, codes, found, loader, normalised, timm_loader
from tests.methods.positional_variance.test_rescaling import resized_vit, trained_like


def expected_ratio(finding: Finding) -> float:
    return next(item.value for item in finding.evidence if not item.is_measured)


MIX = v2.RandomChoice([v2.CutMix(num_classes=10), v2.MixUp(alpha=0.8, num_classes=10)])


def collate_as_in_the_torchvision_docs(batch: Any) -> Any:
    return MIX(*default_collate(batch))


class TestMixup:
    @pytest.mark.parametrize(
        ("train", "ratio"),
        [
            (partial(timm_loader, collate_fn=FastCollateMixup(0.8, 1.0), prefetch=True, re_mode="pixel"), 0.6923),
            (partial(loader, v2.Compose(V2), collate_fn=collate_as_in_the_torchvision_docs), 0.6923),
            (partial(loader, v2.Compose(V2), collate_fn=lambda batch: v2.MixUp(num_classes=10)(*batch)), None),
            (partial(loader, normalised(), collate_fn=partial(print, Mixup(0.2))), 0.8571),
        ],
    )
    def test_it_is_found_in_the_loader(self, model: nn.Module, train: Any, ratio: float | None) -> None:
        """Not where it is made inside the function itself: that cannot be read."""
        findings = [finding for finding in found(model, train()) if finding.code == "NK701"]
        assert [round(expected_ratio(finding), 4) for finding in findings] == ([] if ratio is None else [ratio])

    @pytest.mark.parametrize(("alpha", "ratio"), [(0.1, 0.917), (0.2, 0.857), (0.4, 0.778), (0.8, 0.692), (1.0, 0.667)])
    def test_its_evidence(self, model: nn.Module, alpha: float, ratio: float) -> None:
        (finding,) = found(model, loader(normalised()), transforms=[Mixup(alpha, 1.0, switch_prob=0.5)])
        assert (finding.code, round(expected_ratio(finding), 3)) == ("NK701", ratio)
        assert finding.evidence[1].value == pytest.approx(1 - 0.5 * (1 - ratio), abs=1e-3)

    def test_it_is_found_in_modules_and_their_hooks(self, model: nn.Module) -> None:
        class Held(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mix = Mixup(0.8)

        class Called(nn.Module):
            def on_after_batch_transfer(self, batch: Any, _: int) -> Any:
                return mixup_data(*batch)

        for owner in (Held(), Called(), Mixup(0.8)):
            assert codes(found(model, loader(normalised()), transforms=[owner])) == ["NK701"]

    def test_mixing_that_cannot_be_read_shows_in_labels_and_variance(self, model: nn.Module) -> None:
        """CutMix mixes labels alike and takes no variance; erasing takes variance and mixes no labels."""
        mixes = {0.8: ["NK701"], 0.0: []}
        for alpha, expected in mixes.items():
            mixup = Mixup(alpha, float(alpha == 0.0), mode="elem", num_classes=10)
            train = [mixup(images.clone(), labels) for images, labels in loader(normalised()) for _ in range(4)]
            findings = found(model, train, measure=True)
            assert codes(findings) == expected
            assert [finding.cause for finding in findings] == ["mixed labels"] * len(expected)
        plain = [(images * 0.7, labels) for images, labels in loader(normalised())]
        (note,) = found(model, plain, measure=True)
        assert (note.code, note.cause) == ("NK705", "unexplained")

    @pytest.mark.parametrize(
        "mixup",
        [
            Mixup(mixup_alpha=0.0, cutmix_alpha=1.0),
            Mixup(0.8, prob=0.0),
            Mixup(0.8, 1.0, switch_prob=1.0),
            v2.CutMix(num_classes=10),
            VarianceSafeMixup(0.8),
        ],
    )
    def test_quiet(self, model: nn.Module, mixup: Any) -> None:
        assert found(model, loader(normalised()), transforms=[mixup]) == []


def mixup_data(images: Any, labels: Any) -> Any:
    return images, labels


class TestErasing:
    def test_the_default_of_the_libraries_is_a_constant(self, model: nn.Module) -> None:
        for train in (
            timm_loader(re_prob=0.25),
            timm_loader(re_prob=0.25, prefetch=True),
            loader(normalised(after=[v1.RandomErasing(0.25)])),
            loader(v2.Compose([*V2, v2.RandomErasing(0.25)])),
        ):
            (finding,) = found(model, train)
            assert (finding.code, finding.severity) == ("NK702", "warning")
            assert expected_ratio(finding) == pytest.approx(1 - 0.25 * 0.1767, abs=2e-3)

    def test_before_normalization_a_constant_is_black(self, model: nn.Module) -> None:
        erasing = v1.RandomErasing(1.0, scale=(0.25, 0.25))
        (finding,) = found(model, loader(v1.Compose([v1.ToTensor(), erasing, v1.Normalize(MEAN, STD)])))
        assert expected_ratio(finding) == pytest.approx(1.74, abs=0.01)

    def test_noise_must_fit_the_normalization(self, model: nn.Module) -> None:
        """E[I^2] is 0.219 under Inception's statistics, 0.709 under CLIP's: 5 % are exceeded by the first alone."""
        clip = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
        assert natural_second_moment(Normalization(HALF, HALF, "")) == pytest.approx(0.219, abs=1e-3)
        assert natural_second_moment(Normalization(*clip, "")) == pytest.approx(0.709, abs=1e-3)
        for (mean, std), expected in (((HALF, HALF), ["NK702", "NK703"]), (clip, ["NK703"]), ((MEAN, STD), [])):
            train = timm_loader(re_prob=0.25, re_mode="pixel", mean=mean, std=std)
            assert codes(found(model, train, timm_loader(training=False, mean=mean, std=std))) == expected

    def test_one_colour_per_block_is_a_note(self, model: nn.Module) -> None:
        (finding,) = found(model, timm_loader(re_prob=0.25, re_mode="rand"))
        assert (finding.code, finding.severity) == ("NK702", "note")

    @pytest.mark.parametrize("step", [A.CoarseDropout(p=0.5), A.Erasing(p=0.5), A.GridDropout(p=0.5)])
    def test_albumentations_erases_with_black(self, model: nn.Module, step: Any) -> None:
        assert codes(found(model, loader(albumented(step)))) == ["NK702"]

    @pytest.mark.parametrize(
        "after", [[], [v1.RandomErasing(0.25, value="random")], [v1.RandomErasing(0.0)], [VarianceSafeErasing()]], ids=str
    )
    def test_quiet(self, model: nn.Module, after: Any) -> None:
        assert found(model, loader(normalised(after=after))) == []


class TestNormalization:
    def test_statistics_that_differ(self, model: nn.Module) -> None:
        for train in (loader(normalised(mean=HALF, std=HALF)), timm_loader(mean=HALF, std=HALF, prefetch=True)):
            (finding,) = found(model, train)
            assert (finding.code, finding.cause, finding.severity) == ("NK703", "different statistics", "warning")
            assert finding.evidence[0].value == pytest.approx(0.219, abs=1e-3)

    def test_a_second_moment_that_is_off_is_a_note_from_scratch(self, model: nn.Module) -> None:
        half = loader(normalised(mean=HALF, std=HALF))
        (finding,) = found(model, half, half)
        assert (finding.code, finding.cause, finding.severity) == ("NK703", "second moment", "note")

    def test_a_checkpoint_keeps_its_statistics(self) -> None:
        model, half = vit(), loader(normalised(mean=HALF, std=HALF))
        with torch.no_grad():
            model.pos_embed[0, 1:] = trained_like(4)[0].flatten(1).T
        assert found(model, half, half) == []

    def test_images_without_normalization_are_measured(self, model: nn.Module) -> None:
        raw = loader(v1.ToTensor())
        (finding,) = found(model, raw, raw, measure=True)
        assert (finding.code, finding.severity) == ("NK703", "note")
        assert finding.evidence[0].value == pytest.approx(0.254, abs=0.05)

    @pytest.mark.parametrize("side", ["training", "evaluation"])
    def test_one_side_without_normalization(self, model: nn.Module, side: str) -> None:
        """Measured alone: who normalises in the training step shows it in no loader."""
        raw, done = loader(v1.ToTensor()), loader(normalised())
        train, evaluation = (raw, done) if side == "training" else (done, raw)
        (finding,) = found(model, train, evaluation, measure=True)
        assert (finding.code, finding.severity, finding.cause) == ("NK703", "warning", "normalised on one side")
        assert f"found for the {side} images" in finding.message
        assert (finding.evidence[0].value < 0.5) is (side == "training")
        assert [seen.severity for seen in found(model, train, evaluation) if seen.severity != "note"] == []

    def test_statistics_of_the_data_are_quiet(self, model: nn.Module) -> None:
        cifar = loader(normalised(mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)))
        assert found(model, cifar, cifar) == []


class TestBorder:
    @pytest.mark.parametrize(
        ("step", "ratio"),
        [
            (v1.RandomCrop(SIZE, padding=8), 1.380),
            (v2.RandomCrop(SIZE, padding=8), 1.380),
            (v1.RandomRotation(30), 1.276),
            (v1.Pad(4, fill=0), 1.694),
            (v1.RandomAffine(0, translate=(0.2, 0.2)), 1.562),
        ],
    )
    def test_black_before_normalization(self, model: nn.Module, step: Any, ratio: float) -> None:
        (finding,) = found(model, loader(normalised(step)))
        assert (finding.code, expected_ratio(finding)) == ("NK705", pytest.approx(ratio, rel=0.01))

    @pytest.mark.parametrize(
        "step",
        [
            v1.RandomAffine((10, 40), (0.1, 0.2), (0.6, 1.2), (-20, 30)),
            v2.RandomAffine(20, (0.1, 0.0), (0.6, 0.9), (-20, 20, -10, 30)),
            v1.RandomRotation((10, 50)),
            A.Affine(rotate=(-45, 45), scale=(0.9, 1.1), translate_percent=(-0.06, 0.06), p=0.5),
            A.Affine(rotate=(-40, 10), scale=(0.5, 0.8), shear=(-20, 20), translate_percent=(0.1, 0.2), p=1),
            A.Affine(shear={"x": (0, 30), "y": (0, 0)}, p=1),
        ],
        ids=lambda step: type(step).__name__,
    )
    def test_the_empty_area_is_that_of_the_transform_itself(self, step: Any) -> None:
        (border,) = steps_of([Found(step, 1.0, "")], (SIZE, SIZE))
        assert isinstance(border, Border)
        if type(step).__module__.startswith("albumentations"):
            step.set_random_seed(0)
            outputs = [torch.as_tensor(step(image=np.ones((SIZE, SIZE, 3), np.uint8))["image"][..., 0]) for _ in range(400)]
        else:
            outputs = [step(torch.ones(1, SIZE, SIZE))[0] for _ in range(400)]
        empty = 1.0 - float((torch.stack(outputs) > 0.5).double().mean())
        assert border.area == pytest.approx(empty, abs=0.025)

    @pytest.mark.parametrize("step", [A.Rotate(30, border_mode=0, p=1), A.Affine(rotate=(-30, 30), p=1), A.Pad(8)])
    def test_albumentations(self, model: nn.Module, step: Any) -> None:
        assert codes(found(model, loader(albumented(step)))) == ["NK705"]

    def test_zeros_after_normalization(self, model: nn.Module) -> None:
        (finding,) = found(model, loader(normalised(after=[v1.RandomCrop(SIZE, padding=8)])))
        assert expected_ratio(finding) == pytest.approx(0.872, abs=1e-3)

    @pytest.mark.parametrize(
        "step",
        [
            v1.RandomCrop(SIZE, padding=8, padding_mode="reflect"),
            v1.RandomCrop(SIZE),
            v1.RandomRotation(30, fill=(124, 116, 104)),
            v1.RandomRotation(2),
            v1.RandomApply([v1.RandomRotation(30)], p=0.1),
        ],
        ids=str,
    )
    def test_quiet(self, model: nn.Module, step: Any) -> None:
        expected = 0.9 if isinstance(step, v1.RandomRotation) and step.fill != 0 else 1.0
        assert codes(found(model, loader(normalised(step)))) == ([] if expected == 1.0 else ["NK705"])

    def test_reflection_of_albumentations_is_quiet(self, model: nn.Module) -> None:
        assert found(model, loader(albumented(A.Rotate(30, border_mode=4, p=1)))) == []

    def test_the_measured_ratio_decides(self, model: nn.Module) -> None:
        """What is padded may be cut away again, which the settings do not tell."""
        step = v1.Compose([v1.Pad(8), v1.CenterCrop(SIZE)])
        assert codes(found(model, loader(normalised(step)))) == ["NK705"]
        assert found(model, loader(normalised(step)), measure=True) == []
        (finding,) = found(model, loader(normalised(v1.RandomCrop(SIZE, padding=8))), measure=True)
        assert finding.evidence[1].value == pytest.approx(expected_ratio(finding), rel=0.1)

    def test_padding_that_a_larger_image_pushes_out_is_one_finding(self, model: nn.Module) -> None:
        crop = [v1.Resize(SIZE + 12), v1.RandomCrop(SIZE, padding=8)]
        (finding,) = found(model, loader(normalised(*crop)), loader(normalised(v1.Resize(SIZE + 12), v1.CenterCrop(SIZE))), measure=True)
        assert (finding.code, finding.severity) == ("NK705", "warning")
        assert 1.05 < finding.evidence[1].value < expected_ratio(finding)

    def test_a_shift_of_unknown_cause_is_a_note(self, model: nn.Module) -> None:
        (finding,) = found(model, loader(normalised(v1.ColorJitter(brightness=(1.5, 1.5)))), measure=True)
        assert (finding.code, finding.severity) == ("NK705", "note")
        assert "ColorJitter can explain it" in finding.message

    def test_sizes_that_differ_can_explain_it(self, model: nn.Module) -> None:
        """Up-scaling smooths: what evaluation alone does counts, what both do does not."""
        crop, smooth = v1.CenterCrop(SIZE), v1.Resize(2 * SIZE)
        (finding,) = found(model, loader(normalised(crop)), loader(normalised(smooth, crop)), measure=True)
        assert "; Resize(128) in evaluation can explain it" in finding.message
        bright = loader(normalised(smooth, v1.ColorJitter(brightness=(1.5, 1.5)), crop))
        (finding,) = found(model, bright, loader(normalised(smooth, crop)), measure=True)
        assert "; ColorJitter can explain it" in finding.message


class TestResampling:
    def test_an_enlarged_embedding_fires_until_it_is_rescaled(self) -> None:
        model, original = resized_vit()
        images = normal_images(2, 112)
        (finding,) = audit(model, images, select=["NK704"]).findings
        k = float(model.pos_embed[0, 1:].detach().var(-1).mean() / original[0, 1:].var(-1).mean())
        assert finding.evidence[0].value == pytest.approx(k, rel=1e-4)
        assert "4x4 -> 7x7" in finding.message
        from pl_normkit.auditing import fix_findings

        changes = fix_findings(model, images, [finding], allow_unsafe=True)
        assert audit(model, images, select=["NK704"]).findings == []
        changes.undo()
        assert len(audit(model, images, select=["NK704"]).findings) == 1

    @pytest.mark.parametrize(("trained", "fires"), [(True, True), (False, False)])
    def test_in_the_forward_pass_it_concerns_trained_positions(self, trained: bool, fires: bool) -> None:
        model = vit(img_size=224, dynamic_img_size=True)
        if trained:
            with torch.no_grad():
                model.pos_embed[0, 1:] = trained_like(14, length=0.5)[0].flatten(1).T
        assert codes(audit(model, normal_images(2, 384), select=["NK704"]).findings) == (["NK704"] if fires else [])

    def test_quiet(self, model: nn.Module) -> None:
        assert audit(model, INPUTS, select=["NK704"]).findings == []
        assert audit(timm.create_model("resnet18").to("meta"), INPUTS, select=["NK704"]).findings == []
        assert audit(vit().to("meta"), INPUTS, select=["NK704"]).findings == []
