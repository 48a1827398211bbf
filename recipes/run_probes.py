"""Measurements of a trained module that a comparison can take as metrics, by the names that `--metric` knows."""

from __future__ import annotations

__all__ = ["PROBES", "measure_by_name"]

import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import lightning as L
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn

from pl_normkit.callbacks._first_batch import as_transferred
from pl_normkit.callbacks._network_calls import NetworkCall, rehearse
from pl_normkit.errors import ConfigError, NormkitError
from pl_normkit.methods.dropout_placement import measure_variance_shift
from pl_normkit.methods.fusion_scale import measure_fusion_scales
from pl_normkit.methods.norm_operators import recalibrate_batch_norm
from pl_normkit.methods.timestep_embedding import measure_time_awareness
from pl_normkit.preserve import preserved
from pl_normkit.recipes.command_line import silence_lightning

PROBES = {
    "variance_ratio": "largest factor, up or down, by which dropout shifts the variance that a norm sees",
    "recalibration_gap": "by how much the first other metric (or val_loss) falls when batch norms get statistics taken without dropout",
    "fusion_scale": "largest ratio of the standard deviations that meet in a fusion",
    "time_awareness": "how much the output of a diffusion network changes with the time: mean square over its variance",
}
"""Name -> what it says, for `compare --help`."""

_BATCHES_FOR_STATISTICS = 20


def measure_by_name(name: str, module: L.LightningModule, data: L.LightningDataModule, metrics: Sequence[str]) -> float:
    """One of PROBES, on training batches, for a module that its Trainer has just trained; all is as before afterwards.

    Args:
        name: of the probe.
        module: what was trained.
        data: what it was trained on.
        metrics: all that the comparison looks at; the gap is one of the first that is no probe.

    Raises ConfigError where the networks have nothing to measure.
    """
    with warnings.catch_warnings():
        silence_lightning()
        if name == "recalibration_gap":
            return _recalibration_gap(module, data, next((metric for metric in metrics if metric not in PROBES), "val_loss"))
        return _of_networks(name, module, data)


def _of_networks(name: str, module: L.LightningModule, data: L.LightningDataModule) -> float:
    """The largest value in the networks that a step calls."""
    measure = {"variance_ratio": _variance_ratio, "fusion_scale": _fusion_scale, "time_awareness": _time_awareness}[name]
    batch = next(_batches(module, data), None)
    calls = [] if batch is None else rehearse(module.trainer, module, batch)
    reasons, values = [], []
    for call in calls:
        try:
            values += measure(call)
        except NormkitError as error:
            reasons.append(error.what)
    if not values:
        raise _nothing(name, "; ".join(dict.fromkeys(reasons)) or "no network has what it measures")
    return max(values)


def _nothing(name: str, evidence: str) -> ConfigError:
    return ConfigError(f"{name} cannot be measured in this module", where="--metric", evidence=evidence, fix="take another metric")


def _batches(module: L.LightningModule, data: L.LightningDataModule) -> Iterator[Any]:
    """Of the training data, as the step gets them."""
    for batch, *_ in iter(CombinedLoader(data.train_dataloader(), "max_size_cycle")):
        yield as_transferred(module, batch)


def _variance_ratio(call: NetworkCall) -> list[float]:
    return [max(shift, 1 / shift) for shift in measure_variance_shift(call.network, call.inputs).values() if shift > 0]


def _fusion_scale(call: NetworkCall) -> list[float]:
    fusions = measure_fusion_scales(call.network, [call.inputs], example_inputs=call.inputs, inputs=lambda inputs: inputs)
    return [fusion.ratio for fusion in fusions]


def _time_awareness(call: NetworkCall) -> list[float]:
    return [measure_time_awareness(call.network, call.inputs).circular]


def _recalibration_gap(module: L.LightningModule, data: L.LightningDataModule, metric: str) -> float:
    inputs = _inputs_by_network(module, data)
    before = _validate(module, data).get(metric)
    changes = []
    try:
        for network, batches in inputs.items():
            if any(isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats for part in network.modules()):
                changes.append(recalibrate_batch_norm(network, batches, inputs=lambda inputs: inputs))
        if not changes:
            raise _nothing("recalibration_gap", "no batch norm keeps statistics")
        after = _validate(module, data).get(metric)
    finally:
        for change in changes:
            change.undo()
    if before is None or after is None:
        raise _nothing("recalibration_gap", f"the module logs no {metric}")
    return before - after


def _inputs_by_network(module: L.LightningModule, data: L.LightningDataModule) -> dict[nn.Module, list[Any]]:
    found: dict[nn.Module, list[Any]] = {}
    for batch in islice(_batches(module, data), _BATCHES_FOR_STATISTICS):
        for call in rehearse(module.trainer, module, batch):
            found.setdefault(call.network, []).append(call.inputs)
    return found


def _validate(module: L.LightningModule, data: L.LightningDataModule) -> Mapping[str, float]:
    """By a Trainer without the run's callbacks, which need not take part; the module goes back to its own."""
    own = module.trainer
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(devices=1, precision=own.precision, limit_val_batches=own.limit_val_batches, **quiet)  # type: ignore[arg-type]
    try:
        with preserved(module):
            trainer.validate(module, datamodule=data, verbose=False)
    finally:
        module.trainer = own
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
