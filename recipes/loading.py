"""What the DataModules of all recipes share."""

from __future__ import annotations

__all__ = ["Part", "RecipeData", "checking", "require_option"]

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, Generic, Literal, TypeVar, cast

import lightning as L
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from pl_normkit.errors import DataError

Part = Literal["train", "val", "test"]
Source = TypeVar("Source")
File = TypeVar("File")


@contextmanager
def checking(files: Sequence[File], part: Part) -> Iterator[Iterable[File]]:
    """`files` under a progress bar.

    Where a file is refused, the bar's threads end with the block. Left to the garbage collector they end anywhere, and rich then waits
    for a lock that its own thread holds.
    """
    bar = cast(Generator[File, None, None], track(files, description=f"checking {part} files", transient=True))
    with closing(bar):
        yield bar


class RecipeData(L.LightningDataModule, Generic[Source]):
    """Loaders over a source of samples for each part; a subclass says where these come from.

    Its datasets hand over a DataError as their item, and their `collate_fn` passes it on as the batch: raised inside a loader worker,
    the text of the error would carry the worker's traceback.

    Args:
        batch_size: training batch.
        eval_batch_size: batch for validation, test and prediction.
        num_workers: processes that read training samples; evaluation uses as many.
        flip: probability of a horizontal flip.
        jitter: largest relative change of brightness and contrast.

    Raises DataError for a value that cannot be used.
    """

    def __init__(self, *, batch_size: int, eval_batch_size: int, num_workers: int, flip: float, jitter: float) -> None:
        super().__init__()
        require_option(batch_size > 0, "batch_size", batch_size, "take at least 1")
        require_option(eval_batch_size > 0, "eval_batch_size", eval_batch_size, "take at least 1")
        require_option(num_workers >= 0, "num_workers", num_workers, "take 0 or more")
        require_option(0 <= flip <= 1, "flip", flip, "take a probability")
        require_option(0 <= jitter < 1, "jitter", jitter, "take a share below 1")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.sources: dict[Part, Source] = {}

    @abstractmethod
    def build_sources(self, parts: tuple[Part, ...]) -> dict[Part, Source]:
        """Find and check the samples of `parts`. Raises DataError."""

    def build_predict_source(self) -> Source:
        """The images to predict: those of the test. Raises DataError."""
        return self.build_sources(("test",))["test"]

    def setup(self, stage: str) -> None:
        wanted: dict[str, tuple[Part, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        missing = tuple(part for part in wanted.get(stage, ()) if part not in self.sources)
        if missing:
            self.sources.update(self.build_sources(missing))

    def build_loader(
        self, dataset: Any, collate_fn: Callable[..., Any], *, training: bool = False, sampler: Sampler[Any] | None = None
    ) -> DataLoader[Any]:
        """In training whole batches in a random order, or in that of `sampler`; else all of it in its own."""
        return DataLoader(
            dataset,
            batch_size=min(self.batch_size, len(dataset)) if training else self.eval_batch_size,
            shuffle=training and sampler is None,
            sampler=sampler,
            drop_last=training,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate_fn,
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Raise here, in the main process, the DataError that a loader worker handed over as its batch."""
        if isinstance(batch, DataError):
            raise batch
        return batch

    def sample_images(self, count: int) -> Tensor:
        """The first validation images, (count, channels, H, W) or fewer, as the network gets them. Raises DataError."""
        taken: list[Tensor] = []
        for batch in self.val_dataloader():
            taken += self.on_before_batch_transfer(batch, 0)[0]
            if len(taken) >= count:
                break
        return torch.stack(taken[:count])


def require_option(holds: bool, option: str, value: object, fix: str) -> None:
    """Raise DataError naming the data option unless `holds`."""
    if not holds:
        raise DataError(f"the data option {option} cannot be used", where=f"--data.{option}", evidence=repr(value), fix=fix)
