"""DataModules: windows of text."""

from __future__ import annotations

__all__ = ["StandardLibrary", "TextData", "TextFolder", "Windows"]

from abc import abstractmethod
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset, default_collate

from pl_normkit.recipes.language.corpus import Tokens, folder_files, pack, read_vocabulary, stdlib_files
from pl_normkit.recipes.loading import Part, RecipeData, require_option


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Non-overlapping windows of a row of tokens, and for each place the token that follows: both (length,) int64."""

    def __init__(self, tokens: Tokens, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return max(len(self.tokens.values) - 1, 0) // self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.length
        row = torch.from_numpy(self.tokens.values[start : start + self.length + 1].astype("int64"))
        return row[:-1], row[1:]


class _FirstOfShuffled(DistributedSampler[Any]):
    """The first `count` of the samples of each epoch's order, the same for all processes together."""

    def __init__(self, dataset: Windows, count: int, world: int, rank: int, seed: int) -> None:
        super().__init__(dataset, world, rank, shuffle=True, seed=seed, drop_last=True)
        self.num_samples = min(self.num_samples, max(count // world, 1))

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()  # type: ignore[arg-type]
        return islice(order, self.rank, self.num_samples * self.num_replicas, self.num_replicas)


class TextData(RecipeData[Tokens]):
    """Loaders over packed text; a subclass says where it comes from.

    Batches: (tokens (N, length), the tokens that follow (N, length)), and for prediction the numbers of the samples alone. The order of
    the training windows depends on the seed and the epoch alone, so that a resumed run sees what the whole one would have seen.

    Args:
        length: tokens in a window.
        tokenizer: a `tokenizer.json` of Hugging Face; None takes bytes.
        batch_size: training batch.
        eval_batch_size: batch for validation, test and prediction.
        epoch_windows: windows in an epoch of training, drawn anew each time; validation comes after it.
        eval_windows: windows of validation and test, spread evenly over the text held out.
        samples: how many texts prediction writes.
        cache_dir: where packed text is kept; None takes a folder of the system's temporary ones.
        num_workers: processes that read windows.

    Raises DataError for a value that cannot be used.
    """

    def __init__(
        self,
        length: int = 128,
        tokenizer: str | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        epoch_windows: int = 2048,
        eval_windows: int = 512,
        samples: int = 4,
        cache_dir: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, flip=0.0, jitter=0.0)
        for option, value in (("length", length), ("epoch_windows", epoch_windows), ("eval_windows", eval_windows), ("samples", samples)):
            require_option(value > 0, option, value, "take at least 1")
        self.length = length
        self.vocabulary = read_vocabulary(tokenizer)
        self.epoch_windows, self.eval_windows, self.samples = epoch_windows, eval_windows, samples
        self.cache_dir = None if cache_dir is None else Path(cache_dir)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.vocabulary.size

    @property
    def class_names(self) -> list[str]:
        """What a checkpoint is held against: the name of the vocabulary."""
        return [self.vocabulary.name]

    @abstractmethod
    def find_files(self) -> dict[Part, list[Path]]:
        """The text files of each part. Raises DataError."""

    def build_sources(self, parts: tuple[Part, ...]) -> dict[Part, Tokens]:
        files = self.find_files()
        packed = {part: pack(files[part], self.vocabulary, self.cache_dir) for part in parts}
        for part, tokens in packed.items():
            fix = "give more text, or take a smaller --data.length"
            require_option(len(Windows(tokens, self.length)) > 0, "length", f"{self.length}, of {len(tokens.values)} in {part}", fix)
        return packed

    @property
    def tokens_per_byte(self) -> float:
        """Of the text held out, by which nats a token become bits a byte."""
        held_out = next(self.sources[part] for part in ("val", "test", "train") if part in self.sources)
        return len(held_out.values) / max(held_out.text_bytes, 1)

    def train_dataloader(self) -> DataLoader[Any]:
        dataset = Windows(self.sources["train"], self.length)
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        sampler = _FirstOfShuffled(dataset, self.epoch_windows, world, rank, torch.initial_seed() % 2**31)
        return self.build_loader(dataset, default_collate, training=True, sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._held_out("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._held_out("test")

    def _held_out(self, part: Part) -> DataLoader[Any]:
        dataset = Windows(self.sources[part], self.length)
        count = min(self.eval_windows, len(dataset))
        chosen = [index * len(dataset) // count for index in range(count)]
        return self.build_loader(torch.utils.data.Subset(dataset, chosen), default_collate)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.build_loader(TensorDataset(torch.arange(self.samples)), default_collate)


class StandardLibrary(TextData):
    """The Python source of the standard library, about 10 MB; nothing is downloaded. A tenth of the files each for validation and test."""

    def find_files(self) -> dict[Part, list[Path]]:
        return stdlib_files()


class TextFolder(TextData):
    """Text files of a folder and those below it.

    Args:
        root: the folder; with folders train, val and test in it these are the parts, else a tenth of the files each is held out.
        pattern: which files.
        options: as for `TextData`.
    """

    def __init__(
        self,
        root: str,
        pattern: str = "*.txt",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root, self.pattern = Path(root), pattern

    def find_files(self) -> dict[Part, list[Path]]:
        return folder_files(self.root, self.pattern)
