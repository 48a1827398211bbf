"""The moving average of the weights, by Lightning's own callback."""

from __future__ import annotations

__all__ = ["ema_callbacks"]

from collections.abc import Sequence

import lightning as L
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from pl_normkit.errors import ConfigError


def ema_callbacks(trainer: L.Trainer, decay: float) -> Sequence[Callback]:
    """For `LightningModule.configure_callbacks`: Lightning's EMAWeightAveraging in a fit, nothing elsewhere or where `decay` is 0.

    Its checkpoints hold the average as `state_dict`, so validation, test and prediction need no callback.

    Raises ConfigError where Lightning is too old to have it.
    """
    if not decay or trainer.state.fn != TrainerFn.FITTING:
        return []
    averaging = getattr(callbacks, "EMAWeightAveraging", None)
    if averaging is None:
        raise ConfigError(
            "this version of Lightning has no EMAWeightAveraging",
            where="--model.ema_decay",
            evidence=f"lightning {L.__version__}",
            mend="pip install 'lightning>=2.6', or set --model.ema_decay 0",
        )
    return [averaging(decay=decay)]
