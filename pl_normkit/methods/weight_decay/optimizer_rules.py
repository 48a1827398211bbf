"""NK204 and NK205: what an optimizer tells without the graph of its model."""

from __future__ import annotations

__all__ = ["coupled_decay_in_adam", "parameter_not_in_one_optimizer"]

from collections import Counter
from collections.abc import Iterator

import torch
from torch.optim import Optimizer

from pl_normkit.findings import Evidence, Place
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule


def _held_by(optimizer: Optimizer) -> Counter[int]:
    """How often the groups list each parameter, by `id`."""
    return Counter(id(parameter) for group in optimizer.param_groups for parameter in group["params"])


@rule(
    "NK204",
    "parameter-not-in-one-optimizer",
    mark=Mark.DERIVED,
    source="how torch.optim works; tests/methods/weight_decay/test_rules.py",
    needs=(Needs.MODEL, Needs.OPTIMIZERS),
)
def parameter_not_in_one_optimizer(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds trainable parameters that no optimizer holds, that two optimizers hold, and that one group lists twice.

    Why it hurts
    The first never learn although they get gradients; the others are stepped, and decayed, twice. Torch refuses a parameter in two
    groups of one optimizer, but only warns of one that a group lists twice.

    Evidence
    Their share of all trainable elements.

    Example
    An optimizer of the encoder alone, in a run that means to train the decoder too:

    ```python
    import torch
    from torch import nn

    model = nn.ModuleDict({"encoder": nn.Linear(8, 4), "decoder": nn.Linear(4, 8)})
    optimizer = torch.optim.SGD(model["encoder"].parameters(), lr=0.1)
    ```

    Use instead
    Give every trainable parameter to one optimizer once, and freeze what should stay as it is:

    ```python
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ```

    Fix and its safety
    Advice only.

    Source
    Derived here from how torch.optim works; checked by tests/methods/weight_decay/test_rules.py.
    """
    if subject.model is None:
        return
    held = [_held_by(optimizer) for optimizer in subject.optimizers]
    trainable = {name: parameter for name, parameter in subject.model.named_parameters() if parameter.requires_grad}
    total = sum(parameter.numel() for parameter in trainable.values())
    holders = {name: [counts[id(parameter)] for counts in held if counts[id(parameter)]] for name, parameter in trainable.items()}
    cases = (
        ("no optimizer", [n for n, counts in holders.items() if not counts], "never learn", "Add them to an optimizer, or freeze them"),
        ("two optimizers", [n for n, counts in holders.items() if len(counts) > 1], "are stepped twice", "Keep each in one optimizer"),
        ("one group twice", [n for n, counts in holders.items() if max(counts, default=0) > 1], "are stepped twice", "List each once"),
    )
    for where, names, harm, advice in cases:
        if names:
            share = sum(trainable[name].numel() for name in names) / total
            yield Observation(
                f"trainable parameters in {where} {harm}",
                [Place(name) for name in names],
                advice,
                (Evidence("share of all trainable elements", share, "0", is_measured=False),),
                cause=where,
            )


_COUPLED = (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)
_MEANT_DECOUPLED = 1e-3


def _coupled_decays(optimizer: Optimizer) -> list[float]:
    """Decays that the optimizer adds to the gradient before its second moment, where they are large enough to be meant decoupled."""
    if not isinstance(optimizer, _COUPLED) or isinstance(optimizer, torch.optim.AdamW):
        return []
    groups = [group for group in optimizer.param_groups if not group.get("decoupled_weight_decay", False)]
    return [decay for group in groups if (decay := float(group.get("weight_decay", 0.0))) >= _MEANT_DECOUPLED]


@rule(
    "NK205",
    "coupled-decay-in-adam",
    mark=Mark.PUBLISHED,
    source="arXiv 1711.05101 (Decoupled Weight Decay Regularization): L2 and weight decay differ for adaptive methods",
    needs=(Needs.OPTIMIZERS,),
)
def coupled_decay_in_adam(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds Adam, NAdam, RAdam or Adamax with an L2 term as large as people give to decoupled weight decay (1e-3 and more).

    Why it hurts
    These optimizers add the term to the gradient and then divide by the root of its second moment, so parameters with large gradients
    are decayed less, and a value chosen for AdamW does something else.

    Evidence
    The largest weight decay of the optimizer's groups.

    Example
    ```python
    import torch
    from torch import nn

    model = nn.Linear(8, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.05)
    ```

    Use instead
    AdamW, or `decoupled_weight_decay=True` for NAdam and RAdam:

    ```python
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    ```

    Fix and its safety
    Advice only: it changes what is trained.

    Source
    Published: arXiv 1711.05101 states that L2 and weight decay are not the same for adaptive methods. The threshold 1e-3 is derived
    here from the values in use: L2 terms for Adam run from 1e-6 to 5e-4, decoupled decays from 1e-2 to 0.3.
    """
    for index, optimizer in enumerate(subject.optimizers):
        decays = _coupled_decays(optimizer)
        if decays:
            kind = type(optimizer).__name__
            fix = "torch.optim.AdamW" if kind == "Adam" else f"{kind}(..., decoupled_weight_decay=True) or torch.optim.AdamW"
            yield Observation(
                f"{kind} adds its weight decay to the gradient and then rescales it (L2, not decoupled decay)",
                [Place("")],
                f"Use {fix}, or an L2 term below {_MEANT_DECOUPLED:g} if L2 is meant",
                (Evidence("largest weight decay", max(decays), f"below {_MEANT_DECOUPLED:g} for L2", is_measured=False),),
                cause=f"optimizer {index}",
            )
