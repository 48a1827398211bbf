"""`GradientHealth`: how the blocks of a network fare while it trains."""

from __future__ import annotations

__all__ = ["GradientHealth"]

from typing import TYPE_CHECKING, Any

from torch import Tensor

from pl_normkit.block_health import BlockHealth, HealthMeter, curves_of
from pl_normkit.callbacks._lightning import Callback, is_sharded
from pl_normkit.errors import ConfigError

if TYPE_CHECKING:
    import lightning.pytorch as pl


class GradientHealth(Callback):
    """Logs gradient norm, update-to-weight ratio and share of dead ReLU units of each block every few steps.

    The numbers go to the run's loggers as `normkit/gradient_norm/BLOCK`, `normkit/update_ratio/BLOCK` and `normkit/dead_share/BLOCK`.
    Between measured steps nothing is held and nothing runs. Under sharding (FSDP) no rank sees whole parameters, and nothing is measured.

    Args:
        every_n_steps: optimizer steps from one measurement to the next.

    The pages of the recipes' runs draw the last measurement along the blocks.

    Attributes: `latest`, the last measurement by block; empty before. `curves`, the same for a page: title -> (block -> number).

    Raises: ConfigError for a number of steps below 1.
    """

    _of_a_run = ("_meter",)

    def __init__(self, every_n_steps: int = 50) -> None:
        if type(every_n_steps) is not int or every_n_steps < 1:
            raise ConfigError("every_n_steps must be a positive whole number", evidence=repr(every_n_steps))
        self.every_n_steps = every_n_steps
        self.latest: dict[str, BlockHealth] = {}
        self.curves: dict[str, dict[str, float]] = {}
        self._meter: HealthMeter | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._meter = None if is_sharded(trainer) else HealthMeter(pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._meter is not None and trainer.global_step % self.every_n_steps == 0 and loss.grad_fn is not None:
            self._meter.before_backward(loss)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if self._meter is not None:
            self._meter.before_step()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        measured = self._meter.after_step() if self._meter is not None else {}
        if measured:
            self.latest = measured
            self.curves = curves_of(measured, f"by block, step {trainer.global_step}")
            numbers = {f"normkit/{name}/{block}": value for block, health in measured.items() for name, value in _numbers(health)}
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)


def _numbers(health: BlockHealth) -> list[tuple[str, float]]:
    named = {"gradient_norm": health.gradient_norm, "update_ratio": health.update_ratio, "dead_share": health.dead_share}
    return [(name, value) for name, value in named.items() if value is not None]
