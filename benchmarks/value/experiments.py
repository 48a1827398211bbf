"""Each remedy in a setting in which its mechanism can show."""

from __future__ import annotations

__all__ = ["EXPERIMENTS"]

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from data import Cues, Digits, Textures
from experiment import SEEDS, Classifier, Experiment
from networks import Aspp, Decoder, PreActivation, residual_network, small_vit
from torch import Tensor, nn

from pl_normkit.callbacks import AtrousRates, DropoutPlacement, GammaDecay, GaussianBias, NaNGuard, ScaleEqualization, StochasticPooling
from pl_normkit.methods.dropout_placement import measure_variance_shift, place_dropout
from pl_normkit.methods.norm_operators import recalibrate_batch_norm
from pl_normkit.nn import VarianceSafeErasing
from pl_normkit.recipes.arms import Arm


class HandChecked(Classifier):
    """What people write against NaN by hand: skip a step whose loss is NaN, or drop gradients that are."""

    def __init__(self, check: str = "none") -> None:
        super().__init__(residual_network(10, 16, (1, 1, 1), (1, 2, 2)), 0.05)
        self.check = check

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return loss if self.check != "skip" or loss is None or torch.isfinite(loss) else None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.check == "drop" and not all(p.grad is None or torch.isfinite(p.grad).all() for p in self.parameters()):
            optimizer.zero_grad()


def _guard() -> NaNGuard:
    return NaNGuard(folder=tempfile.mkdtemp())


def _recalibration_gap(module: L.LightningModule, data: L.LightningDataModule) -> float:
    """How much the held-out loss falls when the statistics of the batch norms are taken again without dropout."""
    images, labels = data.held_out  # type: ignore[attr-defined]
    again = copy.deepcopy(module.net)  # type: ignore[arg-type]
    recalibrate_batch_norm(again, data.train[0].split(100))  # type: ignore[attr-defined, arg-type]
    return _loss(module.net, images, labels) - _loss(again, images, labels)  # type: ignore[arg-type]


