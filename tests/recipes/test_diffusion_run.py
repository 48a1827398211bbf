import csv
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pl_normkit.cli import main
from pl_normkit.recipes.diffusion import RECIPE, DiffusionModule, UNet, scorer
from pl_normkit.recipes.export import run_or_export

run = partial(run_or_export, RECIPE)

TINY = ["--model.channels=8", "--model.groups=4", "--model.steps=12", "--model.sample_steps=3", "--trainer.check_val_every_n_epoch=1"]
QUIET = ["--trainer.enable_model_summary=false", "--trainer.callbacks=null"]
SHORT = [*TINY, *QUIET, "--trainer.limit_train_batches=3"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs write into their working directory; their classifier is a hasty one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scorer, "_EPOCHS", 1)
    return tmp_path


def _latest(here: Path) -> Path:
    return max((here / "runs" / "diffusion").iterdir(), key=lambda path: int(path.name.removeprefix("version_")))


def _column(version: Path, name: str) -> list[float]:
    with (version / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def _state(version: Path) -> dict[str, torch.Tensor]:
    saved = torch.load(version / "checkpoints" / "last.ckpt", weights_only=True)
    return {**saved["state_dict"], **{f"current.{key}": value for key, value in saved.get("current_model_state", {}).items()}}


def test_the_default_run_trains_under_audit_and_sums_up(here, capsys):
    assert run([*TINY, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]) == 0

    shown, version = capsys.readouterr().out, _latest(here)
    distance = re.search(r"distance: +(\d+\.\d{3}) from the samples to real images, loss (\d\.\d{4}) \(validation after 2 steps", shown)
    assert distance is not None
    assert float(distance[1]) == pytest.approx(_column(version, "val_frechet")[-1], abs=6e-4)
    assert re.search(r"training images get 0\.\d{3} on the validation images\)\nclassifier: 0\.\d{4} top-1", shown)
    checkpoint = re.search(r"checkpoint: (\S+\.ckpt) \(val_frechet", shown)
    assert checkpoint is not None
    assert Path(checkpoint[1]).is_file()
    with Image.open(version / "samples.png") as sheet:
        assert sheet.size == (8 * 9 * 7, 8 * 9 * 7)
    assert (version / "report.html").is_file()


def test_a_resumed_run_is_bit_equal_and_its_checkpoint_tests_and_samples(here, capsys):
    """With the moving average and a remedy that adds parameters; three of the sixteen batches of an epoch."""
    options = [*SHORT, "--model.norm=instance", "--with=TimestepEmbedding"]
    assert run([*options, "--trainer.max_epochs=3"]) == 0
    whole = _latest(here)
    assert run([*options, "--trainer.max_epochs=1"]) == 0
    last = f"--ckpt_path={_latest(here) / 'checkpoints' / 'last.ckpt'}"
    assert run([*options, "--trainer.max_epochs=3", last]) == 0
    expected, resumed = _state(whole), _state(_latest(here))
    assert any("positional_time" in key for key in expected)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in expected.items())
    assert _column(_latest(here), "train_loss") == _column(whole, "train_loss")[3:]

    last = f"--ckpt_path={whole / 'checkpoints' / 'last.ckpt'}"
    capsys.readouterr()
    assert run(["validate", *options, last]) == 0
    assert f"distance:   {_column(whole, 'val_frechet')[-1]:.3f} from" in capsys.readouterr().out
    assert run(["test", *options, last]) == 0
    assert "(test;" in capsys.readouterr().out
    for size in (64, 5):
        assert (
            run(["predict", *options, last, "--data.samples=12", f"--data.eval_batch_size={size}", f"--samples.output_file={size}.png"])
            == 0
        )
    one, two = np.load("64.npy").astype(int), np.load("5.npy").astype(int)
    assert one.shape == (12, 1, 8, 8)
    assert np.abs(one - two).max() <= 1


