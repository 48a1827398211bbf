"""Which networks of a LightningModule a training step calls, and with what: watched in the run, or found by rehearsing a step."""

from __future__ import annotations

__all__ = ["NetworkCall", "NetworkCalls", "networks_in", "rehearse"]

import inspect
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pl_normkit.callbacks._lightning import overrides, quiet_loggers
from pl_normkit.preserve import objects_kept, preserved
from pl_normkit.wrappers import unwrapped

if TYPE_CHECKING:
    import lightning.pytorch as pl


class NetworkCall(NamedTuple):
    """A network that ran, and a tensor, a tuple of positional or a dict of keyword arguments it was called with."""

    network: nn.Module
    inputs: Any


class NetworkCalls:
    """Keeps what the networks of a LightningModule are first called with, from now until `finish`.

    Its own `forward` counts as one network where the user wrote one, what runs inside it does not count then; each other child with
    parameters that is called is one too.

    Args:
        pl_module: the LightningModule.
        is_wrapped: whether the strategy wraps the module (DDP, FSDP): then Lightning's first call of it is the training step itself.
        stop: called after each network that is seen for the first time, before it runs.
    """

    only_watches = True  # for `TraceStore`: its hooks change nothing

    def __init__(self, pl_module: nn.Module, *, is_wrapped: bool = False, stop: Callable[[NetworkCalls], None] | None = None) -> None:
        self.pl_module = pl_module
        self.networks = list(networks_in(pl_module))
        self._stop = stop
        self._calls_to_skip = int(is_wrapped)
        self._inputs: dict[nn.Module, Any] = {}
        self._inside: set[nn.Module] = set()
        self._depth: list[bool] = []
        self._handles = [network.register_forward_pre_hook(self._keep, with_kwargs=True) for network in self.networks]
        if overrides(pl_module, "forward"):
            self._handles += [
                pl_module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
                pl_module.register_forward_hook(self._leave, always_call=True),
            ]

    @property
    def is_complete(self) -> bool:
        """Whether each network that is known was called."""
        return all(network in self._inputs for network in self.networks)

    def has_seen(self, network: nn.Module) -> bool:
        return any(unwrapped(seen) is network for seen in self._inputs)

    def calls(self) -> list[NetworkCall]:
        """The LightningModule first where its forward ran and its call can be repeated, then networks that ran outside of it."""
        whole = self._inputs.get(self.pl_module)
        hidden = self._inside if whole is not None else set()
        found = [NetworkCall(network, self._inputs[network]) for network in self.networks if network in self._inputs]
        outside = [call for call in found if call.network not in hidden and call.inputs is not None]
        return ([NetworkCall(self.pl_module, whole)] if whole is not None else []) + outside

    def finish(self) -> list[NetworkCall]:
        """Stop watching; what was seen."""
        while self._handles:
            self._handles.pop().remove()
        return self.calls()

    def _enter(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        is_redirected = self._calls_to_skip > 0
        self._depth.append(not is_redirected)
        if is_redirected:
            self._calls_to_skip -= 1
        else:
            self._see(network, args, kwargs)

    def _leave(self, network: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and self._depth:
            self._depth.pop()

    def _keep(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        if not any(self._depth):
            self._inside.discard(network)
        elif network not in self._inputs:
            self._inside.add(network)
        self._see(network, args, kwargs)

    def _see(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if network not in self._inputs:
            self._inputs[network] = tree_map_only(Tensor, Tensor.detach, _as_example(network, args, kwargs))
            if self._stop is not None:
                self._stop(self)


def networks_in(module: nn.Module) -> Iterator[nn.Module]:
    """Children with parameters, those in lists and dicts of modules too."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from networks_in(child)
        elif any(True for _ in child.parameters()):
            yield child


def _as_example(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call as example inputs; None where positional and keyword arguments cannot be told by name alone."""
    if not kwargs:
        return args
    if not args:
        return kwargs
    try:
        bound = inspect.signature(network.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return None
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            return None
        else:
            named[name] = value
    return named


class _SeenEnoughError(BaseException):
    """Ends a rehearsed step; no `except Exception` of a user's code may stop it."""


def rehearse(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *, until: nn.Module | None = None) -> list[NetworkCall]:
    """Run the training step on `batch` without gradients until every network, or `until`, was called; what they were called with.

    Nothing is optimized or logged. The module with its Python attributes and every RNG are as before. A step that fails gives what
    was called up to then.
    """
    for optimizers in (2, 1, 3, 4):  # as many as the step unpacks; before a fit nobody has counted them
        calls, is_miscounted = _rehearse_once(trainer, pl_module, batch, until, optimizers)
        if not is_miscounted:
            break
    return calls


def _rehearse_once(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, until: nn.Module | None, optimizers: int
) -> tuple[list[NetworkCall], bool]:
    def stop(seen: NetworkCalls) -> None:
        if seen.is_complete if until is None else seen.has_seen(until):
            raise _SeenEnoughError

    is_miscounted = False
    with ExitStack() as stack:
        kept = objects_kept(*pl_module.modules(), *_of_its_classes(pl_module))
        for context in (preserved(pl_module, buffers=True), kept, torch.no_grad(), warnings.catch_warnings()):
            stack.enter_context(context)
        warnings.simplefilter("ignore")
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(quiet_loggers(trainer))
        _stand_in(pl_module, optimizers)
        watching = NetworkCalls(pl_module, stop=stop)
        stack.callback(watching.finish)
        step = pl_module.training_step
        try:
            step(*_step_arguments(step, batch))
        except _SeenEnoughError:
            pass
        except Exception as error:  # the run itself will say so, if it fails there too
            is_miscounted = isinstance(error, ValueError) and "values to unpack" in str(error)
        return watching.finish(), is_miscounted


def _of_its_classes(pl_module: nn.Module) -> list[Any]:
    """Lists and the like that a step fills and all instances share."""
    own = [kind for kind in type(pl_module).__mro__ if kind.__module__.partition(".")[0] not in ("torch", "lightning", "pytorch_lightning")]
    return [value for kind in own for value in vars(kind).values() if isinstance(value, (list, dict, set, deque))]


def _step_arguments(step: Callable[..., Any], batch: Any) -> tuple[Any, ...]:
    """As Lightning builds them: the batch, its index where a second argument is taken, or an iterator where that is the name."""
    parameters = inspect.signature(step).parameters
    if "dataloader_iter" in parameters:
        return (iter([(batch, 0, 0)]),)
    takes_index = len(parameters) >= 2 or any(known.kind is inspect.Parameter.VAR_POSITIONAL for known in parameters.values())
    return (batch, 0) if takes_index else (batch,)


class _StandIn:
    """Optimizers, or schedulers, that take every call and do nothing; one of them, and a sequence of `count`."""

    def __init__(self, count: int = 1) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": 0.0, "params": []}]
        self._count = count

    def step(self, closure: Any = None, **_: Any) -> Any:
        return closure() if callable(closure) else None

    def __iter__(self) -> Iterator[_StandIn]:
        return iter([_StandIn() for _ in range(self._count)])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> _StandIn:
        return _StandIn()

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def _stand_in(pl_module: nn.Module, optimizers: int) -> None:
    """Answer what a step asks of Lightning without effect. The answers stand in the instance, where `preserved` takes them out."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return

    @contextmanager
    def toggled(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    names = ("log", "log_dict", "manual_backward", "backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients", "print")
    vars(pl_module).update(dict.fromkeys(names, nothing), toggled_optimizer=toggled)
    vars(pl_module).update(
        all_gather=lambda data, *args, **kwargs: data,
        optimizers=lambda *args, **kwargs: _StandIn(optimizers),
        lr_schedulers=lambda: _StandIn(optimizers),
    )
