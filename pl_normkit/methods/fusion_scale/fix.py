"""`equalize_scales`: every branch of every fusion to zero mean and unit standard deviation."""

from __future__ import annotations

__all__ = [
    "Mode",
    "check_options",
    "equalize_scales",
    "has_statistics",
    "insert_at",
    "insert_equalizers",
    "is_equalized",
    "plan_sites",
    "split_trained",
]

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import nn

from pl_normkit.errors import ConfigError, EditError, NothingMatchedError
from pl_normkit.graph import ModelGraph
from pl_normkit.methods.fusion_scale.absorbing_layers import resolve_path
from pl_normkit.methods.fusion_scale.calibrate import Granularity, calibrate_scales
from pl_normkit.methods.fusion_scale.find import Site, find_sites, trained_norm
from pl_normkit.methods.fusion_scale.fold import BORDERS, Border, fold, is_folded
from pl_normkit.methods.fusion_scale.modules import NAME, ScaleEqualizer
from pl_normkit.methods.fusion_scale.running import InputsOf, Progress, first_inputs
from pl_normkit.surgery import Change, Changes, Insert, apply_edits, get_module
from pl_normkit.wrappers import unwrapped

Mode = Literal["explicit", "init"]


def equalize_scales(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    mode: Mode = "explicit",
    granularity: Granularity = "branch",
    max_batches: int | None = None,
    example_inputs: Any = None,
    inputs: InputsOf | None = None,
    sums: bool = False,
    border: Border = "keep",
    allow_trained: bool = False,
    progress: Progress | None = None,
) -> Changes:
    """Bring every branch of every multi-level fusion to zero mean and unit standard deviation with fixed statistics of the data.

    Call it before training, after pretrained encoder weights are loaded. `"explicit"` puts a `ScaleEqualizer` with frozen buffers where
    the fusion's convolution reads the branches; `"init"` folds the same statistics into that convolution's weights and leaves nothing
    behind, except where `fold` cannot be exact: there the module form is used, and `changes.skipped` says why. Both compute the
    same function at first and train differently: with `"init"` the gradient of a branch's weights keeps the factor sigma.

    Args:
        model: edited in place; no key is renamed, `"explicit"` adds buffers under `<layer>.scale_equalizer`.
        loader: the training loader, any iterable of batches.
        mode: see above.
        granularity: one mean and std per branch, or per channel (our extension).
        max_batches: batches of each pass over the loader; None for all. Nested fusions take one pass for each level.
        example_inputs: inputs for the trace; None takes the first batch.
        inputs: from a batch to the model's inputs; see `calibrate_scales`.
        sums: also equalize the operands of sums, which have no fusion weights, where each comes from a module of its own.
        border: see `fold`; only for `"init"`.
        allow_trained: equalize a network whose batch norms behind the fusions have been trained; its function then changes.
        progress: called after each batch.

    Returns:
        what was inserted, calibrated and folded, in `skipped` what was left alone and why. Empty where it was done before.

    Raises:
        NothingMatchedError: when the model has no fusion of levels that can be equalized.
        EditError: when all of them are trained already.
        TraceError: when the model cannot be traced.
        DataError: for a loader that is empty or gives values that are not finite. The model is as it was in each case.

    Source: arXiv 2402.01149, abstract and public review, for the equalizer and its use as an initialization; where it
    stands in a given network, both forms and their difference in training are derived here.

    >>> import segmentation_models_pytorch as smp
    >>> import torch
    >>> model = smp.FPN("resnet18", encoder_weights=None, decoder_merge_policy="cat")
    >>> changes = equalize_scales(model, [torch.rand(2, 3, 64, 64)])
    >>> len(changes.made) > 0
    True
    """
    check_options(mode, granularity, border)
    model = unwrapped(model)
    if example_inputs is None:
        example_inputs, loader = first_inputs(model, loader, inputs)
    sites, skipped = plan_sites(model, example_inputs, sums=sums)
    if not allow_trained:
        sites, trained = split_trained(model, sites)
        skipped += trained
    hosts = [site.host for site in sites if not has_statistics(model, site)]
    changes = insert_at(model, sites, skipped)
    if not hosts:
        return changes
    try:
        options: dict[str, Any] = {"granularity": granularity, "max_batches": max_batches, "inputs": inputs, "progress": progress}
        changes.add(calibrate_scales(model, loader, hosts=hosts, **options))
        if mode == "init":
            changes.add(fold(model, border=border))
    except BaseException:
        changes.undo()
        raise
    return changes


