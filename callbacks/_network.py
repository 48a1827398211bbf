"""How callbacks reach the network of a LightningModule: after `configure_model`, or on its first training step."""

from __future__ import annotations

__all__ = ["FirstCall", "InputCapture", "after_configure_model", "is_sharded", "traced_network"]

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def after_configure_model(pl_module: pl.LightningModule, act: Callable[[], None]) -> None:
    """Call `act` once the module tree is complete: now, or when the `configure_model` of the module has run."""
    if not is_overridden("configure_model", pl_module):
        act()
        return
    configure_model = pl_module.configure_model

    def configure_model_then_act() -> None:
        del pl_module.configure_model
        configure_model()
        act()

    pl_module.configure_model = configure_model_then_act  # type: ignore[method-assign]


def is_sharded(trainer: pl.Trainer) -> bool:
    """Whether each process holds a part of the parameters."""
    return isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))


def traced_network(pl_module: pl.LightningModule) -> nn.Module | None:
    """What a trace should read: the module where it has a `forward`, else its only child with parameters, None where there are several."""
    if is_overridden("forward", pl_module):
        return pl_module
    networks = [child for child in pl_module.children() if any(True for _ in child.parameters())]
    return networks[0] if len(networks) == 1 else None


class InputCapture:
    """Keeps what the networks of a LightningModule are called with, from now until `finish`.

    Args:
        pl_module: its own `forward` counts as the network if `training_step` calls it, else each child that is called.
        is_wrapped: whether the strategy wraps the module (DDP, FSDP): then Lightning's first call of it is the
            training step itself.
    """

    def __init__(self, pl_module: pl.LightningModule, *, is_wrapped: bool) -> None:
        self._pl_module = pl_module
        self._calls_to_skip = int(is_wrapped)
        self._inputs: dict[nn.Module, Any] = {}
        networks = [pl_module, *_networks(pl_module)]
        self._handles = [network.register_forward_pre_hook(self._keep, with_kwargs=True) for network in networks]

    def _keep(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if network is self._pl_module and self._calls_to_skip:
            self._calls_to_skip -= 1
        elif network not in self._inputs:
            self._inputs[network] = tree_map_only(Tensor, Tensor.detach, _as_example(network, args, kwargs))

    def finish(self) -> list[tuple[nn.Module, Any]]:
        """Stop watching; the networks that ran with their inputs, the LightningModule alone where its forward ran."""
        for handle in self._handles:
            handle.remove()
        whole = self._inputs.get(self._pl_module)
        return list(self._inputs.items()) if whole is None else [(self._pl_module, whole)]


def _networks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _networks(child)
        elif any(True for _ in child.parameters()):
            yield child


def _as_example(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not kwargs:
        return args
    return dict(inspect.signature(network.forward).bind(*args, **kwargs).arguments) if args else kwargs


class FirstCall:
    """Lets `act(network, inputs)` run once, just before the first network of a LightningModule that is called does its forward.

    The LightningModule itself is the network if it is called, else the child that is called first. `is_wrapped` as for `InputCapture`.
    """

    def __init__(self, pl_module: pl.LightningModule, act: Callable[[nn.Module, Any], None], *, is_wrapped: bool) -> None:
        self._pl_module = pl_module
        self._act = act
        self._calls_to_skip = int(is_wrapped)
        networks = [pl_module, *_networks(pl_module)]
        self._handles = [network.register_forward_pre_hook(self._run, with_kwargs=True) for network in networks]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if network is self._pl_module and self._calls_to_skip:
            self._calls_to_skip -= 1
            return
        self.remove()
        self._act(network, tree_map_only(Tensor, Tensor.detach, _as_example(network, args, kwargs)))

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()
