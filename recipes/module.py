"""What the LightningModules of all recipes share."""

from __future__ import annotations

__all__ = ["RecipeModule", "require_model_option"]

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

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
        strange = [key for key, value in checkpoint["state_dict"].items() if key not in own or own[key].shape != value.shape]
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


def require_model_option(holds: bool, option: str, value: object, fix: str) -> None:
    """Raise ConfigError naming the model option unless `holds`."""
    if not holds:
        raise ConfigError(f"the model option {option} cannot be used", where=f"--model.{option}", evidence=repr(value), fix=fix)
