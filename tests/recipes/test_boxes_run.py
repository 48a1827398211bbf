"""The recipe from its commands: all stages on built-in scenes and on a folder of one's own, resumed, tested, exported."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from boxes_tree import SIZE, write_boxed
from PIL import Image

from pl_normkit.cli import main
from pl_normkit.errors import ConfigError
from pl_normkit.recipes.boxes import RECIPE, CosineSegmenter
from pl_normkit.recipes.export import run_or_export

run = partial(run_or_export, RECIPE)

SMALL = [
    "--classifier.side=64",
    "--classifier.steps=2",
    "--classifier.batch_size=4",
    "--model.encoder_name=tu-test_resnet",
    "--model.model_options={encoder_depth: 3, decoder_channels: [16, 16, 16]}",
    "--trainer.max_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
QUICK = [*SMALL, "--trainer.callbacks=null"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _on_folder(folder: Path, *more: str) -> list[str]:
    small = ["--data.crop_size=64", "--data.batch_size=4", "--data.num_workers=0"]
    return ["--data=BoxFolderData", f"--data.root={folder}", *small, *QUICK, *more]


def _latest(here: Path) -> Path:
    return max((here / "runs" / "boxes").iterdir(), key=lambda path: int(path.name.removeprefix("version_")))


def test_one_command_runs_three_stages_under_audit_and_draws_them(here, capsys):
    small = ["--data.train_count=8", "--data.val_count=2", "--data.image_size=64", "--data.crop_size=64", "--data.batch_size=4"]
    assert run([*SMALL, *small]) == 0

    shown, version = capsys.readouterr().out, _latest(here)
    assert re.search(r"the two maps differ in [\d.]+% of the pixels", shown)
    assert all(re.search(rf"{re.escape(name)} +│ +0\.\d+", shown) for name in ("boxes filled", "first (refined)", "second (retrieval)"))
    assert re.search(r"mean \(mIoU\) +│ +[01]\.\d+", shown)
    told = re.findall(r"^  (NK\d+) .* at (.*)$", shown, re.MULTILINE)
    assert re.search(rf"findings: +{len(told)}$", shown, re.MULTILINE)
    assert len(told) == len(set(told)) > 0
    for kind in ("first", "second", "confidence", "attention"):
        assert len(list((version / "labels" / kind).iterdir())) == 8
    assert (version / "classifier.ckpt").is_file()
    with Image.open(version / "labels.png") as sheet:
        assert sheet.width > 6 * 64
    assert (version / "report.html").read_text(encoding="utf-8").count("data:image/png") == 2


def test_resume_reuse_test_predict_and_export_on_a_folder(here, capsys):
    folder = here / "data"
    write_boxed(folder, 6)
    assert run(["fit", *_on_folder(folder)]) == 0
    first = _latest(here)
    last = first / "checkpoints" / "last.ckpt"

    assert run(["fit", *_on_folder(folder, "--trainer.max_steps=2", f"--ckpt_path={last}")]) == 0
    resumed = _latest(here)
    assert torch.load(resumed / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert not (resumed / "labels").exists()  # it went on with those of the first run

    capsys.readouterr()
    assert run(["fit", *_on_folder(folder, f"--stages.classifier={first / 'classifier.ckpt'}", "--model.noise=ignored")]) == 0
    again = _latest(here)
    assert not (again / "classifier.ckpt").exists()
    for path in (first / "labels" / "first").iterdir():
        assert path.read_bytes() == (again / "labels" / "first" / path.name).read_bytes()

    assert run(["test", *_on_folder(folder, f"--ckpt_path={last}")]) == 0
    assert "mean (mIoU)" in capsys.readouterr().out
    assert (
        run(["predict", *_on_folder(folder, f"--data.predict_dir={folder / 'images'}", "--masks.output_dir=out", f"--ckpt_path={last}")])
        == 0
    )
    with Image.open(here / "out" / "0.png") as mask:
        assert (mask.size, set(np.unique(np.array(mask))) <= {0, 1, 2}) == (SIZE[::-1], True)
    assert main(["run", "boxes", "export", f"--ckpt_path={last}", "--to=out/model.pt"]) == 0
    assert "CosineSegmenter('Unet', 'tu-test_resnet', None, 3" in capsys.readouterr().out
    plain = CosineSegmenter("Unet", "tu-test_resnet", None, 3, encoder_depth=3, decoder_channels=[16, 16, 16])
    plain.load_state_dict(torch.load("out/model.pt", weights_only=True))
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        logits = plain.eval()(images)
    assert 0 < float(logits.abs().max()) <= 20.001
    for suffix in ("onnx", "pt2"):
        assert main(["run", "boxes", "export", f"--ckpt_path={last}", f"--to=out/model.{suffix}"]) == 0
    session = pytest.importorskip("onnxruntime").InferenceSession("out/model.onnx", providers=["CPUExecutionProvider"])
    for found in (session.run(["logits"], {"images": images.numpy()})[0], torch.export.load("out/model.pt2").module()(images).detach()):
        np.testing.assert_allclose(found, logits.numpy(), atol=1e-4)


def test_without_masks_it_trains_and_says_that_nothing_scores_it(here, capsys):
    folder = here / "data"
    write_boxed(folder, 5, form="txt", masks=False)
    assert run(_on_folder(folder)) == 0
    shown = capsys.readouterr().out
    assert "there are no masks to score them by" in shown
    assert "does not occur" in shown


@pytest.mark.parametrize(
    ("options", "what", "where"),
    [
        (["--classifier.side=50"], "cannot be squashed", "--classifier.side"),
        (["--classifier.encoder_name=resnet1"], "cannot build the encoder", "resnet1"),
        (["--stages.labels=nowhere"], "labels of an earlier run are not there", "nowhere"),
        (["--stages.classifier=data/classes.txt"], "classifier cannot be restored", "classes.txt"),
        (["--data.root=empty"], "class list cannot be read", "classes.txt"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_two(here, capsys, options, what, where):
    write_boxed(here / "data", 5)
    (here / "empty").mkdir()
    code = main(["run", "boxes", "fit", *_on_folder(here / "data"), *options])
    message = capsys.readouterr().err
    assert (code, message.count("error: ")) == (2, 1)
    assert what in message
    assert where in message
    assert "fix: " in message
    assert "Traceback" not in message


def test_the_classifier_of_other_classes_is_refused(here):
    write_boxed(here / "data", 5)
    assert run(_on_folder(here / "data")) == 0
    saved = _latest(here) / "classifier.ckpt"
    (here / "data" / "classes.txt").write_text("dog\ncat\n")
    with pytest.raises(ConfigError, match="other classes"):
        run(_on_folder(here / "data", f"--stages.classifier={saved}"))
