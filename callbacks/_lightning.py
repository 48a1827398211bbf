"""The two Lightnings: `lightning.pytorch` and `pytorch_lightning` hold the same classes twice, neither knows the other's."""

from __future__ import annotations

__all__ = ["Callback", "has_compiled_part", "is_compiled", "is_sharded", "overrides", "quiet_loggers", "say"]

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Callback
else:
    from lightning.pytorch.callbacks import Callback as _LightningCallback

    class Callback(_LightningCallback):
        """A callback for the Trainers of both Lightnings: each takes only instances of its own class.

        Attributes:
            _of_a_run: names of attributes that belong to a run that is going on, and are None before it.
        """

        _of_a_run: tuple[str, ...] = ()

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            _join_other_lightning()
            return super().__new__(cls)

        def __getstate__(self) -> dict[str, Any]:
            """A copy, also in another process, starts outside of any run; `log` and `log_dict` are the module's, hung on by Lightning."""
            own = {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}
            return own | dict.fromkeys(self._of_a_run)


def _join_other_lightning() -> None:
    """Give our callbacks the parent from `pytorch_lightning` once that is imported; to import it here would cost time, and move
    Lightning's log messages to another logger."""
    other = getattr(sys.modules.get("pytorch_lightning"), "Callback", None)
    if other is not None and other not in Callback.__bases__:
        Callback.__bases__ = (*Callback.__bases__, other)


_SHARDING = {"FSDPStrategy", "ModelParallelStrategy"}


def overrides(pl_module: nn.Module, method: str) -> bool:
    """Whether the user wrote this method of a LightningModule, in a class or on the instance."""
    is_by_compiler = method == "forward" and getattr(pl_module, "_compiler_ctx", None) is not None
    if method in vars(pl_module) and not is_by_compiler:
        return True
    owner = next((kind for kind in type(pl_module).__mro__ if method in vars(kind)), None)
    return owner is not None and owner.__module__.partition(".")[0] not in ("torch", "lightning", "pytorch_lightning")


def is_sharded(trainer: pl.Trainer) -> bool:
    """Whether each process holds a part of the parameters."""
    return any(kind.__name__ in _SHARDING for kind in type(trainer.strategy).__mro__)


def is_compiled(pl_module: nn.Module) -> bool:
    """Whether calls run through a compiler that would also compile hooks: `torch.compile` of the whole, or `compile()` of a part."""
    return getattr(pl_module, "_compiler_ctx", None) is not None or any(
        part._compiled_call_impl is not None for part in pl_module.modules()
    )


def has_compiled_part(network: nn.Module) -> bool:
    """Whether a part of the network is compiled, in either way."""
    return any(type(part).__name__ == "OptimizedModule" or part._compiled_call_impl is not None for part in network.modules())


def say(text: str) -> None:
    """One line of information on rank zero, where Lightning writes its own."""
    rank_zero_info(text)


@contextmanager
def quiet_loggers(trainer: pl.Trainer) -> Iterator[None]:
    """Loggers that take everything and write nothing, as many as there are."""
    package = next(kind.__module__ for kind in type(trainer).__mro__ if kind.__name__ == "Trainer").partition(".trainer")[0]
    dummy: Any = importlib.import_module(f"{package}.loggers.logger").DummyLogger
    before = trainer.loggers
    trainer.loggers = [dummy() for _ in before]
    try:
        yield
    finally:
        trainer.loggers = before
