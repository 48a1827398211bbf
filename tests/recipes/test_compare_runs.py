"""Comparisons of modules of one's own: through `compare_runs`, `pl-normkit compare module:function` and the example of the docs."""

import csv
import json
import math
import re
from itertools import permutations
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from PIL import Image
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import StochasticPooling
from pl_normkit.cli import main
from pl_normkit.errors import ConfigError, NormkitWarning
from pl_normkit.recipes.arms import Arm, parse_arms
from pl_normkit.recipes.built_runs import compare_runs
from pl_normkit.recipes.contrasts import contrast_arms
from pl_normkit.recipes.paired_difference import holm, paired_difference, power_of, smallest_shown, two_sided_p
from pl_normkit.recipes.paired_runs import PairedRun

DOCS = Path(__file__).parents[2] / "docs"


class Line(pl.LightningModule):
    """Fits y = 3 x; what it logs tells arms apart."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.lr = lr

    def training_step(self, batch, _):
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, _):
        error = self.layer(batch[0]) - batch[1]
        self.log_dict({"val_loss": error.square().mean(), "val_bias": error.mean()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Points(pl.LightningDataModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.x = torch.randn(24, 1, generator=torch.Generator().manual_seed(seed))

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.x, 3 * self.x), 4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.x[:8], 3 * self.x[:8] + 0.5), 8)


class Shift(Callback):
    """Adds to the bias at the end of training."""

    def __init__(self, by: float = 0.0) -> None:
        self.by = by

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.layer.bias.data += self.by


TIMES = dict.fromkeys(("seconds", "step_seconds"), "")
ONE_EPOCH = {"max_epochs": 1, "accelerator": "cpu", "enable_checkpointing": False}


def value_of(comparison, metric: str, arm: str, seed: int) -> float:
    return comparison.runs[seed, arm].metrics[metric]


def test_arms_of_callbacks_and_arguments_are_compared_with_each_other_and_with_none(tmp_path, capsys):
    arms = {"slow": Arm(module={"lr": 0.01}), "idle": Arm([Shift])}
    probes = {"weight": lambda module, data: module.layer.weight.item()}
    found = compare_runs(Line, Points, arms, 3, metric=["val_loss", "weight"], trainer=ONE_EPOCH, probes=probes)

    assert [(one.metric, one.arm, one.against) for one in found.contrasts] == [
        (metric, *pair) for metric in ("val_loss", "weight") for pair in (("slow", "without"), ("idle", "without"), ("idle", "slow"))
    ]
    slow, idle, both = found.contrasts[:3]
    without = [value_of(found, "val_loss", "without", seed) for seed in range(3)]
    late = [value_of(found, "val_loss", "slow", seed) for seed in range(3)]
    truth = stats.ttest_rel(late, without)
    assert slow.difference.p == pytest.approx(truth.pvalue, rel=1e-9)
    assert slow.p == pytest.approx(min(1, 2 * truth.pvalue), rel=1e-9)  # two tests of equal p: the idle arm is none
    assert (slow.same, idle.same, idle.p, idle.family, both.family) == (False, True, None, 0, 2)
    assert all(one.p is None for one in found.contrasts[3:])

    found.print()
    shown = capsys.readouterr().out
    assert "no change:  idle changed nothing in these runs" in shown
    assert re.search(r"difference: val_loss \+\d\.\d+ with slow, 95 % interval .* \(paired t, 3 pairs, p .*, by Holm over 2 tests", shown)
    assert re.search(r"step time: +\d+\.\d ms without, \d+\.\d ms slow", shown)
    assert re.search(r"step memory: \d+\.\d MiB without, \d+\.\d MiB slow \(1.00 times\)", shown)
    assert "power: four of five such comparisons show a difference between two arms of" in shown
    assert "beside the metric that was named to decide (val_loss): a hint, no test" in shown
    assert found.draw(tmp_path / "all.png")
    with Image.open(tmp_path / "all.png") as picture:
        assert picture.height > 800  # a row of panels for each metric


def test_runs_of_one_seed_share_weights_and_batches_and_go_on_from_the_folder(tmp_path):
    arms = {"moved": Arm([lambda: Shift(1.0)])}
    options = {"metric": "val_bias", "trainer": ONE_EPOCH, "out": tmp_path}
    first = compare_runs(Line, Points, arms, 2, **options)
    assert all(first.runs[seed, "moved"].weights == first.runs[seed, "without"].weights for seed in range(2))
    assert first.runs[0, "without"].weights != first.runs[1, "without"].weights
    # Validation comes before the callback moves the bias: metrics agree, the weights do not, so it did change something.
    assert first.contrasts[0].values == (0.0, 0.0)
    assert not first.contrasts[0].same

    more = compare_runs(Line, Points, arms, 3, **options)
    rounded = {"seconds": 1e-3, "step_seconds": 1e-6}
    assert {key: run for key, run in more.runs.items() if key[0] < 2} == {
        key: PairedRun(**vars(run) | {name: pytest.approx(vars(run)[name], abs=most) for name, most in rounded.items()})
        for key, run in first.runs.items()
    }
    assert len(more.runs) == 6
    with pytest.raises(ConfigError, match="another comparison"):
        compare_runs(Line, Points, arms, 3, **{**options, "metric": "val_loss"})  # chosen after the runs were seen


def test_a_split_per_seed_reaches_the_data(tmp_path):
    seen = []

    def make(seed: int = 100) -> Points:
        seen.append(seed)
        return Points(seed)

    for split in (True, False):
        compare_runs(Line, make, {"a": Arm([Shift])}, [4, 7], metric="val_loss", trainer=ONE_EPOCH, split_per_seed=split)
    assert seen == [4, 4, 7, 7] + [100] * 4


def test_callbacks_that_find_nothing_to_edit_end_after_one_pair(capsys):
    with pytest.warns(NormkitWarning, match="StochasticPooling changes nothing"):
        found = compare_runs(Line, Points, {"pooled": Arm([StochasticPooling])}, 4, metric="val_loss", trainer=ONE_EPOCH)
    assert {seed for seed, name in found.runs if name == "pooled"} == {0}
    found.print()
    assert "pooled changed nothing in this network: it found nothing to edit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arms", "changes", "message"),
    [
        ({}, {}, "nothing to compare"),
        ({"without": Arm()}, {}, "choose another name"),
        ({"a": Arm(module={"lrr": 1})}, {}, "did you mean 'lr'"),
        ({"a": Arm(data={"seeed": 1})}, {}, "did you mean 'seed'"),
        ({"a": Arm()}, {"seeds": 0}, "needs a seed"),
        ({"a": Arm()}, {"metric": "val_los"}, "logged no val_los"),
        ({"a": Arm()}, {"trainer": {"max_epoch": 1}}, "did you mean 'max_epochs'"),
        ({"a": Arm()}, {"make_data": list, "trainer": ONE_EPOCH}, "no LightningDataModule"),
    ],
)
def test_what_cannot_be_compared_is_said(arms, changes, message):
    options = {"make_module": Line, "make_data": Points, "metric": "val_loss", "trainer": ONE_EPOCH, "seeds": 1, **changes}
    with pytest.raises(ConfigError, match=message):
        compare_runs(arms=arms, **options)


OWN = """
from test_compare_runs import Line, Points

