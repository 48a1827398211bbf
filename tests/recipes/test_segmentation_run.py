import base64
import csv
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pl_normkit.cli import main
from pl_normkit.errors import ConfigError
from pl_normkit.recipes import segmentation
from pl_normkit.recipes.export import run_or_export
from pl_normkit.recipes.segmentation import RECIPE, TEXTURES

run = partial(run_or_export, RECIPE)

SMALL = ["--model.architecture=Unet", "--model.encoder_name=tu-test_resnet"]
QUICK = [*SMALL, "--trainer.enable_model_summary=false", "--trainer.callbacks=null"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs write into their working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _on_folder(folder: Path, *more: str) -> list[str]:
    return [
        "--data=FolderData",
        f"--data.root={folder}",
        "--data.crop_size=32",
        "--data.batch_size=2",
        "--data.num_workers=0",
        *QUICK,
        *more,
    ]


def _latest(here: Path) -> Path:
    return max((here / "runs" / "segmentation").iterdir(), key=lambda path: int(path.name.removeprefix("version_")))


def _column(version: Path, name: str) -> list[float]:
    with (version / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_the_default_run_trains_on_textures_under_audit_and_sums_up(here, capsys):
    code = run([*SMALL, "--trainer.max_steps=2", "--data.train_count=32", "--data.val_count=4", "--data.crop_size=32"])

    shown = capsys.readouterr().out
    version = _latest(here)
    assert code == 0
    assert all(re.search(rf"{texture.name} +│ +(\d\.\d+|does not occur)", shown) for texture in TEXTURES)
    assert re.search(r"mean \(mIoU\) +│ +0\.\d+", shown)
    assert re.search(r"findings: +3", shown)
    checkpoint = re.search(r"checkpoint: (\S+\.ckpt)", shown)
    assert checkpoint is not None
    assert Path(checkpoint[1]).is_file()
    with Image.open(version / "validation.png") as sheet:
        assert sheet.width > 3 * 128
        assert sheet.height > 4 * 128
    assert len(_column(version, "train_loss")) == 2
    assert len(_column(version, "val_miou")) == 1


def test_fit_resume_test_and_predict_on_a_folder(here, folder, capsys):
    assert run(["fit", *_on_folder(folder, "--trainer.max_steps=2")]) == 0
    first = _latest(here)
    last = first / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    assert saved["global_step"] == 2
    assert saved["class_names"] == ["sky", "road", "tree"]

    assert run(["fit", *_on_folder(folder, "--trainer.max_steps=4", f"--ckpt_path={last}")]) == 0
    resumed = torch.load(_latest(here) / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["global_step"] == 4
    assert len(_column(_latest(here), "train_loss")) == 2

    assert run(["test", *_on_folder(folder, f"--ckpt_path={last}")]) == 0
    capsys.readouterr()
    assert run(["validate", *_on_folder(folder, f"--ckpt_path={last}")]) == 0
    expected = _column(first, "val_miou")[-1]
    assert f"mean (mIoU) │ {expected:.3f}" in capsys.readouterr().out

    masks = here / "predicted"
    options = [f"--data.predict_dir={folder / 'images'}", f"--masks.output_dir={masks}", f"--ckpt_path={last}"]
    assert run(["predict", *_on_folder(folder, *options)]) == 0
    assert sorted(path.name for path in masks.iterdir()) == [f"{index}.png" for index in range(6)]
    written = Image.open(masks / "0.png")
    assert (written.mode, written.size) == ("P", (60, 50))
    assert set(np.unique(np.array(written))) <= {0, 1, 2}


def test_the_last_checkpoint_is_the_last_state_and_the_other_the_best(here, folder, capsys):
    """With a learning rate of 0 the first epoch stays the best."""
    assert run([*_on_folder(folder, "--trainer.max_epochs=3", "--model.lr=0", "--data.batch_size=4", "--field.images=0")]) == 0

    checkpoints = _latest(here) / "checkpoints"
    assert "epoch=0-step=1.ckpt" in capsys.readouterr().out
    assert {path.name: torch.load(path, weights_only=True)["global_step"] for path in checkpoints.iterdir()} == {
        "epoch=0-step=1.ckpt": 1,
        "last.ckpt": 3,
    }
    page = (_latest(here) / "report.html").read_text(encoding="utf-8")
    parts = ["best checkpoint, step 1", "last state, step 3", "IoU of each class", "lr: 0.0", "No audit in this run", "state at step 3"]
    assert [part for part in parts if part not in page] == []


def test_a_fit_that_ends_before_its_first_validation_leaves_its_last_state(here, folder):
    options = ["--trainer.max_steps=1", "--trainer.val_check_interval=2", "--field.images=0"]
    assert run([*_on_folder(folder, *options)]) == 0
    checkpoints = _latest(here) / "checkpoints"
    assert {path.name: torch.load(path, weights_only=True)["global_step"] for path in checkpoints.iterdir()} == {"last.ckpt": 1}


def test_resumed_training_equals_uninterrupted_training(here, folder):
    """Four steps at once, and stopped after two: the same weights (the order of the samples is fixed by one batch an epoch)."""
    options = [
        "--data.batch_size=5",
        "--data.scale=[1.0, 1.0]",
        "--data.flip=0",
        "--data.jitter=0",
        "--data.crop_size=64",
        "--trainer.max_epochs=4",
    ]
    run(_on_folder(folder, *options))
    whole = torch.load(_latest(here) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    run(_on_folder(folder, *options, "--checkpoint.save_top_k=-1"))
    middle = next((_latest(here) / "checkpoints").glob("epoch=1-*.ckpt"))
    run(_on_folder(folder, *options, f"--ckpt_path={middle}"))
    resumed = torch.load(_latest(here) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

    assert all(torch.allclose(value.float(), resumed[key].float(), rtol=1e-4, atol=1e-5) for key, value in whole.items())


def test_two_runs_with_one_seed_give_the_same_weights(here):
    options = [*QUICK, "--trainer.max_steps=2", "--data.train_count=32", "--data.val_count=2", "--data.crop_size=32"]
    run(options)
    first = torch.load(_latest(here) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    run(options)
    second = torch.load(_latest(here) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_the_learning_rate_falls_after_every_step(here, folder):
    run(_on_folder(folder, "--trainer.max_steps=4", "--trainer.callbacks=LearningRateMonitor", "--model.warmup_steps=0", "--model.lr=0.01"))

    expected = [0.01 * (1 - step / 4) ** 0.9 for step in range(4)]
    assert _column(_latest(here), "lr") == pytest.approx(expected)


def test_a_configuration_file_chooses_data_and_model(here, folder, capsys):
    data = {"class_path": "FolderData", "init_args": {"root": str(folder), "crop_size": 32, "num_workers": 0}}
    Path("mine.yaml").write_text(yaml.safe_dump({"data": data, "model": {"loss": "cross_entropy+dice"}}))

    assert run(["--config", "mine.yaml", *QUICK, "--print_config"]) == 0

    config = yaml.safe_load(capsys.readouterr().out)
    chosen = config["data"]["init_args"]
    assert config["model"]["loss"] == "cross_entropy+dice"
    assert config["trainer"]["max_epochs"] == 4
    assert (chosen["batch_size"], chosen["eval_batch_size"], chosen["scale"]) == (8, 1, [0.5, 2.0])


CONFIGS = sorted(path.stem for path in Path(segmentation.__file__).with_name("configs").glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_ready_configuration_trains_by_its_name(here, folder, name, capsys):
    encoder = [] if name == "segformer" else ["--model.encoder_name=resnet18"]
    quick = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--field.images=0"]
    small = [option for option in _on_folder(folder, *quick) if option not in SMALL]

    assert run(["--config", name, *small, *encoder, "--checkpoint.save_top_k=0", "--last.every_n_epochs=0"]) == 0

    assert "mean (mIoU)" in capsys.readouterr().out


def test_the_ready_configurations_are_the_promised_ones(here):
    assert CONFIGS == ["deeplabv3plus", "fpn", "pspnet", "segformer", "upernet"]
    with pytest.raises(ConfigError, match="no configuration") as caught:
        run(["--config=upperent"])
    assert "did you mean 'upernet'" in caught.value.fix


def test_mixed_precision_averaged_weights_tiles_and_torchvision_transforms(here, folder):
    options = [
        "--trainer.precision=bf16-mixed",
        "--trainer.max_steps=4",
        "--model.ema_decay=0.5",
        "--model.tile_size=32",
        "--data.transforms+=torchvision.transforms.v2.RandomPhotometricDistort",
        "--data.transforms.p=1.0",
    ]
    assert run(_on_folder(folder, *options)) == 0

    version = _latest(here)
    saved = torch.load(version / "checkpoints" / "last.ckpt", weights_only=True)
    changed = [key for key, value in saved["state_dict"].items() if not torch.equal(value, saved["current_model_state"][key])]
    assert "network.segmentation_head.0.weight" in changed
    assert all(value.dtype != torch.bfloat16 for value in saved["state_dict"].values())
    # The averaged weights are those that were validated.
    checkpoint = f"--ckpt_path={version / 'checkpoints' / 'last.ckpt'}"
    assert run(["validate", *_on_folder(folder, options[0], "--model.tile_size=32", checkpoint)]) == 0
    assert _column(_latest(here), "val_miou") == pytest.approx(_column(version, "val_miou")[-1:])


MENDED = ["--model.architecture=DeepLabV3Plus", "--with=AtrousRates", "--data.crop_size=96"]


def test_callbacks_of_the_with_option_edit_before_the_audit_reads(here, folder, capsys):
    """The audit finds no misfit rates, the picture has the field from before the edit, the page has the pictures."""
    quick = [option for option in _on_folder(folder, *MENDED, "--field.images=2") if option not in ("--trainer.callbacks=null", SMALL[0])]
    assert run([*quick, "--trainer.max_steps=2", "--trainer.callbacks=pl_normkit.callbacks.ModelAudit"]) == 0

    shown, version = capsys.readouterr().out, _latest(here)
    assert "edits:      3 by AtrousRates" in shown
    assert "NK50" not in shown
    assert re.search(r"half of the mass within [\d.]+ px before the edits, [\d.]+ px before training, [\d.]+ px after training", shown)
    page = (version / "report.html").read_text(encoding="utf-8")
    embedded = [base64.b64decode(picture) for picture in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert embedded == [(version / name).read_bytes() for name in ("validation.png", "receptive_field.png")]
    assert "AtrousRates: network.decoder.aspp" in page

    # The rates come from the checkpoint, whatever the crop is now; without the callback they would be smp's.
    checkpoint = f"--ckpt_path={version / 'checkpoints' / 'last.ckpt'}"
    trained = _column(version, "val_loss")
    assert run(["validate", *quick, "--trainer.callbacks=null", "--data.crop_size=256", checkpoint]) == 0
    assert _column(_latest(here), "val_loss") == pytest.approx(trained)


def test_the_moving_average_holds_the_statistics_of_equalizers(here, folder):
    """The average is begun before the calibration; its checkpoint has the calibrated statistics all the same."""
    options = _on_folder(folder, "--with=ScaleEqualization(max_batches=1)", "--data.crop_size=64", "--model.architecture=PSPNet")
    assert run([*options, "--trainer.max_steps=3", "--model.ema_decay=0.9", "--field.images=0", "--data.batch_size=4"]) == 0

    version = _latest(here)
    saved = torch.load(version / "checkpoints" / "last.ckpt", weights_only=True)
    statistics = [key for key in saved["state_dict"] if key.endswith(("scale_equalizer.scale", "scale_equalizer.shift"))]
    assert len(statistics) == 2
    assert all(torch.allclose(saved["state_dict"][key], saved["current_model_state"][key], rtol=1e-6) for key in statistics)
    assert all(saved["state_dict"][key].unique().numel() > 1 for key in statistics)
    assert run(["validate", *options, f"--ckpt_path={version / 'checkpoints' / 'last.ckpt'}"]) == 0
    assert _column(_latest(here), "val_loss") == pytest.approx(_column(version, "val_loss")[-1:])


def test_edits_that_do_not_change_the_field_and_resumed_runs_show_no_field_from_before(here, folder, capsys):
    two_fields = r"half of the mass within [\d.]+ px before training, [\d.]+ px after training"
    options = _on_folder(folder, *MENDED, "--field.images=1", "--data.batch_size=4")
    assert run([*options, "--trainer.max_steps=1", "--with=ScaleEqualization"]) == 0
    assert re.search(two_fields, capsys.readouterr().out)
    assert run([*options, "--trainer.max_steps=1"]) == 0
    assert "before the edits" in capsys.readouterr().out
    last = _latest(here) / "checkpoints" / "last.ckpt"
    assert run([*options, "--trainer.max_steps=2", f"--ckpt_path={last}"]) == 0
    assert re.search(two_fields, capsys.readouterr().out)


def _break_image(folder: Path) -> list[str]:
    (folder / "images" / "2.png").write_bytes(b"not a picture")
    return []


def _break_mask(folder: Path) -> list[str]:
    Image.fromarray(np.full((50, 60), 9, dtype=np.uint8)).save(folder / "masks" / "2.png")
    return []


def _break_mask_unchecked(folder: Path) -> list[str]:
    for path in (folder / "masks").iterdir():
        Image.fromarray(np.full((50, 60), 9, dtype=np.uint8)).save(path)
    return ["--data.check_masks=false", "--data.num_workers=1"]


def _empty_folder(folder: Path) -> list[str]:
    for path in (folder / "images").iterdir():
        path.unlink()
    return []


def _no_class_list(folder: Path) -> list[str]:
    (folder / "classes.txt").unlink()
    return []


@pytest.mark.parametrize(
    ("spoil", "what", "where"),
    [
        (_break_image, "the image cannot be read", "images/2.png"),
        (_break_mask, "class out of range", "masks/2.png, row 0, column 0"),
        (_break_mask_unchecked, "class out of range", "row 0, column 0"),
        (_empty_folder, "image folder is empty", "images"),
        (_no_class_list, "class list cannot be read", "classes.txt"),
    ],
)
def test_bad_data_is_one_message_and_exit_code_two(here, folder, capsys, spoil, what, where):
    more = spoil(folder)

    code = main(["run", "segmentation", "fit", *_on_folder(folder, *more)])

    message = capsys.readouterr().err
    assert code == 2
    assert message.count("error: ") == 1
    assert what in message
    assert where in message
    assert "fix: " in message
    assert "Traceback" not in message


def test_debug_shows_the_traceback(here, folder, capsys):
    _empty_folder(folder)

    code = main(["run", "segmentation", "--debug", *_on_folder(folder)])

    assert code == 2
    assert "image folder is empty" in (errors := capsys.readouterr().err)
    assert "Traceback" in errors


@pytest.mark.parametrize(
    ("args", "evidence", "fix"),
    [
        (["fti"], "'fti'", "did you mean 'fit'?"),
        (["--model.lrr=3"], "lrr", "--help"),
        (["--config", "nowhere.yaml"], "nowhere.yaml", "--help"),
        (["--data=FolderData"], "root", "--help"),
        (["--data=NoSuchData"], "NoSuchData", "--help"),
        (["--model.loss=hinge"], "hinge", "--help"),
        (["--model.ema_decay=1"], "1", "0.999"),
        ([*SMALL, "--trainer.callbacks=null", "--with=AtrosRates"], "", "did you mean 'AtrousRates'"),
        (["--trainer.callbacks=pl_normkit.callbacks.AtrousRates", "--with=AtrousRates"], "another one comes from `with:`", "once"),
        (["test"], "", "--ckpt_path"),
        (["test", "--ckpt_path=nowhere.ckpt"], "", ".ckpt"),
        ([*SMALL, "--trainer.callbacks=null", "--trainer.max_epochs=-1"], "", "--trainer.max_steps"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*NK501:pl_normkit.errors.NormkitWarning")  # the default network's own rates, on 6x6 cells
def test_wrong_options_are_one_error(here, capsys, args, evidence, fix):
    with pytest.raises(ConfigError) as caught:
        run(args)

    assert evidence in caught.value.evidence
    assert fix in caught.value.fix


def test_help_ends_with_code_zero(capsys):
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "predict" in shown
    assert "export --help" in shown