def test_a_checkpoint_of_another_network_is_refused(here, capsys):
    run([*SHORT, "--trainer.max_steps=1"])
    last = f"--ckpt_path={_latest(here) / 'checkpoints' / 'last.ckpt'}"
    assert main(["run", "diffusion", "test", *SHORT, last, "--model.injection=film"]) == 2
    assert "the checkpoint belongs to another network" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_other_precisions(here, precision):
    assert run([*SHORT, f"--trainer.precision={precision}", "--trainer.max_epochs=1", "--model.ema_decay=0"]) == 0
    plain = [*SHORT, "--trainer.max_epochs=1", "--model.ema_decay=0"]
    rounded = _column(_latest(here), "train_loss")
    assert run(plain) == 0
    assert rounded == pytest.approx(_column(_latest(here), "train_loss"), rel=0.05)
    assert all(math.isfinite(value) for value in _column(_latest(here), "val_frechet"))


def test_export(here, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    run([*SHORT, "--trainer.max_epochs=1", "--model.injection=film"])
    version = _latest(here)
    command = ["run", "diffusion", "export", f"--ckpt_path={version / 'checkpoints' / 'last.ckpt'}"]
    module = DiffusionModule([str(digit) for digit in range(10)], channels=8, groups=4, steps=12, sample_steps=3, injection="film")
    module.load_state_dict(_state_of_module(version))
    inputs = torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 11])
    expected = module.eval()(*inputs).detach()

    assert main([*command, "--to=out/model.pt"]) == 0
    call = re.search(r"loads into: pl_normkit\.recipes\.diffusion\.(UNet\(.*\))", capsys.readouterr().out)
    assert call is not None
    network = eval(call[1], {"UNet": UNet}).eval()
    network.load_state_dict(torch.load("out/model.pt", weights_only=True))
    assert torch.equal(network(*inputs), expected)

    assert main([*command, "--to=model.onnx"]) == 0
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    (noise,) = session.run(["noise"], {"images": inputs[0].numpy(), "times": inputs[1].numpy()})
    np.testing.assert_allclose(noise, expected.numpy(), atol=1e-4)


def _state_of_module(version: Path) -> dict[str, torch.Tensor]:
    return torch.load(version / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_two_processes_train_one_network_and_score_it_together(here, capsys, monkeypatch):
    """Their distance is that of one process, but for the one image that evens out their shares."""
    options = [*SHORT, "--model.norm=instance", "--with=TimestepEmbedding"]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--trainer.max_epochs=1"]
    done = subprocess.run(
        [sys.executable, "-m", "pl_normkit.cli", "run", "diffusion", *options, *two],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    version = _latest(here)
    (distance,) = _column(version, "val_frechet")

    monkeypatch.setattr(scorer, "_EPOCHS", 15)  # as in the processes
    assert run(["validate", *options, f"--ckpt_path={version / 'checkpoints' / 'last.ckpt'}"]) == 0
    shown = re.search(r"distance: +(\d+\.\d+)", capsys.readouterr().out)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(distance, rel=0.02)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--model.sample_steps=500"], "--model.sample_steps"),
        (["--model.norm=grup"], "norm"),
        (["--data.image_size=1"], "--data.image_size"),
        (["--with=TimestepEmbeding"], "did you mean 'TimestepEmbedding'?"),
        (["fitt"], "did you mean 'fit'?"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_two(options, what, capsys):
    assert main(["run", "diffusion", *(options if options == ["fitt"] else [*SHORT, *options])]) == 2
    message = capsys.readouterr().err
    assert message.count("error: ") == 1
    assert what in message
    assert "Traceback" not in message


def test_compare_pairs_runs_that_share_their_noise(capsys):
    options = [*SHORT, "--model.norm=instance", "--trainer.max_epochs=1", "--seeds=1", "--out=both"]
    assert main(["compare", "diffusion", "--with=TimestepEmbedding", *options]) == 0
    with Path("both/runs.csv").open() as file:
        runs = {row["arm"]: row for row in csv.DictReader(file)}
    assert runs["without"]["weights"] == runs["TimestepEmbedding"]["weights"]
    assert runs["TimestepEmbedding"]["edits"] == "8"
    assert runs["without"]["val_frechet"] != runs["TimestepEmbedding"]["val_frechet"]
