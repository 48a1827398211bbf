import csv
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from vit_tree import CLASSES, write_class_folders

from pl_normkit.cli import main
from pl_normkit.errors import ConfigError
from pl_normkit.recipes.export import run_or_export
from pl_normkit.recipes.vit import RECIPE

run = partial(run_or_export, RECIPE)

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
    field = re.search(r"half of the mass within \d+\.\d\d px before training, \d+\.\d\d px after training; (\S+\.png)", shown)
    checkpoint = re.search(r"checkpoint: (\S+\.ckpt)", shown)
    assert field is not None
    assert checkpoint is not None
    assert Path(field[1]).is_file()
    assert Path(checkpoint[1]).is_file()
    with Image.open(version / "validation.png") as sheet:
        assert min(sheet.size) > 4 * 96
    page = (version / "report.html").read_text(encoding="utf-8")
    parts = ["val_acc", "best checkpoint and last state, step 2", "Accuracy of each class", "Map of the network", "(2, 1, 16, 16)"]
    assert [part for part in parts if part not in page] == []
    assert len(_column(version, "train_loss")) == 2
    assert len(_column(version, "normkit/positional_rho")) == 1
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


def test_validation_and_checkpoint_go_by_the_moving_average(here, pets):
    """A decay near 1 leaves the average at the weights after the first step, whatever training does later."""
    options = _on(pets, "--model.lr=0.1", "--model.ema_decay=0.999999", "--trainer.max_epochs=3", "--checkpoint.save_top_k=-1")
    assert run(options) == 0
    averaged = _column(_latest(here), "val_loss")
    checkpoints = _latest(here) / "checkpoints"
    saved = torch.load(checkpoints / "last.ckpt", weights_only=True)
    assert averaged == pytest.approx([averaged[0]] * 3, rel=1e-3)
    key = "network.head.weight"
    assert not torch.allclose(saved["state_dict"][key], saved["current_model_state"][key], atol=1e-2)

    assert run([*options, "--model.ema_decay=0"]) == 0
    plain = _column(_latest(here), "val_loss")
    assert abs(plain[2] - plain[0]) > 0.01
    assert "current_model_state" not in torch.load(_latest(here) / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_biased_network_resumes_and_a_plain_one_refuses_its_checkpoint(here, pets):
    options = _on(pets, "--model.gaussian_bias=true", "--field.images=0")
    run([*options, "--trainer.max_epochs=1"])

    last = _latest(here) / "checkpoints" / "last.ckpt"
    run([*options, "--trainer.max_epochs=2", f"--ckpt_path={last}"])
    assert torch.load(_latest(here) / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
    assert any("gaussian_bias" in key for key in torch.load(last, weights_only=True)["state_dict"])
    with pytest.raises(ConfigError, match="another network"):
        run(["validate", *_on(pets, f"--ckpt_path={last}")])


def test_bfloat16_on_the_cpu_and_the_learning_rate_follows_the_cosine(here, pets):
    """Six steps; the warm-up of an epoch (three) is cut to a third of the run."""
    more = ["--trainer.precision=bf16-mixed", "--trainer.max_epochs=2", "--trainer.callbacks=LearningRateMonitor"]
    layers = ["--model.warmup_epochs=1", "--model.layer_decay=0.5", "--model.lr=0.01", "--model.weight_decay=0"]
    assert run(_on(pets, *more, *layers)) == 0

    rates = [0.01 / 3, 0.02 / 3, *(0.01 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4))]
    assert _column(_latest(here), "lr/pg4") == pytest.approx(rates)
    assert _column(_latest(here), "lr/pg1") == pytest.approx([0.125 * rate for rate in rates])


def test_a_run_without_a_progress_bar(here, pets):
    """The bar among the default callbacks goes; the others stay."""
    assert run([*_on(pets)[:-1], "--trainer.enable_progress_bar=false", "--trainer.max_steps=1", "--field.images=0"]) == 0

    config = yaml.safe_load((_latest(here) / "config.yaml").read_text())
    assert "pl_normkit.callbacks.ModelAudit" in [callback["class_path"] for callback in config["trainer"]["callbacks"]]


def test_a_configuration_file_chooses_data_and_model(here, pets, capsys):
    data = {"class_path": "FolderData", "init_args": {"root": str(pets), "image_size": 32}}
    Path("mine.yaml").write_text(yaml.safe_dump({"data": data, "model": {"name": "test_resnet"}}))

    assert run(["--config", "mine.yaml", *QUIET, "--print_config"]) == 0

    config = yaml.safe_load(capsys.readouterr().out)
    chosen = config["data"]["init_args"]
    assert (config["model"]["name"], config["model"]["options"]) == ("test_resnet", None)
    assert (chosen["batch_size"], chosen["cutmix"], chosen["erase"]) == (64, 0.5, 0.25)


def _no_val(root: Path) -> list[str]:
    (root / "val").rename(root / "valid")
    return []


def _one_class(root: Path) -> list[str]:
    for name in CLASSES[1:]:
        (root / "train" / name).rename(root / name)
    return []


def _spoil_header(root: Path) -> list[str]:
    (root / "train" / "dog" / "1.png").write_bytes(b"not a picture")
    return []


def _cut_short(root: Path) -> list[str]:
    whole = (root / "train" / "dog" / "1.png").read_bytes()
    (root / "train" / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    return ["--data.num_workers=1", "--data.batch_size=12"]


def _strange_class(root: Path) -> list[str]:
    (root / "val" / "dog").rename(root / "val" / "dogs")
    return []


def _empty_class(root: Path) -> list[str]:
    for path in (root / "val" / "owl").iterdir():
        path.unlink()
    return []


@pytest.mark.parametrize(
    ("spoil", "what", "where", "fix"),
    [
        (_no_val, "the val folder is not there", "pets/val", "--data.val_share"),
        (_one_class, "at least two classes", "pets/train", "a folder of its own"),
        (_spoil_header, "the image cannot be read", "dog/1.png", "replace the file"),
        (_cut_short, "the image cannot be read", "dog/1.png", "replace the file"),
        (_strange_class, "val has a class that train does not have", "val/dogs", "did you mean 'dog'?"),
        (_empty_class, "the image folder is empty", "val/owl", ".png"),
        (lambda root: [f"--data.root={root}s"], "the data folder is not there", "petss", "--data.root"),
        (lambda root: ["--model.name=vit_tinny_patch16_224"], "timm has no model", "vit_tinny", "did you mean 'vit_tiny_patch16_224'?"),
        (lambda root: ["--data.image_size=4"], "fails on images of 4 x 4 pixels", "--data.image_size 4", "take another --data.image_size"),
        (lambda root: ["--data.std=[0.1,0.1]"], "option std cannot be used", "--data.std", "give 3 numbers"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_two(here, pets, capsys, spoil, what, where, fix):
    more = spoil(pets)

    code = main(["run", "vit", "fit", *_on(pets, *more)])

    message = capsys.readouterr().err
    assert code == 2
    assert message.count("error: ") == 1
    assert all(text in message for text in (what, where, fix))
    assert "Traceback" not in message
