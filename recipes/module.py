"""What the LightningModules of all recipes share."""

from __future__ import annotations

__all__ = ["RecipeModule", "require_model_option", "step_schedule"]

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pl_normkit.errors import ConfigError, DataError


class RecipeModule(L.LightningModule):
    """A module that knows its classes, keeps them in its checkpoints, and may train a moving average of its weights.

    Attributes:
        class_names: in the order of the logits.
        ema_decay: decay of the moving average, 0 for none. Its checkpoints hold the average as `state_dict`, so validation, test and
            prediction need no callback.
    """

    class_names: list[str]
    ema_decay: float

    def configure_callbacks(self) -> Sequence[Callback]:
        """The moving average comes last, so that it copies a network that other callbacks have edited already.

        Raises ConfigError where Lightning is too old to have EMAWeightAveraging.
        """
        if not self.ema_decay or self.trainer.state.fn != TrainerFn.FITTING:
            return []
        averaging = getattr(callbacks, "EMAWeightAveraging", None)
        if averaging is None:
            raise ConfigError(
                "this version of Lightning has no EMAWeightAveraging",
                where="--model.ema_decay",
                evidence=f"lightning {L.__version__}",
                fix="pip install 'lightning>=2.6', or set --model.ema_decay 0",
            )
        return [averaging(decay=self.ema_decay)]

    @abstractmethod
    def evaluate(self, batch: Any, stage: str) -> None:
        """Log the loss of a batch as `{stage}_loss`, and add the batch to the metrics; `stage` is "val" or "test"."""

    @abstractmethod
    def log_scores(self, stage: str) -> None:
        """Log the metrics of all batches that `evaluate` saw, and start them anew."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self.log_scores("val")

    def on_test_epoch_end(self) -> None:
        self.log_scores("test")

    def count_steps(self) -> int:
        """Optimizer steps of the whole fit. Raises ConfigError where the options do not end it."""
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise ConfigError(
                "the learning rate's schedule needs to know the number of steps", fix="set --trainer.max_epochs or --trainer.max_steps"
            )
        return int(total)

    def score_tables(self) -> Mapping[str, Mapping[str, float]]:
        """Scores of the last evaluation that have a row for each class, or other part: title -> row -> score, NaN for none."""
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["class_names"] = self.class_names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises DataError where the checkpoint has other classes, ConfigError where it belongs to another network."""
        saved = checkpoint.get("class_names", self.class_names)
        if list(saved) != self.class_names:
            raise DataError(
                "the checkpoint was trained on other classes than the data has",
                evidence=f"checkpoint: {list(saved)}; data: {self.class_names}",
                fix="give the data the classes the checkpoint was trained with",
            )
        own = self.state_dict()
        strange = [key for key, value in checkpoint.get("state_dict", {}).items() if key not in own or own[key].shape != value.shape]
        if strange:
            raise ConfigError(
                "the checkpoint belongs to another network",
                where=strange[0],
                evidence=f"{len(strange)} of its tensors are not in this network, or have another shape",
                fix=self.explain_strange_keys(strange),
            )

    def explain_strange_keys(self, keys: Sequence[str]) -> str:
        """What to do about a checkpoint whose tensors `keys` this network does not have."""
        return "give the --model options and the callbacks (--with) that the checkpoint was trained with"


def step_schedule(optimizer: Optimizer, schedule: LRScheduler) -> OptimizerLRScheduler:
    """What `configure_optimizers` returns for a schedule that goes on at every step, logged as "lr"."""
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}


def require_model_option(holds: bool, option: str, value: object, fix: str) -> None:
    """Raise ConfigError naming the model option unless `holds`."""
    if not holds:
        raise ConfigError(f"the model option {option} cannot be used", where=f"--model.{option}", evidence=repr(value), fix=fix)
