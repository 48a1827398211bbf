"""Small data that come with installed packages, split anew for every seed."""

from __future__ import annotations

__all__ = ["Cues", "Digits", "Textures"]

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.recipes.segmentation.mosaic import TEXTURES, cut_part, load_photograph

Pair = tuple[Tensor, Tensor]


class Tensors(L.LightningDataModule):
    """Loaders over images and labels that lie in memory."""

    def __init__(self, train: Pair, held_out: Pair, batch_size: int) -> None:
        super().__init__()
        self.train, self.held_out, self.batch_size = train, held_out, batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(*self.train), self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(*self.held_out), 500)


class Digits(Tensors):
    """scikit-learn's digits, (1, 8, 8), normalized.

    Args:
        seed: of the split.
        count: training images; 800 others are held out.
        bad: training images in which one pixel is NaN.
        is_eval_normalized: False forgets the normalization of the held-out images.
    """

    def __init__(self, seed: int, count: int = 300, batch_size: int = 50, bad: int = 0, is_eval_normalized: bool = True) -> None:
        digits = load_digits()
        split = train_test_split(
            digits.images / 16, digits.target, train_size=count, test_size=800, random_state=seed, stratify=digits.target
        )
        train_x, held_x = (torch.tensor(images, dtype=torch.float32)[:, None] for images in split[:2])
        train_y, held_y = (torch.tensor(labels) for labels in split[2:])
        mean, std = train_x.mean(), train_x.std()
        train_x, held_x = (train_x - mean) / std, (held_x - mean) / std if is_eval_normalized else held_x
        train_x[:bad, 0, 3, 3] = torch.nan
        super().__init__((train_x, train_y), (held_x, held_y), batch_size)


class Textures(Tensors):
    """Crops of the eight photographs of the segmentation recipe, (1, 16, 16): training from their left parts, the rest held out.

    Brightness and contrast are taken away and drawn anew: the texture alone tells the class.
    """

    def __init__(self, seed: int, count: int = 160, batch_size: int = 40, side: int = 16) -> None:
        draw = torch.Generator().manual_seed(seed)
        images = [load_photograph(texture).float() / 255 for texture in TEXTURES]
        train = [_crops(cut_part(image, "train"), count // len(images), side, draw) for image in images]
        held_out = [_crops(cut_part(image, "val"), 120, side, draw) for image in images]
        super().__init__(_labelled(train), _labelled(held_out), batch_size)


class Cues(Tensors):
    """Images (1, 32, 32) of four quarters; in each the label of a pixel is its texture, turned round where the quarter's cue is dark.

    Textures (upright or level stripes) change every 8 pixels; the cue is a spot of 3 x 3 pixels in the middle of the quarter. So a pixel
    needs what is around it, and a cue up to 8 pixels away, and nothing from another quarter.
    """

    def __init__(self, seed: int, count: int = 128, batch_size: int = 16) -> None:
        draw = torch.Generator().manual_seed(seed)
        super().__init__(_draw_cues(count, draw), _draw_cues(128, draw), batch_size)


def _crops(image: Tensor, count: int, side: int, draw: torch.Generator) -> Tensor:
    crops = []
    for _ in range(count):
        top, left = (int(torch.randint(size - side, (), generator=draw)) for size in image.shape)
        crop = image[top : top + side, left : left + side]
        contrast, brightness = 0.7 + 0.6 * torch.rand((), generator=draw), 0.5 * (torch.rand((), generator=draw) - 0.5)
        noise = 0.2 * torch.randn(side, side, generator=draw)
        crops.append((crop - crop.mean()) / (crop.std() + 1e-3) * contrast + brightness + noise)
    return torch.stack(crops)[:, None]


def _labelled(by_class: list[Tensor]) -> Pair:
    labels = [torch.full((len(crops),), label) for label, crops in enumerate(by_class)]
    return torch.cat(by_class), torch.cat(labels)


def _draw_cues(count: int, draw: torch.Generator) -> Pair:
    rows = torch.arange(32)
    stripes = torch.stack([(rows % 4 < 2).float().expand(32, 32), (rows % 4 < 2).float()[:, None].expand(32, 32)]) * 2 - 1
    textures = torch.randint(2, (count, 4, 4), generator=draw).repeat_interleave(8, 1).repeat_interleave(8, 2)
    signs = torch.randint(2, (count, 2, 2), generator=draw)
    images = torch.where(textures == 0, stripes[0], stripes[1]) + 0.5 * torch.randn(count, 32, 32, generator=draw)
    is_cue = ((rows % 16 >= 7) & (rows % 16 <= 9)).float()
    spots = is_cue[:, None] * is_cue
    dark = signs.repeat_interleave(16, 1).repeat_interleave(16, 2)
    images = images * (1 - spots) + spots * (4.0 - 8.0 * dark)
    return images[:, None], textures ^ dark
