"""What norms get in one run of a model."""

from __future__ import annotations

__all__ = ["inputs_of"]

import torch
from torch import Tensor, nn

from pl_normkit.graph import call_arguments
from pl_normkit.preserve import preserved
from pl_normkit.rules import Subject


def inputs_of(subject: Subject, kinds: tuple[type[nn.Module], ...]) -> dict[str, tuple[nn.Module, Tensor]]:
    """What each module of `kinds` got last, by path, in one run of the model as it is."""
    assert subject.model is not None
    arguments, keywords = call_arguments(subject.example_inputs)
    seen: dict[str, tuple[nn.Module, Tensor]] = {}
    handles = []
    for path, module in subject.model.named_modules():
        if isinstance(module, kinds):

            def record(module: nn.Module, given: tuple[Tensor, ...], path: str = path) -> None:
                if given:
                    seen[path] = module, given[0].detach()

            handles.append(module.register_forward_pre_hook(record))
    try:
        with preserved(subject.model, buffers=True), torch.no_grad():
            subject.model(*arguments, **keywords)
    finally:
        for handle in handles:
            handle.remove()
    return seen
