"""The classifier in whose features samples are compared with real images."""

from __future__ import annotations

__all__ = ["FEATURES", "Scorer", "fit_scorer"]

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.recipes.diffusion.frechet import frechet_distance

FEATURES = 32
_EPOCHS = 15
_BATCH = 64

Labelled = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Scorer:
    """A trained classifier. On the CPU in float32, wherever and however the diffusion model computes.

    Attributes:
        body: from images (N, channels, H, W) in [-1, 1] to features (N, FEATURES).
        accuracy: share of the held-out images that it classifies right.
        floor: Frechet distance of the training images to the held-out ones: what copies of real images would get.
    """

    body: nn.Module
    accuracy: float
    floor: float

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, FEATURES)."""
        with torch.autocast("cpu", enabled=False):
            found: Tensor = self.body(images.cpu().float())
        return found


def fit_scorer(train: Labelled, held_out: Labelled, classes: int) -> Scorer:
    """Train a small CNN on images (N, channels, H, W) and labels (N,); nothing random outside is read or moved."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        body = _body(train[0].shape[1])
        head = nn.Linear(FEATURES, classes)
        optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=3e-3, weight_decay=0.01)
        for _ in range(_EPOCHS):
            for batch in torch.split(torch.randperm(len(train[0])), _BATCH):
                loss = F.cross_entropy(head(body(train[0][batch])), train[1][batch])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
    scorer = Scorer(body.eval().requires_grad_(False), 0.0, 0.0)
    found, real = scorer.features(held_out[0]), scorer.features(train[0])
    accuracy = float((head(found).argmax(1) == held_out[1]).float().mean())
    return Scorer(body, accuracy, frechet_distance(real.mean(0), real.T.cov(), found.mean(0), found.T.cov()))


def _body(channels: int) -> nn.Sequential:
    """Group norms: a batch of one image is fine."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.GroupNorm(4, 64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, FEATURES),
        nn.Tanh(),
    )