def build(lr=0.1, seed=0):
    return Line(lr), Points(seed)
"""


def test_the_command_line_compares_what_a_function_builds(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_runs.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    command = ["compare", "own_runs:build", "--metric", "val_loss,val_bias", "--seeds=2", "--out=out", "--split-per-seed"]
    arms = ["--arm", "slow:--lr=1e-2", "--with", "none=test_compare_runs.Shift", "--trainer.max_epochs=1", "--trainer.accelerator", "cpu"]
    assert main([*command, *arms]) == 0

    shown = capsys.readouterr().out
    assert "no change:  none changed nothing in these runs" in shown
    with (tmp_path / "out" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    order = ["slow", "none", "without"]
    assert [(row["seed"], row["arm"]) for row in rows] == [("0", name) for name in order] + [("1", name) for name in order[::-1]]
    assert list(rows[0])[-2:] == ["val_loss", "val_bias"]
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["metrics"] == ["val_loss", "val_bias"]
    assert main([*command, *arms, "--arm", "odd:--lrr=1"]) == 2
    assert "did you mean 'lr'" in capsys.readouterr().err
    assert main(["compare", "own_runs:build", *arms]) == 2
    assert "name the metric that decides" in capsys.readouterr().err
    assert main([*command, *arms, "--arm", "odd:--trainer.max_epochs=3"]) == 2
    assert "the arms share one Trainer" in capsys.readouterr().err


def test_arms_are_read_from_words():
    arms = parse_arms(
        ["GammaDecay,DropoutPlacement", "all = GammaDecay(policy='all')"], ["slow: --model.lr=0.1 --with=GammaDecay --data.x 'a b'"]
    )

    assert list(arms) == ["without", "GammaDecay+DropoutPlacement", "all", "slow"]
    assert [[type(build()).__name__ for build in arm.callbacks] for arm in arms.values()] == [
        [],
        ["GammaDecay", "DropoutPlacement"],
        ["GammaDecay"],
        ["GammaDecay"],
    ]
    assert list(arms["slow"].options) == ["--model.lr=0.1", "--data.x", "a b"]
    assert [arm.starts_alike for arm in arms.values()] == [True, True, True, False]


def test_arms_of_one_class_are_named_by_their_arguments():
    arms = parse_arms(["SwapNorms('rmsnorm')", "GammaDecay", "SwapNorms('dyt', alpha=1)"], [])

    assert list(arms) == ["without", "SwapNorms('rmsnorm')", "GammaDecay", "SwapNorms('dyt', alpha=1)"]


# Statistics, against scipy and by hand.


@pytest.mark.parametrize("count", [2, 3, 5, 8, 12])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 6])
@pytest.mark.parametrize("effect", [0.1, 0.4, 0.8])
def test_power_is_that_of_the_noncentral_t(count, alpha, effect):
    bound, shift = stats.t.ppf(1 - alpha / 2, count - 1), effect * math.sqrt(count)
    expected = stats.nct.sf(bound, count - 1, shift) + stats.nct.cdf(-bound, count - 1, shift)
    assert power_of(effect, count, alpha) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("count", [2, 5, 10])
def test_the_smallest_difference_shown_is_shown_four_times_in_five(count):
    effect = smallest_shown(2.0, count)
    drawn = torch.randn(20_000, count, generator=torch.Generator().manual_seed(0)) * 2.0 + effect
    t = drawn.mean(1) / (drawn.std(1) / math.sqrt(count))
    share = (t.abs() > stats.t.ppf(0.975, count - 1)).double().mean().item()
    assert share == pytest.approx(0.8, abs=0.012)  # four standard errors


@pytest.mark.parametrize("freedom", [1, 2, 4, 9])
@pytest.mark.parametrize("t", [-3.0, 0.0, 0.7, 12.0])
def test_p_values_are_those_of_students_t(t, freedom):
    assert two_sided_p(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), abs=1e-12)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.floats(0.001, 0.999))
def test_holm_rejects_what_the_stepwise_procedure_rejects(values, alpha):
    """One by one from the smallest: go on as long as p (m - k) is below alpha."""
    rejected = set()
    for place, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        if values[index] * (len(values) - place) >= alpha:
            break
        rejected.add(index)
    assert {index for index, p in enumerate(holm(values)) if p < alpha} == rejected


def test_holm_by_hand_in_any_order():
    expected = {0.01: 0.03, 0.04: 0.06, 0.03: 0.06, 0.005: 0.02}
    for values in permutations(expected):
        assert holm(values) == pytest.approx([expected[value] for value in values])


def test_a_family_is_the_primary_metric_alone_and_a_lost_value_costs_its_pair():
    values = {"without": (1.0, 2.0, 3.0), "a": (1.5, 2.4, 3.6), "b": (1.1, math.nan, 2.8)}
    runs = {
        (seed, name): PairedRun(seed, name, {"x": each[seed], "y": seed}, 1.0, 0.1, 1.0, "", name, None, ())
        for name, each in values.items()
        for seed in range(3)
    }
    found = contrast_arms(runs, list(values), range(3), ["x", "y"])
    raw = [paired_difference(values[early], values[late]).p for late, early in (("a", "without"), ("b", "without"), ("b", "a"))]
    assert [one.difference.count for one in found[:3]] == [3, 2, 2]
    assert [one.p for one in found] == [*holm(raw), None, None, None]


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "compare.md").read_text(), flags=re.DOTALL)
    (tmp_path / "mine.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    import mine

    mine.run()
    shown = capsys.readouterr().out
    assert "with smoothed against" not in shown.split("difference: ")[1]
    assert (tmp_path / "comparison.png").is_file()
    assert (
        main(["compare", "mine:build", "--arm", "smoothed:--smoothing=0.1", "--metric=val_loss", "--seeds=1", "--trainer.max_epochs=1"])
        == 0
    )
    assert "from one pair: no interval" in capsys.readouterr().out


class Noisy(pl.LightningModule):
    """Dropout before a batch norm, which its two modes see with different variance."""

    def __init__(self, drop: float = 0.5) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Dropout(drop), nn.BatchNorm1d(16), nn.Linear(16, 1))

    def training_step(self, batch, _):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, _):
        self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def test_probes_are_metrics_by_their_name(monkeypatch):
    """Truth by hand: half of the dropped units shift the variance; without dropout neither probe sees anything."""
    kept = []
    monkeypatch.setattr("pl_normkit.recipes.trial._digest_weights", lambda module: kept.append(module) or "")
    found = compare_runs(
        Noisy,
        Points,
        {"plain": Arm(module={"drop": 0.0})},
        1,
        metric=["val_loss", "variance_ratio", "recalibration_gap"],
        trainer={**ONE_EPOCH, "max_epochs": 4},
    )
    with_dropout, plain = (found.runs[0, arm].metrics for arm in ("without", "plain"))
    assert plain["variance_ratio"] == pytest.approx(1, abs=1e-5)
    assert with_dropout["variance_ratio"] > 1.5

    # Afterwards the module is as it was, and the gap is what statistics taken by hand close.
    module, data = kept[-1], Points()
    assert module.net[2].p == 0.5
    module.eval()
    with torch.no_grad():
        loss = [float((module.net(data.x[:8]) - 3 * data.x[:8] - 0.5).square().mean())]
        hidden = module.net[:2](data.x)  # what the batch norm reads without dropout
        module.net[3].running_mean.copy_(hidden.mean(0))
        module.net[3].running_var.copy_(hidden.var(0))  # unbiased, as torch keeps it
        loss.append(float((module.net(data.x[:8]) - 3 * data.x[:8] - 0.5).square().mean()))
    assert with_dropout["val_loss"] == pytest.approx(loss[0], rel=1e-5)
    assert with_dropout["recalibration_gap"] == pytest.approx(loss[0] - loss[1], rel=1e-4)


@pytest.mark.parametrize(
    ("metric", "reason"),
    [("fusion_scale", "no network has what it measures"), ("time_awareness", "not known which argument is the time")],
)
def test_a_probe_with_nothing_to_measure_says_so(metric, reason):
    with pytest.raises(ConfigError, match=f"{metric} cannot be measured in this module") as error:
        compare_runs(Noisy, Points, {"plain": Arm(module={"drop": 0.0})}, 1, metric=["val_loss", metric], trainer=ONE_EPOCH)
    assert reason in error.value.evidence


LOSSY = """
import os
import signal
from pathlib import Path

