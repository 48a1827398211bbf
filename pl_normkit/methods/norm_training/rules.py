"""NK951: parameters of norms that were chosen by their names."""

from __future__ import annotations

__all__: list[str] = []

import re
from collections.abc import Iterator
from typing import Any

from pl_normkit.findings import Evidence, Place
from pl_normkit.methods.norm_training.find import find_norm_parameters
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

_NAMED = re.compile(r"norm|bn", re.IGNORECASE)
"""What selectors by name look for."""


@rule(
    "NK951",
    "norms-chosen-by-name",
    mark=Mark.DERIVED,
    source="derived here: tests/methods/norm_training/test_rules.py",
    needs=(Needs.MODEL, Needs.OPTIMIZERS),
    preview=True,
)
def norms_chosen_by_name(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds optimizers that treat parameters of norms in two ways, and those whose name says "norm" or "bn" all in the one, the others in
    the other.

    Why it hurts
    A selector by name misses norms that are called otherwise: the shortcut of torchvision's ResNet (`downsample.1`), GPT-2's `ln_f`, a
    norm in an nn.Sequential. They are decayed, or not trained, where their like are not.

    Evidence
    How many parameters of norms the selector missed.

    Example
    ```python
    import torch
    import torchvision

    model = torchvision.models.resnet18(num_classes=2)
    norms = [parameter for name, parameter in model.named_parameters() if "bn" in name]
    others = [parameter for name, parameter in model.named_parameters() if "bn" not in name]
    groups = [{"params": others, "weight_decay": 1e-4}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, 0.1)
    ```

    Use instead
    ```python
    from pl_normkit import param_groups

    optimizer = torch.optim.SGD(param_groups(model, weight_decay=1e-4, example_inputs=torch.randn(2, 3, 32, 32)), 0.1)
    ```

    Fix and its safety
    None: choose by module type or by role, `param_groups` or `tune_norms_only`.

    Source
    Derived: the public code of arXiv 2306.04226 chooses norms by such names.
    """
    assert subject.model is not None
    found = find_norm_parameters(subject.model)
    for kind in (found.scales, found.shifts):
        named = {name: _way(subject, parameter) for name, parameter in kind.items() if _NAMED.search(name)}
        missed = {name: _way(subject, parameter) for name, parameter in kind.items() if not _NAMED.search(name)}
        if named and missed and len(set(named.values())) == len(set(missed.values())) == 1 and {*named.values()} != {*missed.values()}:
            yield Observation(
                message="Parameters of norms are treated as their names say, so that some are missed",
                places=[Place(name) for name in missed],
                evidence=[Evidence("parameters of norms missed", len(missed), "0", is_measured=False)],
                advice="Choose norms by module type: pl_normkit.param_groups, or tune_norms_only",
            )
            return


def _way(subject: Subject, parameter: Any) -> tuple[Any, ...]:
    """How the optimizers treat a parameter: learning rate and weight decay of its group, and whether it is trained."""
    for optimizer in subject.optimizers:
        for group in optimizer.param_groups:
            if any(held is parameter for held in group["params"]):
                return group.get("lr"), group.get("weight_decay"), parameter.requires_grad
    return ("in no group", parameter.requires_grad)
