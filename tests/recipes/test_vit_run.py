import csv
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from vit_tree import CLASSES, write_class_folders

from pl_normkit.recipes.vit import run

TINY = ["--model.options={patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2}", "--model.warmup_epochs=0"]
QUIET = ["--trainer.enable_model_summary=false", "--trainer.callbacks=null"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs write into their working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    write_class_folders(root / "train", 4)
    write_class_folders(root / "val", 2)
    return root


def _on(root: Path, *more: str) -> list[str]:
    data = ["--data=FolderData", f"--data.root={root}", "--data.image_size=16", "--data.batch_size=4", "--data.num_workers=0"]
    return [*data, *TINY, *QUIET, *more]


def _latest(here: Path) -> Path:
    return max((here / "runs" / "vit").iterdir(), key=lambda path: int(path.name.removeprefix("version_")))


def _column(version: Path, name: str) -> list[float]:
    with (version / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_the_default_run_trains_on_digits_under_audit_and_sums_up(here, capsys):
    assert run(["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]) == 0

    shown = capsys.readouterr().out
    version = _latest(here)
    assert re.search(r"accuracy: +0\.\d{4} top-1, 0\.\d{4} mean over the classes \(validation after 2 steps\)", shown)
    assert re.search(r"findings: +0\n", shown)
    checkpoint = re.search(r"checkpoint: (\S+\.ckpt)", shown)
    assert checkpoint is not None
    assert Path(checkpoint[1]).is_file()
    with Image.open(version / "validation.png") as sheet:
        assert min(sheet.size) > 4 * 96
    assert len(_column(version, "train_loss")) == 2
    assert len(_column(version, "val_acc")) == len(_column(version, "val_acc_macro")) == 1


def test_fit_resume_test_and_predict_on_a_folder(here, pets, capsys):
    assert run(["fit", *_on(pets, "--trainer.max_steps=3")]) == 0
    first = _latest(here)
    last = first / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    assert (saved["global_step"], saved["class_names"]) == (3, list(CLASSES))

    assert run(["fit", *_on(pets, "--trainer.max_steps=6", f"--ckpt_path={last}")]) == 0
    assert torch.load(_latest(here) / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
    assert len(_column(_latest(here), "train_loss")) == 3

    assert run(["test", *_on(pets, f"--ckpt_path={last}")]) == 0
    capsys.readouterr()
    assert run(["validate", *_on(pets, f"--ckpt_path={last}")]) == 0
    assert f"accuracy:   {_column(first, 'val_acc')[-1]:.4f} top-1" in capsys.readouterr().out

    options = [f"--data.predict_dir={pets / 'val'}", "--predictions.output_file=out/guesses.csv", f"--ckpt_path={last}"]
    assert run(["predict", *_on(pets, *options)]) == 0
    rows = list(csv.DictReader((here / "out" / "guesses.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == [f"{name}/{index}.png" for name in CLASSES for index in range(2)]
    assert {row["class"] for row in rows} <= set(CLASSES)
    assert all(1 / 3 <= float(row["probability"]) <= 1 for row in rows)