from tests.recipes.test_compare_runs import Line, Points


def build(lr: float = 0.1, dies: str = "", seed: int = 0):
    mark = Path("died")
    if dies == "always" or (dies == "once" and not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return Line(lr), Points(seed)
"""


def test_runs_in_other_processes_are_those_of_this_one_and_a_lost_one_costs_itself(tmp_path, monkeypatch, capsys):
    (tmp_path / "lossy_runs.py").write_text(LOSSY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["compare", "lossy_runs:build", "--arm", "slow:--lr=0.01", "--metric", "val_loss", "--seeds=1", "--trainer.max_epochs=1"]
    words += ["--trainer.accelerator=cpu"]
    assert main([*words, "--out", "here"]) == 0
    capsys.readouterr()
    lossy = [word.replace("slow:--lr=0.01", "slow:--lr=0.01 --dies=always") for word in words]
    assert main([*lossy, "--out", "lost", "--on", "processes", "--jobs", "1"]) == 2
    error = capsys.readouterr().err
    assert "1 of the runs came to no end" in error
    assert "seed 0 slow: the process ended abruptly (signal SIGKILL)" in error
    here, lost = (list(csv.DictReader(Path(folder, "runs.csv").read_text().splitlines())) for folder in ("here", "lost"))
    assert [row["arm"] for row in lost] == ["without"]  # it is kept
    (same,) = [row for row in here if row["arm"] == "without"]
    assert lost[0] | TIMES == same | TIMES


def test_a_place_that_compare_does_not_know(capsys):
    assert main(["compare", "vit", "--with", "GammaDecay", "--on", "moon"]) == 2
    assert "invalid choice: 'moon'" in capsys.readouterr().err
