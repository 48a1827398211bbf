"""Comparisons of a module and data of your own, from functions that build them."""

from __future__ import annotations

__all__ = ["Build", "compare_runs", "train_built"]

import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from rich.console import Console

from pl_normkit import __version__
from pl_normkit.errors import ConfigError, nearest
from pl_normkit.recipes.arms import Arm, name_arms
from pl_normkit.recipes.command_line import silence_lightning
from pl_normkit.recipes.comparison_report import Comparison
from pl_normkit.recipes.paired_runs import RunStore
from pl_normkit.recipes.trial import Probe, Trial, train_arms, train_here

Build = Callable[[Arm, int], tuple[LightningModule, LightningDataModule]]
"""From an arm and a seed to a new module and new data."""

_QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


def compare_runs(
    make_module: Callable[..., LightningModule],
    make_data: Callable[..., LightningDataModule],
    arms: Mapping[str, Arm],
    seeds: int | Sequence[int] = 5,
    *,
    metric: str | Sequence[str],
    trainer: Mapping[str, Any] | None = None,
    probes: Mapping[str, Probe] | None = None,
    split_per_seed: bool = False,
    out: str | Path | None = None,
) -> Comparison:
    """Train your module without and with each of `arms`: runs of one seed share initial weights, batches and random numbers.

    Args:
        make_module: builds a new LightningModule; called with the arm's `module` arguments.
        make_data: builds a new LightningDataModule; called with the arm's `data` arguments, and with `seed` where `split_per_seed`.
        arms: name -> what that arm has of its own. One without anything, "without", is added.
        seeds: how many (0, 1, ...), or which.
        metric: name of a logged metric or a probe, chosen before the runs are seen, that decides; more names are shown beside it. Known
            without `probes`: "variance_ratio", "recalibration_gap", "fusion_scale" and "time_awareness".
        trainer: arguments of the Trainer. Logger, checkpoints, bars and the sanity check are off unless they say otherwise.
        probes: name -> a function of the trained module and the data, such as one of the `measure_...`, for a metric of that name.
        split_per_seed: also draw the data's split anew for each seed, so that the interval speaks of other splits as well.
        out: folder of `runs.csv`, `curves.csv` and `settings.json`; a comparison that was stopped goes on from there.

    Raises ConfigError for arguments that the functions do not take, and where a run does not log `metric`.

    >>> import torch
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> class Line(LightningModule):
    ...     def __init__(self, lr: float = 0.1) -> None:
    ...         super().__init__()
    ...         self.layer, self.lr = torch.nn.Linear(1, 1), lr
    ...     def training_step(self, batch, _):
    ...         return (self.layer(batch[0]) - batch[1]).square().mean()
    ...     def validation_step(self, batch, _):
    ...         self.log("val_loss", (self.layer(batch[0]) - batch[1]).square().mean())
    ...     def configure_optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), self.lr)
    >>> class Points(LightningDataModule):
    ...     def train_dataloader(self):
    ...         x = torch.linspace(-1, 1, 16)[:, None]
    ...         return DataLoader(TensorDataset(x, 3 * x), 4)
    ...     val_dataloader = train_dataloader
    >>> trainer = {"max_epochs": 2, "accelerator": "cpu"}
    >>> found = compare_runs(Line, Points, {"slow": Arm(module={"lr": 0.001})}, 3, metric="val_loss", trainer=trainer)
    >>> [(contrast.arm, contrast.against, contrast.difference.mean > 0) for contrast in found.contrasts]
    [('slow', 'without', True)]
    """
    metrics = [metric] if isinstance(metric, str) else list(metric)
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers or not metrics:
        raise ConfigError("a comparison needs a seed and a metric at least", evidence=f"seeds {numbers}, metric {metrics}")
    named = name_arms(arms)
    more = {"seed": 0} if split_per_seed else {}
    for name, arm in named.items():
        check_arguments(make_module, arm.module, name)
        check_arguments(make_data, {**arm.data, **more}, name)

    def build(arm: Arm, seed: int) -> tuple[LightningModule, LightningDataModule]:
        data = make_data(**arm.data, **({"seed": seed} if split_per_seed else {}))
        L.seed_everything(seed, verbose=False)  # whatever the data has drawn
        return make_module(**arm.module), data

    settings = {
        "module": _name_of(make_module),
        "data": _name_of(make_data),
        "arms": {name: describe_arm(arm) for name, arm in named.items()},
        "metrics": metrics,
        "trainer": _plain(dict(trainer or {})),
        "split per seed": split_per_seed,
        "versions": versions(),
    }
    store = RunStore(Path(out) if out is not None else None, settings)
    train = train_here(train_built(build, trainer or {}), named, metrics, probes)
    train_arms(train, named, numbers, metrics, store, Console(quiet=True))
    return Comparison(store.runs, list(named), numbers, metrics)


def train_built(build: Build, options: Mapping[str, Any]) -> Callable[[Trial], None]:
    """What trains one run of the modules and data of `build`, by a Trainer with `options`."""
    given = {"callbacks": [], **options}
    if unknown := [name for name in options if name not in inspect.signature(L.Trainer.__init__).parameters]:
        fix = nearest(unknown[0], inspect.signature(L.Trainer.__init__).parameters)
        raise ConfigError(f"the Trainer has no option {unknown[0]!r}", fix=fix)

    def train(trial: Trial) -> None:
        L.seed_everything(trial.seed, verbose=False)
        module, data = build(trial.arm, trial.seed)
        for found, kind in ((module, LightningModule), (data, LightningDataModule)):
            if not isinstance(found, kind):
                raise ConfigError(f"what is built is no {kind.__name__}", evidence=type(found).__name__)
        trainer = L.Trainer(**{**_QUIET, "enable_checkpointing": False, **given, "callbacks": list(given["callbacks"] or ())})
        trial.begin(trainer, module, data)
        with warnings.catch_warnings():
            silence_lightning()
            trainer.fit(module, datamodule=data)
        trial.end(trainer, module, data)

    return train


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], arm: str) -> None:
    """Raise ConfigError unless `function` can be called with `arguments`."""
    signature = inspect.signature(function)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        unknown = [name for name in arguments if name not in signature.parameters]
        fix = nearest(unknown[0], signature.parameters) if unknown else ""
        what = f"{_name_of(function)} does not take the arguments of the arm {arm!r}"
        raise ConfigError(what, evidence=str(error), fix=fix or f"it takes {signature}") from error


def describe_arm(arm: Arm) -> dict[str, Any]:
    """The arm in plain words, to tell comparisons apart."""
    callbacks = [_name_of(build) for build in arm.callbacks]
    return {"callbacks": callbacks, "module": _plain(dict(arm.module)), "data": _plain(dict(arm.data)), "options": list(arm.options)}


def versions() -> dict[str, str]:
    """Of the libraries that decide a run."""
    return {"pl_normkit": __version__, "torch": torch.__version__, "lightning": L.__version__}


def _name_of(function: Any) -> str:
    text = getattr(getattr(function, "__self__", None), "text", None)  # of a callback in words
    return str(text or getattr(function, "__qualname__", "") or _plain(function))


def _plain(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