@torch.no_grad()
def _loss(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float(nn.functional.cross_entropy(net.eval()(images), labels))


def _largest_shift(module: L.LightningModule, data: L.LightningDataModule) -> float:
    """The largest factor, up or down, by which dropout shifts the variance that a norm sees."""
    shifts = measure_variance_shift(module.net, data.held_out[0])  # type: ignore[arg-type, attr-defined]
    return max(max(shift, 1 / shift) for shift in shifts.values())


def _pre_activation(p: float) -> Callable[..., Classifier]:
    def make(dropout: float = p) -> Classifier:
        return Classifier(PreActivation.network(dropout), 0.05)

    return make


def _texture_head(p: float = 0.0, place: str = "") -> Classifier:
    net = residual_network(8, 16, (1, 1, 1), (1, 2, 2), p)
    if place:
        place_dropout(net, Textures(0, side=16).train[0][:64], head_p=place)  # type: ignore[arg-type]
    return Classifier(net, 0.05)


class Erasing:
    """Erases a block in every image: a constant, noise of the images' own statistics, or a control."""

    def __init__(self, kind: str) -> None:
        noise = {"constant": 0.0, "constant, variance restored": 0.0, "weak noise": 0.3, "noise": 1.0}[kind]
        self.erase = VarianceSafeErasing(0.0, noise, probability=1.0, min_area=0.25, max_area=0.25)
        self.gain = 0.75**-0.5 if kind == "constant, variance restored" else 1.0

    def __call__(self, images: Tensor) -> Tensor:
        return self.erase(images.clone()) * self.gain


def _erased_vit(kind: str = "constant") -> Classifier:
    return Classifier(small_vit(), 2e-3, 0.05, "adamw", Erasing(kind))


def _plain_vit() -> Classifier:
    return Classifier(small_vit(), 2e-3, 0.05, "adamw")


def _deep() -> Classifier:
    return Classifier(residual_network(10, 8, (4, 4, 4), (1, 2, 2)), 0.1, 5e-3)


def _shallow() -> Classifier:
    return Classifier(residual_network(10, 16, (1, 1, 1), (1, 2, 2)), 0.05, 0.05)


def _aspp() -> Classifier:
    return Classifier(Aspp(), 5e-3, 1e-4, "adamw")


def _decoder(apart: float) -> Callable[..., Classifier]:
    def make() -> Classifier:
        return Classifier(Decoder(apart), 0.02, 1e-4)

    return make


def _digits(count: int, batch_size: int) -> Callable[..., Digits]:
    def make(seed: int, **options: Any) -> Digits:
        return Digits(seed, count, batch_size, **options)

    return make


def _bad_digits(seed: int, bad: int = 1) -> Digits:
    return Digits(seed, 600, 30, bad=bad)


SEEDS_OF_SIX = SEEDS[:6]

_DROPOUT = "300 digits, pre-activation network of six blocks (16, 32, 64 channels), SGD 0.05, 40 epochs"
_HEAD = "160 crops of 16 x 16 from eight photographs, residual network of three blocks, last map 4 x 4, SGD 0.05, 30 epochs"
_CUES = "128 images of 32 x 32: a pixel's class is its texture, turned round by a spot up to 8 pixels away"
_NO_NORM = "The coarse branch ends in a convolution without a norm; whether a norm there would do as much was not tried."
_DECAYS = {"no_norm": Arm(callbacks=[GammaDecay]), "gamma_roles": Arm(callbacks=[lambda: GammaDecay(policy="gamma_roles")])}
_DECAY_CONTRASTS = [("gamma_roles", "no_norm"), ("no_norm", "without"), ("gamma_roles", "without")]

EXPERIMENTS = [
    Experiment(
        "nan_guard",
        "NaNGuard",
        "nan_safety.md",
        "One image of 600 holds one NaN pixel: what is left after ten epochs?",
        "600 digits, residual network with batch norm, SGD 0.05 with momentum; every epoch meets the bad image once",
        HandChecked,
        _bad_digits,
        {
            "skip when the loss is NaN": Arm(module={"check": "skip"}),
            "drop NaN gradients": Arm(module={"check": "drop"}),
            "NaNGuard": Arm(callbacks=[_guard]),
            "clean data": Arm(data={"bad": 0}),
        },
        [("NaNGuard", "without"), ("skip when the loss is NaN", "without"), ("drop NaN gradients", "without"), ("NaNGuard", "clean data")],
        epochs=10,
        metrics=("val_acc",),
        limits="Checks by hand come too late here: the forward pass has put NaN into the running statistics of the batch norms already.",
    ),
    Experiment(
        "dropout_placement",
        "DropoutPlacement (NK101), p = 0.5",
        "dropout_placement.md",
        "Dropout before a batch norm, against the same dropout where `place_dropout` puts it, and none.",
        _DROPOUT,
        _pre_activation(0.5),
        _digits(300, 50),
        {"placed": Arm(callbacks=[DropoutPlacement]), "no dropout": Arm(module={"dropout": 0.0})},
        [("placed", "without"), ("placed", "no dropout")],
        epochs=40,
        probes={"recalibration gap": _recalibration_gap, "largest variance shift": _largest_shift},
        limits="It shows that misplaced dropout costs, not that dropout helps.",
    ),
    Experiment(
        "dropout_placement_mild",
        "DropoutPlacement (NK101), p = 0.3",
        "dropout_placement.md",
        "The same with a milder dropout.",
        _DROPOUT,
        _pre_activation(0.3),
        _digits(300, 50),
        {"placed": Arm(callbacks=[DropoutPlacement])},
        [("placed", "without")],
        epochs=40,
    ),
    Experiment(
        "head",
        "StochasticPooling, and dropout around the pool (NK104)",
        "stochastic_pooling.md",
        "What regularizes a pooled head: a subset of the map, a dropout behind the pool, or one in front of it?",
        _HEAD,
        _texture_head,
        Textures,
        {
            "SAP keep 0.1": Arm(callbacks=[lambda: StochasticPooling(keep=0.1, scale="none")]),
            "SAP keep 0.5": Arm(callbacks=[lambda: StochasticPooling(keep=0.5, scale="none")]),
            "dropout 0.8 behind": Arm(module={"p": 0.8}),
            "dropout 0.8 before": Arm(module={"p": 0.8, "place": "same"}),
            "equal strength before": Arm(module={"p": 0.8, "place": "equal_strength"}),
        },
        [
            ("SAP keep 0.1", "without"),
            ("SAP keep 0.5", "without"),
            ("SAP keep 0.1", "dropout 0.8 behind"),
            ("dropout 0.8 before", "dropout 0.8 behind"),
            ("equal strength before", "dropout 0.8 behind"),
        ],
        epochs=30,
        limits="The p of equal strength is that of the weights before training; it is not one of equal effect.",
    ),
    Experiment(
        "erasing",
        "VarianceSafeErasing (NK702)",
        "positional_variance.md",
        "A quarter of every image erased: by a constant (without), by noise of the images' statistics, and two controls.",
        "800 digits, ViT of four blocks on 16 patches, AdamW 2e-3, 40 epochs",
        _erased_vit,
        _digits(800, 50),
        {name: Arm(module={"kind": name}) for name in ("noise", "weak noise", "constant, variance restored")},
        [("noise", "without"), ("noise", "constant, variance restored"), ("noise", "weak noise")],
        epochs=40,
        seeds=SEEDS_OF_SIX,
        limits="Erasing itself is not judged here: every arm erases.",
    ),
    Experiment(
        "normalize",
        "Normalize missing in evaluation (NK703)",
        "positional_variance.md",
        "What the mistake costs that NK703 names.",
        "800 digits, ViT of four blocks on 16 patches, AdamW 2e-3, 15 epochs; the held-out images stay in [0, 1]",
        _plain_vit,
        _digits(800, 50),
        {"not normalized": Arm(data={"is_eval_normalized": False})},
        [("not normalized", "without")],
        epochs=15,
        metrics=("val_acc", "val_loss"),
        seeds=SEEDS_OF_SIX,
    ),
    Experiment(
        "decay_deep",
        "GammaDecay, 12 blocks",
        "weight_decay.md",
        "Which gammas to decay in a deep narrow network: all (without), none, or those the derivation names?",
        "600 digits, residual network of 12 blocks (8, 16, 32 channels), SGD 0.1, decay 5e-3, 20 epochs",
        _deep,
        _digits(600, 60),
        _DECAYS,
        _DECAY_CONTRASTS,
        epochs=20,
        seeds=SEEDS_OF_SIX,
    ),
    Experiment(
        "decay_shallow",
        "GammaDecay, 3 blocks, strong decay",
        "weight_decay.md",
        "The same in a shallow network under a decay that is ten times stronger.",
        "600 digits, residual network of three blocks, SGD 0.05, decay 0.05, 20 epochs",
        _shallow,
        _digits(600, 60),
        _DECAYS,
        _DECAY_CONTRASTS,
        epochs=20,
    ),
    Experiment(
        "atrous_rates",
        "AtrousRates",
        "segmentation.md",
        "Rates 12, 24, 36 on a map of 32 x 32 cells, against the fitted ones, where a cue some cells away decides.",
        f"{_CUES}; two layers and an ASPP without its image-wide branch, AdamW 5e-3, 12 epochs",
        _aspp,
        Cues,
        {"AtrousRates": Arm(callbacks=[AtrousRates]), "rates 1, 2, 3": Arm(callbacks=[lambda: AtrousRates(rates=(1, 2, 3))])},
        [("AtrousRates", "without"), ("AtrousRates", "rates 1, 2, 3")],
        epochs=12,
        seeds=SEEDS_OF_SIX,
        limits="The task is made for it: a cue at just this distance. Where textures alone decide, rates do not matter.",
    ),
    Experiment(
        "scales_apart",
        "ScaleEqualization, branches scaled apart by 0.01",
        "segmentation.md",
        "Two branches of which one is a hundred times smaller, joined in a decoder: with and without equalization.",
        f"{_CUES}; fine and coarse features joined, SGD 0.02, 15 epochs",
        _decoder(0.01),
        Cues,
        {"ScaleEqualization": Arm(callbacks=[ScaleEqualization])},
        [("ScaleEqualization", "without")],
        epochs=15,
        seeds=SEEDS_OF_SIX,
        limits=f"The branches were scaled apart on purpose. {_NO_NORM}",
    ),
    Experiment(
        "scales_stock",
        "ScaleEqualization, branches as they are",
        "segmentation.md",
        "The same decoder with nothing scaled.",
        f"{_CUES}; fine and coarse features joined, SGD 0.02, 15 epochs",
        _decoder(1.0),
        Cues,
        {"ScaleEqualization": Arm(callbacks=[ScaleEqualization])},
        [("ScaleEqualization", "without")],
        epochs=15,
        seeds=SEEDS_OF_SIX,
        limits=_NO_NORM,
    ),
    Experiment(
        "gaussian_bias",
        "GaussianBias",
        "gaussian_bias.md",
        "A Gaussian bias on attention where images are few.",
        "200 digits, ViT of four blocks on 16 patches, AdamW 2e-3, 60 epochs",
        _plain_vit,
        _digits(200, 50),
        {"GaussianBias": Arm(callbacks=[lambda: GaussianBias(sigma=1.0)])},
        [("GaussianBias", "without")],
        epochs=60,
    ),
]
