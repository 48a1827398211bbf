"""The recipe from its commands: built-in data, folders of one's own, Middlebury's scenes, NYU v2's arrays, and what is wrong with them."""

import csv
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from upsampling_tree import write_map_pairs

from pl_normkit.cli import main
from pl_normkit.errors import DataError
from pl_normkit.nn import DeformableKernelNetwork
from pl_normkit.recipes.export import run_or_export
from pl_normkit.recipes.upsampling import RECIPE, FolderData, MiddleburyData, NYUData, StereoAndPlanes
from pl_normkit.recipes.upsampling.maps import read_map

run = partial(run_or_export, RECIPE)

QUICK = ["--trainer.enable_model_summary=false", "--trainer.callbacks=null", "--trainer.enable_progress_bar=false"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    write_map_pairs(tmp_path / "data", 5)
    return tmp_path / "data"


def _on_folder(folder: Path, *more: str) -> list[str]:
    small = ["--data.factor=4", "--data.crop_size=32", "--data.batch_size=2", "--data.num_workers=0"]
    return ["--data=FolderData", f"--data.root={folder}", *small, *QUICK, *more]


def _latest(here: Path) -> Path:
    return max((here / "runs" / "upsampling").iterdir(), key=lambda path: int(path.name.removeprefix("version_")))


def _column(version: Path, name: str) -> list[float]:
    with (version / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_the_default_run_is_audited_and_ends_with_one_table(here, capsys):
    small = ["--data.train_count=4", "--data.val_count=2", "--data.image_size=64", "--data.crop_size=32", "--trainer.max_steps=2"]
    assert run([*small, "--trainer.enable_progress_bar=false"]) == 0

    shown = capsys.readouterr().out
    assert re.search(r"x8, bicubic reduction, 6 px border", shown)
    rows = {name: re.search(rf"{re.escape(name)} +│ +([\d.]+) │ +([\d.]+)", shown) for name in ("bicubic", "joint bilateral", "FDKN")}
    assert all(rows.values())
    assert "findings:   0" in shown
    version = _latest(here)
    assert (version / "report.html").is_file()
    with Image.open(version / "validation.png") as sheet:
        assert sheet.width > 6 * 64
    score = [float(value) for value in rows["FDKN"].groups()]  # one stereo picture and two rooms
    assert _column(version, "val_rmse") == pytest.approx([(score[0] + 2 * score[1]) / 3], abs=1e-3)


def test_a_fit_without_a_validation_has_no_table(here, pairs, capsys):
    """What the sanity check has seen is no score."""
    assert run(["fit", *_on_folder(pairs, "--trainer.max_steps=1", "--trainer.check_val_every_n_epoch=9")]) == 0
    assert "RMSE" not in capsys.readouterr().out


def test_fit_resume_test_and_predict_on_a_folder(here, pairs, capsys):
    assert run(["fit", *_on_folder(pairs, "--trainer.max_steps=2")]) == 0
    first = _latest(here)
    last = first / "checkpoints" / "last.ckpt"
    assert run(["fit", *_on_folder(pairs, "--trainer.max_steps=4", f"--ckpt_path={last}")]) == 0
    resumed = torch.load(_latest(here) / "checkpoints" / "last.ckpt", weights_only=True)
    assert (resumed["global_step"], resumed["task"]) == (4, "x4, bicubic reduction")

    capsys.readouterr()
    assert run(["test", *_on_folder(pairs, f"--ckpt_path={last}")]) == 0
    assert f"{_column(first, 'val_rmse')[-1]:.3f}" in capsys.readouterr().out

    # Coarse maps of one's own, of a size that is no multiple of 4 once enlarged by 5.
    own = here / "own"
    write_map_pairs(own, 2, size=(35, 45))
    for path in (own / "maps").iterdir():
        with Image.open(path) as picture:
            small = picture.resize((9, 7), Image.Resampling.NEAREST)
        small.save(path)
    own_options = [f"--data.predict_dir={own}", "--data.factor=5", "--data.crop_size=20", "--maps.output_dir=out", "--maps.suffix=.png"]
    state = torch.load(last, weights_only=True)
    torch.save({**state, "task": "x5, bicubic reduction"}, here / "x5.ckpt")
    assert run(["predict", *_on_folder(pairs, *own_options, "--ckpt_path=x5.ckpt")]) == 0
    values = read_map(here / "out" / "0.png", None)
    assert values.shape == (35, 45)
    assert 900 < float(values.median()) < 2100

    with pytest.raises(DataError, match="another task") as caught:
        run(["test", *_on_folder(pairs, "--data.reduction=nearest", f"--ckpt_path={last}")])
    assert "x4, nearest reduction" in caught.value.evidence


def test_label_maps_are_scored_by_wrong_pixels_and_predicted_as_classes(here, capsys):
    write_map_pairs(here / "data", 5, classes=2)
    options = _on_folder(here / "data", "--data.classes=2", "--data.unknown=255", "--data.reduction=nearest")
    assert run([*options, "--trainer.max_steps=2"]) == 0
    assert "share of wrong pixels" in capsys.readouterr().out
    last = _latest(here) / "checkpoints" / "last.ckpt"
    assert run(["predict", *options, f"--ckpt_path={last}", "--maps.output_dir=out", "--maps.suffix=.npy"]) == 0
    found = {path.name: np.load(path) for path in (here / "out").iterdir()}
    assert len(found) == 1
    assert all(set(np.unique(values)) <= {0, 1} for values in found.values())


def test_a_checkpoint_is_exported_and_computes_the_same(here, pairs, capsys):
    runtime = pytest.importorskip("onnxruntime")
    assert run([*_on_folder(pairs, "--trainer.max_steps=1")]) == 0
    last = _latest(here) / "checkpoints" / "last.ckpt"
    for suffix in ("onnx", "pt"):
        assert main(["run", "upsampling", "export", f"--ckpt_path={last}", f"--to=out/map.{suffix}", "--size=32,48"]) == 0
    assert "guidance:   RGB in [0, 1]" in capsys.readouterr().out

    state = torch.load(last, weights_only=True)["state_dict"]
    network, plain = (DeformableKernelNetwork(fast=True).eval() for _ in range(2))
    network.load_state_dict({name.removeprefix("network."): value for name, value in state.items()})
    plain.load_state_dict(torch.load("out/map.pt", weights_only=True))
    guidance, start = torch.rand(3, 3, 32, 48), torch.rand(3, 1, 32, 48)
    with torch.no_grad():
        expected = network(guidance, start)
        assert torch.equal(plain(guidance, start), expected)
    session = runtime.InferenceSession("out/map.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["map"], {"guidance": guidance.numpy(), "start": start.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def _no_map(folder: Path) -> dict[str, Any]:
    (folder / "maps" / "3.png").unlink()
    return {}


def _wrong_size(folder: Path) -> dict[str, Any]:
    Image.fromarray(np.full((24, 32), 5, np.uint16)).save(folder / "maps" / "3.png")
    return {}


def _colours(folder: Path) -> dict[str, Any]:
    Image.fromarray(np.full((48, 64, 3), 5, np.uint8)).save(folder / "maps" / "3.png")
    return {}


def _nothing_known(folder: Path) -> dict[str, Any]:
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(folder / "maps" / "3.png")
    return {}


def _no_image(folder: Path) -> dict[str, Any]:
    (folder / "images" / "3.png").write_bytes(b"no picture")
    return {}


def _out_of_range(folder: Path) -> dict[str, Any]:
    return {"classes": 3}


def _no_multiple(folder: Path) -> dict[str, Any]:
    return {"crop_size": 30}


def _no_folder(folder: Path) -> dict[str, Any]:
    return {"root": str(folder / "nowhere")}


@pytest.mark.parametrize(
    ("spoil", "what", "where"),
    [
        (_no_map, "an image has no map", "images/3.png"),
        (_wrong_size, "another size than its image", "maps/3.png"),
        (_colours, "more than one channel", "maps/3.png"),
        (_nothing_known, "no known pixel", "maps/3.png"),
        (_no_image, "image cannot be read", "images/3.png"),
        (_out_of_range, "class out of range", "maps/"),
        (_no_multiple, "crop_size cannot be used", "--data.crop_size"),
        (_no_folder, "data folder is not there", "nowhere"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_before_training(pairs, spoil, what, where):
    options = {"root": str(pairs), "factor": 4, "crop_size": 32, **spoil(pairs)}
    with pytest.raises(DataError) as caught:
        FolderData(**options).build_sources(("train", "val"))
    assert what in caught.value.what
    assert where in caught.value.where
    assert caught.value.fix


def test_bad_data_is_one_message_and_exit_code_two(here, pairs, capsys):
    """A crop that is too large is seen in the first batch."""
    code = main(["run", "upsampling", "fit", *_on_folder(pairs), "--data.crop_size=64"])
    message = capsys.readouterr().err
    assert (code, message.count("error: ")) == (2, 1)
    assert "smaller than the crop" in message
    assert "fix: " in message
    assert "Traceback" not in message


def test_maps_to_predict_must_be_coarse(here, pairs, capsys):
    assert run([*_on_folder(pairs, "--trainer.max_steps=1")]) == 0
    last = _latest(here) / "checkpoints" / "last.ckpt"
    code = main(["run", "upsampling", "predict", *_on_folder(pairs, f"--data.predict_dir={pairs}", f"--ckpt_path={last}")])
    assert code == 2
    assert "not 4 times as large as its coarse map" in capsys.readouterr().err


def test_no_pixel_of_the_stereo_pair_is_on_both_sides_and_seeds_decide_planes():
    data = StereoAndPlanes(train_count=2, val_count=2, image_size=32)
    sources = data.build_sources(("train", "val"))
    train, val = (sources[part].read(0) for part in ("train", "val"))
    assert train.image.shape[-1] + val.image.shape[-1] == 741
    assert [sources["train"].group(index) for index in range(4)] == ["stereo", "stereo", "planes", "planes"]
    again = StereoAndPlanes(train_count=2, val_count=2, image_size=32).build_sources(("train",))["train"]
    other = StereoAndPlanes(seed=1, train_count=2, val_count=2, image_size=32).build_sources(("train",))["train"]
    assert torch.equal(sources["train"].read(3).map, again.read(3).map)
    assert not torch.equal(sources["train"].read(3).map, other.read(3).map)


def test_middlebury_scenes_of_all_years_are_found(tmp_path: Path):
    disparity = np.tile(np.arange(1, 41, dtype=np.uint8), (30, 1))
    for name, image, file in (("a", "im0.png", "disp0.pfm"), ("b/c", "view1.png", "disp1.png"), ("d", "im2.ppm", "disp2.pgm")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(folder / image)
        if file.endswith("pfm"):
            (folder / file).write_bytes(b"Pf\n40 30\n-1\n" + disparity[::-1].astype("<f4").tobytes())
        else:
            Image.fromarray(disparity).save(folder / file)
    sources = MiddleburyData(str(tmp_path), val_share=0.3, factor=4).build_sources(("train", "val"))
    found = {source.name(index): source.read(index) for source in sources.values() for index in range(len(source))}
    assert sorted(found) == ["a", "b/c", "d"]
    assert all(torch.equal(sample.map[0], torch.from_numpy(disparity).float()) for sample in found.values())
    with pytest.raises(DataError, match="no Middlebury scene"):
        MiddleburyData(str(tmp_path / "a"), factor=4).build_sources(("train",))


def test_nyu_arrays_are_read_and_checked(tmp_path: Path):
    images, depths = np.random.default_rng(0).random((3, 20, 24, 3)).astype(np.float32), np.ones((3, 20, 24), np.float32)
    depths[0, 0, 0] = 0
    for name, array in (
        ("train_images_split", images),
        ("train_depth_split", depths),
        ("test_images_v2", images),
        ("test_depth", depths[..., None]),
    ):
        np.save(tmp_path / f"{name}.npy", array)
    sources = NYUData(str(tmp_path)).build_sources(("train", "test"))
    for source in sources.values():
        sample = source.read(0)
        assert (sample.image.shape, sample.map.shape, len(source)) == ((3, 20, 24), (1, 20, 24), 3)
        assert int(sample.map.isnan().sum()) == 1
        assert int((sample.image.permute(1, 2, 0).float() - torch.from_numpy(images[0]) * 255).abs().max()) <= 1
    np.save(tmp_path / "test_depth.npy", depths[:, :10])
    with pytest.raises(DataError, match="do not fit together"):
        NYUData(str(tmp_path)).build_sources(("test",))
    (tmp_path / "test_depth.npy").unlink()
    with pytest.raises(DataError, match="depths are not there"):
        NYUData(str(tmp_path)).build_sources(("test",))
