"""How much noise each time holds, and the way back from noise to images."""

from __future__ import annotations

__all__ = ["NoiseSchedule"]

import math
from collections.abc import Callable

import torch
from torch import Tensor


class NoiseSchedule:
    """The cosine schedule over `count` times, 0 being the cleanest. Kept out of modules: half precision must not round it.

    Sources: the schedule: A. Nichol and P. Dhariwal, arXiv 2102.09672; the process: J. Ho et al., arXiv 2006.11239.

    >>> NoiseSchedule(4).kept.shape
    torch.Size([4])
    """

    def __init__(self, count: int) -> None:
        angles = (torch.arange(count + 1, dtype=torch.float64) / count + 0.008) / 1.008 * (math.pi / 2)
        shares = angles.cos().square()
        steps = (shares[1:] / shares[:-1]).clamp(min=0.001)
        self.kept = steps.cumprod(0)
        """Share of the variance that is still the image's, by time."""

    def add_noise(self, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Images (N, ...) in [-1, 1] as they are at `times` (N,)."""
        kept = self.kept[times.cpu()].view(-1, *[1] * (images.dim() - 1)).to(images.device, torch.float32)
        return kept.sqrt() * images + (1 - kept).sqrt() * noise

    def sample(self, predict: Callable[[Tensor, Tensor], Tensor], draws: Tensor) -> Tensor:
        """Images (N, ...) in [-1, 1] from normal draws (N, steps + 1, ...): the start, and what each step adds.

        With fewer steps than times, the steps are spread evenly over them. `predict` gives the noise in images (N, ...) at times (N,).
        """
        steps = draws.shape[1] - 1
        times = torch.linspace(len(self.kept) - 1, 0, steps).round().long().tolist()
        x = draws[:, 0]
        for index, (time, following) in enumerate(zip(times, [*times[1:], None], strict=True)):
            kept = float(self.kept[time])
            kept_next = 1.0 if following is None else float(self.kept[following])
            noise = predict(x, torch.full((len(x),), time, device=x.device)).float()
            image = ((x - math.sqrt(1 - kept) * noise) / math.sqrt(kept)).clamp(-1, 1)
            added = 1 - kept / kept_next
            mean = (math.sqrt(kept_next) * added * image + math.sqrt(kept / kept_next) * (1 - kept_next) * x) / (1 - kept)
            x = mean + math.sqrt(added * (1 - kept_next) / (1 - kept)) * draws[:, index + 1]
        return x
