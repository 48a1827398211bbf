"""Running a model over a loader to measure it: batches become inputs, everything the passes touch is restored."""

from __future__ import annotations

__all__ = ["InputsOf", "Progress", "first_inputs", "inputs_of", "measuring", "run_batches"]

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from pl_normkit.errors import DataError, NormkitWarning
from pl_normkit.graph import call_arguments
from pl_normkit.methods.fusion_scale.moments import agree_on_problem
from pl_normkit.preserve import preserved

InputsOf = Callable[[Any], Any]
"""From a batch to the model's inputs: a tensor, a tuple of positional or a dict of keyword arguments."""
Progress = Callable[[int, int], None]
"""Called after each batch with the number of batches done in this pass, and with the number of the pass."""

_PASS_INPUTS = "pass inputs=lambda batch: ..., which returns what the model is called with"


def inputs_of(model: nn.Module, batch: Any) -> Any:
    """What `model` is called with: a tensor itself, the first item of a sequence, of a dict the entries that forward names or
    else its only image-like tensor. Raises DataError when that does not decide it."""
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, Mapping):
        named = {key: value for key, value in batch.items() if key in inspect.signature(model.forward).parameters}
        if named:
            return named
        images = [value for value in batch.values() if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 3]
        if len(images) == 1:
            return (images[0],)
        raise DataError("it is unclear which entry of the batch is the input", evidence=f"keys {list(batch)}", fix=_PASS_INPUTS)
    if isinstance(batch, (tuple, list)) and batch:
        return inputs_of(model, batch[0])
    raise DataError("a batch that is no tensor, sequence or dict of tensors", evidence=type(batch).__name__, fix=_PASS_INPUTS)


def first_inputs(model: nn.Module, loader: Iterable[Any], inputs: InputsOf | None) -> tuple[Any, Iterable[Any]]:
    """Inputs from the first batch, and a loader that still gives that batch, also where it can be read only once.

    No RNG moves. Raises DataError when there is no batch.
    """
    with preserved(model):
        iterator = iter(loader)
        for first in iterator:
            rest = itertools.chain([first], iterator) if iterator is loader else loader
            return (inputs(first) if inputs is not None else inputs_of(model, first)), rest
    raise DataError("the loader gives no batch", fix="check its length, sampler and drop_last")


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with batch norms on batch statistics, as at the start of training: dropout off, no gradients, no autocast, no
    compiler. Running statistics, modes and RNG are as before afterwards.

    A batch norm that was put into evaluation inside a model in training mode stays so: that is how it will train.
    """
    modules = list(model.modules())
    norms = [module for module in modules if isinstance(module, _BatchNorm) and (module.training or not model.training)]
    devices = {tensor.device.type for tensor in itertools.chain(model.parameters(), model.buffers())}
    with ExitStack() as stack:
        stack.enter_context(preserved(model, buffers=True))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for device in devices | {"cpu"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        model.eval()
        for norm in norms:
            norm.train()
        yield


def run_batches(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    max_batches: int | None,
    inputs: InputsOf | None,
    has_bad_value: Callable[[], str],
    after_batch: Callable[[int], None] = lambda _: None,
) -> int:
    """Call `model` on each batch; returns how many.

    `has_bad_value` says after each pass what was not finite, "" for nothing. Raises DataError, on every rank, for an empty loader
    and for values that are not finite. Warns of a loader whose images are all constant.
    """
    problem: DataError | None = None
    count = 0
    content = _Content()
    for count, batch in enumerate(itertools.islice(loader, max_batches), start=1):
        problem = _run(model, batch, count - 1, inputs, has_bad_value, content)
        if problem is not None:
            break
        after_batch(count)
    if count == 0:
        problem = DataError("the loader gives no batch", fix="check its length, sampler and drop_last, and max_batches")
    agree_on_problem(problem)
    content.warn_without()
    return count


class _Content:
    """Whether any image of the loader varies over its positions."""

    def __init__(self) -> None:
        self._saw_images = False
        self._is_found = False

    def look_at(self, tensor: Tensor) -> None:
        if not self._is_found and tensor.dim() > 2 and tensor[0, 0].numel() > 1:
            self._saw_images = True
            positions = tensor.flatten(2)
            self._is_found = bool((positions != positions[..., :1]).any())

    def warn_without(self) -> None:
        if self._saw_images and not self._is_found:
            warnings.warn(
                "every image of the loader is constant, so scales were measured on borders and rounding errors; check what the loader "
                "gives (a mask in place of the image, a transform that ends in zeros?)",
                NormkitWarning,
                stacklevel=3,
            )


def _run(
    model: nn.Module, batch: Any, index: int, inputs: InputsOf | None, has_bad_value: Callable[[], str], content: _Content
) -> DataError | None:
    device = next((tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())), torch.device("cpu"))
    try:
        args, kwargs = call_arguments(inputs(batch) if inputs is not None else inputs_of(model, batch))
    except DataError as error:
        return error
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(device), (args, kwargs))
    for tensor in tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            return DataError(
                "the loader gives values that are not finite, and statistics over them would be wrong",
                where=f"batch {index}",
                evidence=f"{bad} of {tensor.numel()} values are NaN or infinite",
                fix="fix or leave out these samples; batches are never dropped silently here",
            )
        if isinstance(tensor, Tensor):
            content.look_at(tensor)
    try:
        model(*args, **kwargs)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        return DataError(
            "a batch norm sees one value per channel, in measuring as in training",
            where=f"batch {index}",
            evidence=str(error),
            fix="use batches of two samples or more (drop_last=True where the last one is single)",
        )
    bad_place = has_bad_value()
    if not bad_place:
        return None
    return DataError(
        "features are not finite, or too large to measure, though the inputs are finite",
        where=f"batch {index}, {bad_place}",
        fix="audit the model's numerics, or normalize the inputs",
    )
