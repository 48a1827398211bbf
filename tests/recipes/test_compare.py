import csv
import json
import math
import random
import re
import signal
import sys
import types
from pathlib import Path
from typing import ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image
from scipy import stats
from torch.utils.data import DataLoader, Dataset

from pl_normkit.callbacks import GammaDecay, StochasticPooling
from pl_normkit.cli import main
from pl_normkit.errors import ConfigError
from pl_normkit.recipes.callback_words import parse_callbacks
from pl_normkit.recipes.own_randomness import isolate_train_data
from pl_normkit.recipes.paired_difference import paired_difference, t_quantile
from pl_normkit.recipes.paired_runs import PairedRun, RunStore

TINY = [
    "--model.architecture=Unet",
    "--model.encoder_name=tu-test_resnet",
    "--trainer.max_steps=2",
    "--data.train_count=32",
    "--data.val_count=2",
    "--data.crop_size=32",
]


class Probe(pl.Callback):
    """Spends random numbers and training batches at setup, and keeps what the fit then saw."""

    batch_sums: ClassVar[list[float]] = []
    first_loss: ClassVar[list[float]] = []

    interrupt: ClassVar[BaseException | None] = None

    def __init__(self, lr: float | None = None, spend: bool = False) -> None:
        torch.rand(3)
        self.lr = lr
        self.spend = spend

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.spend:
            torch.rand(7)
            next(iter(trainer.datamodule.train_dataloader()))

    def on_train_start(self, trainer, pl_module):
        if self.lr is not None:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = group["initial_lr"] = self.lr
            trainer.lr_scheduler_configs[0].scheduler.base_lrs = [self.lr]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2 and Probe.interrupt is not None:
            raise Probe.interrupt
        Probe.batch_sums.append(batch[0].sum().item())
        if trainer.global_step == 1:
            Probe.first_loss.append(outputs["loss"].item())


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Import path of `Probe`; runs write into an empty working directory."""
    module = types.ModuleType("probe_callbacks")
    module.Probe = Probe
    monkeypatch.setitem(sys.modules, "probe_callbacks", module)
    monkeypatch.chdir(tmp_path)
    Probe.batch_sums, Probe.first_loss = [], []
    monkeypatch.setattr(Probe, "interrupt", None)
    return "probe_callbacks.Probe"


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_comparison_trains_pairs_and_shows_their_difference(probes, tmp_path, capsys):
    command = ["compare", "segmentation", "--with", f"{probes}(lr=0.0)", "--seeds", "2", "--out", "out", *TINY]
    assert main(command) == 0
    shown = capsys.readouterr().out

    rows = _rows(tmp_path / "out" / "runs.csv")
    assert [(row["seed"], row["arm"]) for row in rows] == [("0", "Probe"), ("0", "without"), ("1", "without"), ("1", "Probe")]
    value = {(row["seed"], row["arm"]): float(row["val_miou"]) for row in rows}
    expected = paired_difference(*([value[seed, arm] for seed in "01"] for arm in ("without", "Probe")))
    assert f"difference: val_miou {expected.mean:+.4f} with Probe, 95 % interval {expected.low:+.4f} to {expected.high:+.4f}" in shown
    assert "(paired t, 2 pairs)" in shown
    assert re.search(r"wall time: +\d+\.\d s without, \d+\.\d s Probe", shown)
    assert len({row["weights"] for row in rows}) == 2
    curves = _rows(tmp_path / "out" / "curves.csv")
    assert {(row["step"], float(row["val_miou"])) for row in curves} == {("2", found) for found in value.values()}
    with Image.open(tmp_path / "out" / "comparison.png") as picture:
        assert picture.width > 600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

    # Once more: all runs are there. With more seeds only the new ones are trained. With other options it is another comparison.
    trained = len(Probe.first_loss)
    assert main([*command, "--seeds", "2"]) == 0
    assert "4 of 4 runs were found" in capsys.readouterr().out
    assert len(Probe.first_loss) == trained
    assert main([*command, "--model.lr=0.1"]) == 2
    assert "another comparison" in capsys.readouterr().err


def test_a_pair_shares_weights_data_and_randomness_whatever_the_callback_draws(probes, tmp_path):
    """The callback stands in both arms; in one it also spends random numbers and a training batch first."""
    command = ["compare", "segmentation", "--with", f"{probes}(spend=True)", "--seeds", "1", "--out", "out", *TINY]
    assert main([*command, f"--trainer.callbacks+={probes}", "--trainer.max_steps=3", "--data.batch_size=16"]) == 0

    sums = Probe.batch_sums
    assert len(sums) == 9  # three steps, watched once without and twice with
    twice, without = sums[:6], sums[6:]
    assert twice[::2] == twice[1::2] == without
    assert len(set(without)) == 3
    value = {row["arm"]: (row["val_miou"], row["trained"]) for row in _rows(tmp_path / "out" / "runs.csv")}
    assert value["Probe"] == value["without"]


@pytest.mark.parametrize(("interrupt", "code"), [(KeyboardInterrupt(), 1), (SIGTERMException(), 143)])
def test_an_interrupted_comparison_says_so_and_keeps_whole_runs_alone(probes, tmp_path, monkeypatch, capsys, interrupt, code):
    handler = signal.getsignal(signal.SIGINT)  # Lightning ignores further Ctrl-C while it shuts down
    command = ["compare", "segmentation", "--with", probes, "--seeds", "1", "--out", "out", *TINY, f"--trainer.callbacks+={probes}"]
    monkeypatch.setattr(Probe, "interrupt", interrupt)
    try:
        assert main(command) == code
    finally:
        signal.signal(signal.SIGINT, handler)

    assert "difference" not in capsys.readouterr().out
    assert not (tmp_path / "out" / "runs.csv").exists()


def test_a_callback_that_changes_nothing_is_told_so(probes, tmp_path, capsys):
    assert main(["compare", "segmentation", "--with", probes, "--seeds=1", *TINY, "--data.train_count=16"]) == 0

    shown = capsys.readouterr().out
    assert "no change:  Probe changed nothing in these runs: the runs with it and without ended with the same weights" in shown
    assert "difference: " not in shown
    (folder,) = (tmp_path / "runs" / "compare").iterdir()
    assert re.fullmatch(r"segmentation-Probe-[0-9a-f]{8}", folder.name)
    assert json.loads((folder / "settings.json").read_text())["arms"]["Probe"]["callbacks"] == [probes]


def test_a_folder_without_a_finished_run_takes_other_settings(tmp_path):
    RunStore(tmp_path, {"words": ["--model.lrr=3"]})
    store = RunStore(tmp_path, {"words": ["--model.lr=3"]})
    store.add(PairedRun(0, "with", {"val_miou": 0.5}, 1.0, 0.1, 1.0, "abc", "def", None, ((2, {"val_miou": 0.5}),)))
    assert RunStore(tmp_path, {"words": ["--model.lr=3"]}).runs == store.runs
    with pytest.raises(ConfigError, match="another comparison"):
        RunStore(tmp_path, {"words": ["--model.lrr=3"]})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--with", "GamaDecay"], "did you mean 'GammaDecay'"),
        (["--with", "StochasticPooling(keeep=0.5)"], "did you mean 'keep'"),
        (["--with", "StochasticPooling(keep=7.0)"], "keep"),
        (["--with", "StochasticPooling(keep=open('x'))"], "not a literal"),
        (["--with", "StochasticPooling(**{'keep': 1})"], "does not take"),
        (["--with", "A B"], "cannot be read"),
        (["--with", "[]"], "there is no callback"),
        (["--with", ""], "names no callback"),
        (["--with", "no.such.module.Callback"], "there is no callback 'no.such.module.Callback'"),
        (["--with", "torch.nn.Linear"], "no callback class"),
        (["--with", "AtrousRates", "--trainer.callbacks=pl_normkit.callbacks.AtrousRates"], "edit the network twice"),
        ([], "nothing to compare"),
        (["--with", "without=GammaDecay"], "choose another name"),
        (["--with", "GammaDecay", "--with", "GammaDecay()"], "two arms have one name"),
        (["--arm", "slow"], "--arm cannot be read"),
        (["--arm", "slow:--model.lrr=3", *TINY], "lrr"),
        (["--arm", "slow:--seed_everything=3"], "--seeds"),
        (["--arm", "both:--model.lr=1 --with"], "names no callback"),
        (["--with", "GammaDecay", "--metric", "val_mio", *TINY, "--trainer.max_steps=1"], "logged no val_mio"),
        (["--with", "GammaDecay", "--seeds", "0"], "at least one pair"),
        (["--with", "GammaDecay", "--seed_everything=3"], "--seeds"),
        (["--with", "GammaDecay", "--model.lrr=3"], "lrr"),
        (["--with", "GammaDecay", "--trainer.devices=2", "--trainer.accelerator=cpu", *TINY], "one device"),
        (["--with", "GammaDecay", "--trainer.limit_val_batches=0", *TINY], "logged no val_miou"),
    ],
)
def test_what_cannot_be_compared_is_one_error(tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "segmentation", *more]) == 2
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 1
    assert message in errors


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [(["--help"], 0, "--seeds"), (["--seeds"], 2, "--seeds"), (["--with", "GammaDecay", "--print_config"], 0, "seed_everything")],
)
def test_help_and_configuration_are_shown_without_training(tmp_path, monkeypatch, capsys, words, code, shown):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "segmentation", *words]) == code
    captured = capsys.readouterr()
    assert shown in captured.out + captured.err


def test_an_unknown_recipe_is_named_with_the_nearest(capsys):
    assert main(["compare", "segmentatoin", "--with", "GammaDecay"]) == 2
    assert "did you mean 'segmentation'" in capsys.readouterr().err


def test_callbacks_are_read_with_literal_arguments():
    first, second = parse_callbacks("GammaDecay( weight_decay = -1e-2 ), pl_normkit.callbacks.StochasticPooling(0.25, scale='none')")

    assert (first.text, second.text) == ("GammaDecay(weight_decay=-0.01)", "pl_normkit.callbacks.StochasticPooling(0.25, scale='none')")
    built = second.build()
    assert isinstance(built, StochasticPooling)
    assert (built.keep, built.scale) == (0.25, "none")
    assert first.kind is GammaDecay
    assert first.build() is not first.build()


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30, 101])
@pytest.mark.parametrize("probability", [0.6, 0.975, 0.995])
def test_quantiles_are_those_of_students_t(probability, freedom):
    assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-9)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=12))
def test_the_interval_is_that_of_a_paired_t_test(pairs):
    without, with_it = map(list, zip(*pairs, strict=True))
    found = paired_difference(without, with_it)
    differences = np.array(with_it) - np.array(without)

    assert found.mean == pytest.approx(differences.mean(), abs=1e-12)
    if differences.std() > 1e-9:
        expected = stats.ttest_rel(with_it, without).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_pairs_without_a_number_are_left_out_and_counted():
    found = paired_difference([0.5, math.nan, 0.5], [0.75, 0.5, math.inf])

    assert (found.count, found.mean, found.half_width) == (1, 0.25, None)
    assert math.isnan(paired_difference([math.nan], [0.5]).mean)


class _Noise(Dataset):
    """Draws from all three global generators."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.rand(()).item(), np.random.rand(), random.random()])  # noqa: NPY002


