"""`tune_norms_only`: train the norms and freeze all else."""

from __future__ import annotations

__all__ = ["tune_norms_only"]

from collections.abc import Sequence
from typing import Any

from torch import nn

from pl_normkit.errors import NothingMatchedError
from pl_normkit.methods.norm_training.find import NormParameters, find_norm_parameters, parameters_under
from pl_normkit.surgery import Changes, Filter, apply_edits
from pl_normkit.values import SetTrainable
from pl_normkit.wrappers import unwrapped


def tune_norms_only(model: nn.Module, example_inputs: Any = None, *, where: Filter | None = None, also: Sequence[str] = ()) -> Changes:
    """Let the optimizer reach the scales and shifts of norms alone: everything else gets `requires_grad=False`.

    The function stays. Call it before the optimizer is built; `fold_norms` takes what was learned into the next linear layers.

    Running statistics of batch norms are no parameters and still move in training mode. Give the parameters no weight decay:
    `param_groups` and `GammaDecay` do so by default.

    Args:
        model: any module.
        example_inputs: with it, norms that are written out in a forward pass or in modules of unknown type are found in the traced graph;
            without it by module type, RMS norms of transformers by running them.
        where: called with (norm module, path), says whether to train it; norms that only the graph shows go by the module that holds
            the parameter.
        also: paths of modules or parameters that are trained too, such as a new head.

    Returns:
        what was done; `undo()` gives every parameter its `requires_grad` back. `skipped` names modules that may be norms and are not
        known as such.

    Raises:
        NothingMatchedError: when no norm with parameters is found or `where` takes none.
        ConfigError: when a path of `also` does not exist or holds no parameter.
        TraceError: when the model cannot be traced with `example_inputs`.

    Source: "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", arXiv 2312.11420, abstract; what is trained as
    in the documentation of PEFT's `LNTuningConfig`. That norms are chosen by role is derived here.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    >>> print(tune_norms_only(model, also=["2"]))
    (the model): trains 2 parameters of norms (8 numbers), 2 others; freezes 2
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['1.weight', '1.bias', '2.weight', '2.bias']
    """
    model = unwrapped(model)
    found = find_norm_parameters(model, example_inputs)
    chosen = _chosen(model, found, where)
    if not chosen:
        evidence = "; ".join(map(str, found.unread)) or ("where took none of them" if found.all else "")
        raise NothingMatchedError("no norm with parameters to train", evidence=evidence)
    others = parameters_under(model, also, "also") - chosen
    trainable = {name: name in chosen or name in others for name, _ in model.named_parameters()}
    numbers = sum(parameter.numel() for name, parameter in found.all.items() if name in chosen)
    what = f"trains {len(chosen)} parameters of norms ({numbers} numbers)" + (f", {len(others)} others" if others else "")
    what += f"; freezes {len(trainable) - len(chosen) - len(others)}"
    return apply_edits(model, [SetTrainable("", trainable, what)], found.unread)


def _chosen(model: nn.Module, found: NormParameters, where: Filter | None) -> set[str]:
    if where is None:
        return set(found.all)
    paths = {name: name.rpartition(".")[0] for name in found.all}
    return {name for name, path in paths.items() if where(model.get_submodule(path), path)}
