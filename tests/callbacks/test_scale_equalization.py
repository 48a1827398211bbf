"""`ScaleEqualization` in a Trainer: structure at setup, statistics before the first step, once, on every rank the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pl_normkit.callbacks import ScaleEqualization
from pl_normkit.errors import ConfigError, DataError, EditError, NormkitWarning
from pl_normkit.methods.fusion_scale import equalize_scales
from pl_normkit.nn import ScaleEqualizer
from tests.callbacks.processes import run_on_two_ranks
from tests.callbacks.scale_runs import Images, Segmenter, trainer
from tests.methods.fusion_scale.models import OwnDecoder

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:.*GPU available.*")


def equalizer(module: nn.Module) -> ScaleEqualizer:
    (found,) = [part for part in module.modules() if isinstance(part, ScaleEqualizer)]
    return found


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Images(), batch_size=4, **options)


def test_statistics_are_those_of_the_function_and_the_run_sees_its_usual_batches() -> None:
    torch.manual_seed(1)
    plain = Segmenter()
    trainer().fit(plain, loader(shuffle=True))

    torch.manual_seed(1)
    module, callback = Segmenter(), ScaleEqualization(max_batches=None)
    trainer(callback).fit(module, loader(shuffle=True))
    assert module.seen == plain.seen

    torch.manual_seed(1)
    twin = Segmenter()
    equalize_scales(twin, [batch["image"] for batch in loader()])
    torch.testing.assert_close(equalizer(module).scale, equalizer(twin).scale)
    assert equalizer(module).is_calibrated
    assert [change.module for change in callback.changes.made] == ["net.fuse", "net.fuse.scale_equalizer"]
    callback.changes.undo()
    assert not any("scale_equalizer" in key for key in module.state_dict())


def test_a_loader_with_its_own_generator_and_lasting_workers_gives_the_same_batches() -> None:
    def run(*callbacks: pl.Callback) -> list[list[int]]:
        torch.manual_seed(1)
        module = Segmenter()
        generator = torch.Generator().manual_seed(3)
        trainer(*callbacks, max_epochs=2).fit(module, loader(shuffle=True, generator=generator, num_workers=1, persistent_workers=True))
        return module.seen

    assert run() == run(ScaleEqualization())


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = True


@pytest.mark.parametrize("mode", ["explicit", "init"])
def test_a_resumed_run_does_not_calibrate_again(mode: Any, tmp_path: Path) -> None:
    callback = ScaleEqualization(mode)
    first, run = Segmenter(), trainer(callback, max_epochs=1)
    run.fit(first, loader())
    checkpoint = tmp_path / "last.ckpt"
    run.save_checkpoint(checkpoint)
    saved = {key: value.clone() for key, value in first.state_dict().items()}

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            self.state = getattr(self, "state", {key: value.clone() for key, value in pl_module.state_dict().items()})

    watch, again = Watch(), ScaleEqualization(mode)
    second = Segmenter()
    second.net.levels.fine.weight.data *= 100  # other weights than those of the checkpoint would give other statistics
    trainer(again, watch, max_epochs=2).fit(second, loader(), ckpt_path=checkpoint)
    assert {key: bool(torch.equal(value, watch.state[key])) for key, value in saved.items()} == dict.fromkeys(saved, True)
    assert ("net.fuse.scale_equalizer.scale" in saved) is (mode == "explicit")
    assert [str(change) for change in again.changes.made if "calibrated" in str(change) or "divided" in str(change)] == []

    third = Segmenter()
    trainer(ScaleEqualization(mode)).test(third, loader(), ckpt_path=checkpoint, verbose=False)
    assert list(third.state_dict()) == list(saved)


def test_the_folded_form_leaves_no_key() -> None:
    torch.manual_seed(1)
    module, callback = Segmenter(), ScaleEqualization("init")
    keys, weight = list(module.state_dict()), module.net.fuse.weight
    original = weight.detach().clone()

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            self.ratio = getattr(self, "ratio", (original / weight.detach()).mean((0, 2, 3)))

    watch = Watch()
    trainer(callback, watch).fit(module, loader())
    assert list(module.state_dict()) == keys
    assert module.net.fuse.weight is weight
    torch.manual_seed(1)
    twin = Segmenter()
    equalize_scales(twin, [batch["image"] for batch in loader()])
    torch.testing.assert_close(watch.ratio, equalizer(twin).std.float(), rtol=1e-4, atol=0)


def test_zero_padded_fusions_keep_the_module_in_the_folded_form_too(tmp_path: Path) -> None:
    callback, run = ScaleEqualization("init"), None
    module = Segmenter(kernel=3)
    run = trainer(callback)
    run.fit(module, loader())
    assert equalizer(module).is_calibrated
    assert "pads with zeros" in str(callback.changes)
    run.save_checkpoint(tmp_path / "last.ckpt")
    resumed = Segmenter(kernel=3)
    trainer(ScaleEqualization("init"), max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
    torch.testing.assert_close(equalizer(resumed).scale, equalizer(module).scale, rtol=0, atol=0)


def test_a_trained_network_is_refused_before_the_first_step_unless_told() -> None:
    module = Segmenter()
    module.train()
    module(torch.randn(4, 3, 16, 16))
    before = module.net.fuse.weight.detach().clone()
    with pytest.raises(EditError, match="trained already"):
        trainer(ScaleEqualization()).fit(module, loader())
    assert torch.equal(module.net.fuse.weight, before)
    module = Segmenter()
    module(torch.randn(4, 3, 16, 16))
    trainer(ScaleEqualization(allow_trained=True)).fit(module, loader())
    assert equalizer(module).is_calibrated


def test_an_old_checkpoint_is_refused_too(tmp_path: Path) -> None:
    """Trained without the callback, resumed with it: its weights would see other features."""
    run = trainer()
    run.fit(Segmenter(), loader())
    run.save_checkpoint(tmp_path / "old.ckpt")
    with pytest.raises(EditError, match="trained already"):
        trainer(ScaleEqualization(), max_epochs=2).fit(Segmenter(), loader(), ckpt_path=tmp_path / "old.ckpt")


class Late(Segmenter):
    """Its network exists after `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = OwnDecoder()


class Headless(Segmenter):
    """No forward: the training step calls the network."""

    forward = pl.LightningModule.forward  # type: ignore[assignment]

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.net(batch["image"]).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("build", [Late, Headless])
def test_networks_are_found_where_they_are(build: type[Segmenter]) -> None:
    module = build()
    trainer(ScaleEqualization()).fit(module, loader())
    assert equalizer(module.net).is_calibrated


class NotANumber(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.full((3, 16, 16), torch.nan if index == 5 else float(index)), "index": index}


class Endless(IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Any:
        return ({"image": torch.randn(3, 16, 16), "index": 0} for _ in iter(int, 1))


def test_data_that_cannot_be_used() -> None:
    module = Segmenter()
    with pytest.raises(DataError, match="not finite") as caught:
        trainer(ScaleEqualization()).fit(module, DataLoader(NotANumber(), batch_size=2))
    assert caught.value.where == "batch 2"
    assert not equalizer(module).is_calibrated
    with pytest.warns(NormkitWarning, match="not known what the network is called with.*example_input_array"):
        trainer(ScaleEqualization(), limit_train_batches=2).fit(Segmenter(), DataLoader(Endless(), batch_size=2))
    module = Segmenter()
    trainer(ScaleEqualization(max_batches=3, example_inputs=torch.zeros(2, 3, 16, 16)), limit_train_batches=2).fit(
        module, DataLoader(Endless(), batch_size=2)
    )
    assert equalizer(module).is_calibrated


def test_a_bar_shows_each_pass_where_the_trainer_shows_bars(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (True, False):
        read: list[Tensor] = []

        def inputs(batch: dict[str, Tensor], read: list[Tensor] = read) -> Tensor:
            read.append(batch["image"])
            return batch["image"]

        callback = ScaleEqualization(max_batches=3, inputs=inputs)
        trainer(callback, enable_progress_bar=shown).fit(Segmenter(), loader())
        printed = capsys.readouterr()
        assert [len(batch) for batch in read] == [2, 4, 4, 4]  # two samples for the trace, then three batches of four
        assert ("Scale statistics, pass 1" in printed.err) is shown
        assert ("| 3/3 " in printed.err) is shown


class Converting(Segmenter):
    """Its batches are not what the loader gives: hooks before and after the transfer, double precision."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "image": batch["image"] - 3}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "image": 2 * batch["image"]}


def test_statistics_are_of_batches_as_the_training_step_gets_them() -> None:
    torch.manual_seed(1)
    module = Converting()
    trainer(ScaleEqualization(), precision="64-true").fit(module, loader())
    torch.manual_seed(1)
    twin = Segmenter().double()
    equalize_scales(twin, [2 * (batch["image"].double() - 3) for batch in loader()])
    torch.testing.assert_close(equalizer(module).mean, equalizer(twin).mean, check_dtype=False)
    torch.testing.assert_close(equalizer(module).std, equalizer(twin).std, check_dtype=False)


def test_a_stage_without_known_inputs_says_so() -> None:
    with pytest.warns(NormkitWarning, match="ScaleEqualization changes nothing"):
        trainer(ScaleEqualization(), limit_test_batches=1).test(Segmenter(), DataLoader(Endless(), batch_size=2), verbose=False)


def test_wrong_arguments_and_models() -> None:
    for options in ({"mode": "x"}, {"granularity": "x"}, {"border": "x"}, {"max_batches": 0}):
        with pytest.raises(ConfigError):
            ScaleEqualization(**options)  # type: ignore[arg-type]
    module = Segmenter()
    module.net = nn.Conv2d(3, 2, 1)  # type: ignore[assignment]
    with pytest.warns(NormkitWarning, match="it looked for fusions of levels"):
        trainer(ScaleEqualization()).fit(module, loader())


# Two processes.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw."""
    return run_on_two_ranks("scale_runs", tmp_path_factory.mktemp("ranks"))


def test_every_rank_has_the_statistics_of_all_data(ranks: list[dict[str, Any]]) -> None:
    """Without batch norms before the fusion they are those of one process over the same images."""
    torch.manual_seed(1)
    twin = Segmenter()
    equalize_scales(twin, [batch["image"] for batch in loader()])
    assert ranks[0]["std"] == ranks[1]["std"]
    assert ranks[0]["std"] == pytest.approx(equalizer(twin).std.tolist(), rel=1e-5)
    assert ranks[0]["seen"] != ranks[1]["seen"]


def test_bad_data_on_one_rank_stop_both(ranks: list[dict[str, Any]]) -> None:
    told = sorted(run["error"].partition("\n")[0] for run in ranks)
    assert told == [
        "another rank met data it cannot use while scales were measured",
        "the loader gives values that are not finite, and statistics over them would be wrong",
    ]
