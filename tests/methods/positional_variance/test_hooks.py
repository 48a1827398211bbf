"""Batches that a module changes on their way to the network: its hooks are read, and run where batches are measured."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torchvision.transforms as v1
from torch import nn
from torchvision.transforms import v2

from pl_normkit import audit
from pl_normkit.findings import Finding
from pl_normkit.rules import Loaders
from tests.methods.positional_variance.images import MEAN, SIZE, STD, vit
from tests.methods.positional_variance.test_rules import codes, loader, normalised

MIX = v2.MixUp(num_classes=10)
ERASE = v2.RandomErasing(1.0)


def mixup_criterion(criterion: Any, logits: Any, first: Any, second: Any) -> Any:
    return criterion(logits, first) + criterion(logits, second)


def cutmix_data(images: Any, labels: Any) -> Any:
    return images, labels, labels


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.norm = v2.Normalize(MEAN, STD)


class Before(Module):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return MIX(*batch) if self.training else batch


class After(Module):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return ERASE(batch[0]) if self.training else batch[0], batch[1]


class NormalisesByHand(Module):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0].float() / 255 - 0.45) / 0.225, batch[1]


class Dims(NormalisesByHand):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0] * 0.5 if self.training else batch[0]), batch[1]


class NeedsTrainer(Module):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0] * 2, batch[1]) if self.trainer.training else batch


class InTheStep(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.norm(batch[0])


class CutsAndMixes(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, first, second = cutmix_data(*batch)
        return mixup_criterion(nn.functional.cross_entropy, images, first, second)


class Data(L.LightningDataModule):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0].float() / 255, batch[1]


FLOATING = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
BYTES = v2.PILToTensor()


def found(owners: Any, transform: Any, *, measure: bool = True) -> list[Finding]:
    loaders = Loaders(loader(transform), loader(transform), owners)
    report = audit(vit(), torch.zeros(2, 3, SIZE, SIZE), loaders=loaders, select=["NK7"], measure=measure)
    assert report.notes == []
    return report.findings


@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize(("owner", "code", "where"), [(Before, "NK701", "on_before_batch_transfer: MIX"), (After, "NK702", "ERASE")])
def test_hooks_are_read(owner: Any, code: str, where: str, measure: bool) -> None:
    (finding,) = found([owner()], normalised(), measure=measure)
    assert finding.code == code
    assert where in finding.message


def test_attributes_are_named_as_the_user_names_them() -> None:
    owner = Module()
    owner.aug = v2.RandomErasing(0.5)
    owner.pad, owner.turn = v2.Pad(8), v2.RandomRotation(30)
    erased, turned = found([owner], normalised(), measure=False)
    assert (erased.code, erased.cause, turned.code, turned.cause) == ("NK702", "Module.aug", "NK705", "Module.turn")


def test_what_shares_the_name_of_mixup_and_mixes_no_images_is_quiet() -> None:
    assert found([CutsAndMixes()], normalised()) == []


@pytest.mark.parametrize(
    ("owners", "transform", "expected"),
    [
        ([NormalisesByHand()], BYTES, []),
        ([Dims()], BYTES, ["NK705"]),
        ([NormalisesByHand(), Data()], BYTES, ["NK703"]),  # as in a run, the data module's hook is called in place of the module's
        ([Dims(), Data()], BYTES, ["NK703", "NK705"]),  # and both where they have different ones
        ([NeedsTrainer()], FLOATING, []),
        ([InTheStep()], FLOATING, []),
        ([], FLOATING, ["NK703"]),
    ],
)
def test_the_measured_batch_has_passed_the_hooks(owners: Any, transform: Any, expected: list[str]) -> None:
    """Where they need a run, or normalise after the loader without a hook, settings are judged alone."""
    assert codes(found(owners, transform)) == expected


def test_the_owner_is_as_before() -> None:
    owner = Dims()
    owner.register_buffer("seen", torch.zeros(()))
    owner.eval()
    hook = Dims.on_before_batch_transfer

    def counted(self: Any, batch: Any, dataloader_idx: int) -> Any:
        self.seen += 1
        return hook(self, batch, dataloader_idx)

    Dims.on_before_batch_transfer = counted  # type: ignore[method-assign]
    try:
        assert codes(found([owner], BYTES)) == ["NK705"]
    finally:
        Dims.on_before_batch_transfer = hook  # type: ignore[method-assign]
    assert (owner.training, float(owner.seen)) == (False, 0.0)


def test_defaults_of_a_function_are_read() -> None:
    def prepare(image: Any, steps: Any = v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD), v1.RandomErasing(0.5)])) -> Any:  # noqa: B008
        return steps(image)

    loaders = Loaders(loader(prepare), loader(normalised()))
    assert codes(audit(vit(), torch.zeros(2, 3, SIZE, SIZE), loaders=loaders, select=["NK7"], measure=False).findings) == ["NK702"]
