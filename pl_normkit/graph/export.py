"""One `torch.export` run of a module, which it leaves as it was: what export refuses for no good reason is put aside."""

from __future__ import annotations

__all__ = ["Arguments", "call_arguments", "export_model", "is_from_root", "place_arguments", "placeholder_name", "without_root"]

import dataclasses
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from pl_normkit.graph.explain import explain
from pl_normkit.preserve import preserved

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a call."""


def call_arguments(example_inputs: Any) -> Arguments:
    """How `example_inputs` is passed: a tuple as positional, a dict as keyword arguments, anything else as the only one."""
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs,), {}


class _Root(nn.Module):
    """Holds the model without attributes of its own: export refuses a root whose attributes hold tensors it did not hold before."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.add_module(_ROOT, model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules[_ROOT](*args, **kwargs)  # type: ignore[misc]


_ROOT = "model"


def is_from_root(path: str) -> bool:
    """Whether an export's path of a module begins where the export did."""
    return path in ("", _ROOT) or path.startswith(f"{_ROOT}.")


def without_root(name: str) -> str:
    return "" if name == _ROOT else name.removeprefix(f"{_ROOT}.")


def placeholder_name(kind: Literal["p", "b"], name: str) -> str:
    """What an export calls the input that stands for the parameter ("p") or buffer ("b") `name` of the model, in lower case."""
    return f"{kind}_{_ROOT}_{re.sub('[^a-zA-Z0-9]', '_', name)}".lower()


def export_model(model: nn.Module, arguments: Arguments, training: bool) -> ExportedProgram:
    with preserved(model), _plain_sync_norms(model), _plain_outputs(model), torch.compiler.set_stance("force_eager"), _quiet():
        if model.training is not training:
            model.train(training)
        root = _Root(model)
        root.training = training
        for args, kwargs in (arguments, _double_batch(arguments)):
            try:
                return torch.export.export(root, args, kwargs, strict=False)
            except Exception as error:
                needs_two_samples = isinstance(error, ValueError) and "more than 1 value per channel" in str(error)
                if not needs_two_samples or args is not arguments[0] or not _is_batch_of_one(arguments):
                    raise explain(model, error, args, kwargs) from error
    raise AssertionError("unreachable: the second attempt returns or raises")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep off the screen what torch logs and prints when an export fails: `TraceError` says it in one message."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def place_arguments(model: nn.Module, arguments: Arguments) -> Arguments:
    """Arguments on the model's device; on the meta device that costs no memory, and off it only their shapes were known."""
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    if device is None:
        return arguments
    placed: Arguments = tree_map_only(
        Tensor, lambda tensor: torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor.to(device), arguments
    )
    return placed


def _is_batch_of_one(arguments: Any) -> bool:
    return all(tensor.dim() > 0 and tensor.shape[0] == 1 for tensor in tree_leaves(arguments) if isinstance(tensor, Tensor))


def _double_batch(arguments: Any) -> Any:
    """Batch norm over one value needs two samples: the same arguments with the batch repeated."""
    return tree_map_only(Tensor, lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor, arguments)


@contextmanager
def _plain_sync_norms(model: nn.Module) -> Iterator[None]:
    """Let SyncBatchNorm run as plain batch norm: it refuses tensors that are not on a GPU, and a trace needs no processes."""
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    for module in norms:
        module.forward = _BatchNorm.forward.__get__(module)  # type: ignore[method-assign]
        module._check_input_dim = _accept_any  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for module in norms:
            del module.forward, module._check_input_dim


def _accept_any(_: Tensor) -> None:
    return


@contextmanager
def _plain_outputs(model: nn.Module) -> Iterator[None]:
    """Let the model return the tensors of its output alone: export refuses containers it does not know (key-value caches)."""
    if isinstance(model, torch.jit.ScriptModule):  # takes no hooks; export will say that it takes no script either
        yield
        return
    handle = model.register_forward_hook(lambda _module, _args, output: _tensors_in(output) or output)
    try:
        yield
    finally:
        handle.remove()


def _tensors_in(output: Any) -> list[Tensor]:
    """Tensors of nested containers and of dataclass fields."""
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf):
            found += [tensor for tensor in tree_leaves(vars(leaf)) if isinstance(tensor, Tensor)]
    return found