class _NoiseData(pl.LightningDataModule):
    def __init__(self, workers: int) -> None:
        super().__init__()
        self.workers = workers

    def train_dataloader(self) -> dict[str, DataLoader]:
        return {"noise": DataLoader(_Noise(), 2, shuffle=True, num_workers=self.workers, persistent_workers=self.workers > 0)}


@pytest.mark.parametrize("workers", [0, 1])
def test_isolated_batches_depend_on_seed_and_epoch_alone(workers):
    def read(seed: int, spend: int) -> list[torch.Tensor]:
        data, trainer = _NoiseData(workers), types.SimpleNamespace(current_epoch=0)
        isolate_train_data(data, trainer, seed)
        loader = data.train_dataloader()["noise"]
        assert (len(loader), loader.batch_size) == (3, 2)
        epochs = []
        for trainer.current_epoch in range(2):
            batches = []
            for batch in loader:
                torch.rand(spend), np.random.rand(spend), random.random()  # noqa: NPY002
                batches.append(batch)
            epochs.append(torch.cat(batches))
        return epochs

    first, second, other = read(seed=3, spend=0), read(seed=3, spend=5), read(seed=4, spend=0)

    columns = slice(None) if workers == 0 else slice(0, 2)  # a worker seeds numpy and Python by its own rule
    assert all(torch.equal(one[:, columns], two[:, columns]) for one, two in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_isolation_leaves_the_global_generators_alone():
    data = _NoiseData(0)
    isolate_train_data(data, types.SimpleNamespace(current_epoch=0), 0)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    list(data.train_dataloader()["noise"])

    assert torch.equal(torch.rand(2), expected)