def check_options(mode: str, granularity: str, border: str) -> None:
    for name, value, known in (
        ("mode", mode, ("explicit", "init")),
        ("granularity", granularity, ("branch", "channel")),
        ("border", border, BORDERS),
    ):
        if value not in known:
            raise ConfigError(f"unknown {name} {value!r}", fix=f"one of {', '.join(known)}")


def insert_equalizers(model: nn.Module, example_inputs: Any, *, sums: bool = False, allow_trained: bool = False) -> Changes:
    """Put an equalizer that is still the identity at every place `equalize_scales` would: the structure alone, no data needed.

    Use it to load a checkpoint that holds equalizers into a model that was just built.

    Args:
        model: edited in place.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        sums: also the operands of sums.
        allow_trained: also where batch norms behind the fusion have been trained.

    Raises:
        NothingMatchedError, EditError, TraceError: as `equalize_scales`.

    >>> import segmentation_models_pytorch as smp
    >>> import torch
    >>> model = smp.FPN("resnet18", encoder_weights=None, decoder_merge_policy="cat")
    >>> len(insert_equalizers(model, torch.rand(2, 3, 64, 64)).made) > 0
    True
    """
    model = unwrapped(model)
    sites, skipped = plan_sites(model, example_inputs, sums=sums)
    if not allow_trained:
        sites, trained = split_trained(model, sites)
        skipped += trained
    return insert_at(model, sites, skipped)


def plan_sites(model: nn.Module, example_inputs: Any, *, sums: bool) -> tuple[list[Site], list[Change]]:
    """`find_sites` on a fresh trace. Raises NothingMatchedError when there is none, TraceError when the model cannot be traced."""
    graph = ModelGraph.from_model(model, example_inputs)
    sites, skipped = find_sites(model, graph, sums=sums)
    if not sites:
        raise NothingMatchedError(
            "no fusion of levels to equalize",
            evidence="; ".join(map(str, skipped)) or f"{len(graph.fusions)} fusions, none with a resized branch",
            fix="" if sums else "sums=True also takes sums whose operands come from modules of their own",
        )
    return sites, skipped


def insert_at(model: nn.Module, sites: Sequence[Site], skipped: Sequence[Change] = ()) -> Changes:
    """Insert identity equalizers where none is yet and none was folded."""
    edits = []
    for site in sites:
        if not is_equalized(model, site):
            equalizer = ScaleEqualizer(site.widths, folds_into=site.folds_into, obstacle=site.obstacle, level=site.level)
            edits.append(Insert(site.host, NAME, _like(equalizer, model), site.what, where=site.where))
    return apply_edits(model, edits, skipped)


def split_trained(model: nn.Module, sites: Sequence[Site]) -> tuple[list[Site], list[Change]]:
    """Sites that are not trained yet; the others with the reason. Raises EditError when none is left.

    What has its statistics already counts as untrained: nothing will be done there.
    """
    norms = [(site, "" if has_statistics(model, site) else trained_norm(model, site)) for site in sites]
    trained = [Change(site.host, f"left alone: {norm} behind it has been trained") for site, norm in norms if norm]
    if len(trained) == len(sites):
        raise EditError(
            "the network is trained already, and equalizing would change its function",
            where=norms[0][0].host,
            evidence=f"{norms[0][1]} behind the fusion has seen batches",
            fix="equalize before training; allow_trained=True does it anyway",
        )
    return [site for site, norm in norms if not norm], trained


def is_equalized(model: nn.Module, site: Site) -> bool:
    """Whether an equalizer stands here, calibrated or not, or was folded into the layer's weight before."""
    return NAME in get_module(model, site.host)._modules or _was_folded(model, site)


def has_statistics(model: nn.Module, site: Site) -> bool:
    """Whether a calibrated equalizer stands here, or was folded into the layer's weight before."""
    standing = get_module(model, site.host)._modules.get(NAME)
    return _was_folded(model, site) or (isinstance(standing, ScaleEqualizer) and standing.is_calibrated)


def _was_folded(model: nn.Module, site: Site) -> bool:
    return bool(site.folds_into) and is_folded(get_module(model, resolve_path(site.host, site.folds_into[0])))


def _like(equalizer: ScaleEqualizer, model: nn.Module) -> ScaleEqualizer:
    device = next((tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())), None)
    return equalizer.to(device) if device is not None else equalizer
