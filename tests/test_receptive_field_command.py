"""`pl-normkit erf`: images from a folder, the picture, the numbers, and one message for bad input."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from pl_normkit.cli import main
from pl_normkit.receptive_field.images import Transform, image_files, transform_of

SPEC = "torchvision:resnet18"


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photographs of noise in two folders, and a file that is none."""
    generator = np.random.default_rng(0)
    (tmp_path / "photos" / "b").mkdir(parents=True)
    for name, mode in (("c.jpg", "RGB"), ("b/a.png", "L"), ("b/d.PNG", "RGBA")):
        pixels = generator.integers(0, 255, (70, 90, len(Image.new(mode, (1, 1)).getbands())), dtype=np.uint8)
        Image.fromarray(pixels.squeeze(), mode=None).convert(mode).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def test_it_writes_the_picture_and_prints_the_numbers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "erf.png"
    code = main(["erf", SPEC, "--images", str(folder), "--out", str(out), "--input", "3,64,96", "--layer", "layer2", "--position", "3,4"])
    printed = capsys.readouterr()
    assert (code, printed.err, size_of(out)) == (0, "", (96, 64))
    assert printed.out.startswith("effective receptive field of layer2 at (3, 4) of (8, 12)\n  images: 3\n  unit (y, x): (27.5, 35.5)\n")
    for name in ("radius holding 50 %", "radius holding 90 %", "anisotropy", "share of the crop holding 90 %", "Gaussian r^2"):
        assert f"  {name}: " in printed.out


def test_timm_knows_its_own_size_and_max_images_counts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["erf", "timm:test_vit", "--images", str(folder), "--out", str(tmp_path / "e.png"), "--max-images", "2", "--absolute"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[1] == "  images: 2"
    assert size_of(tmp_path / "e.png") == (160, 160)


BAD = {
    "no folder": (["--images", "{tmp}/nothing"], "there is no such folder of images"),
    "empty folder": (["--images", "{tmp}/empty"], "the folder holds no images"),
    "no image": (["--images", "{tmp}/broken"], "the image cannot be read\n  where: {tmp}/broken/bad.png"),
    "layer": (["--layer", "layr2"], "did you mean 'layer2'?"),
    "position": (["--position", "3"], "--position '3' is no cell"),
    "outside": (["--position", "3,40"], "position (3, 40) is outside the map"),
    "channels": (["--input", "2,64,64"], "image files have 1 or 3 channels"),
    "shape": (["--input", "3x64"], "--input '3x64' is no shape"),
    "limit": (["--max-images", "0"], "max_images must be a positive whole number"),
    "out": (["--out", "{tmp}/missing/erf.png"], "the picture cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_error(case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    words, message = BAD[case]
    given = [word.format(tmp=tmp_path) for word in words]
    code = main(["erf", SPEC, "--images", str(folder), "--out", str(tmp_path / "e.png"), "--input", "3,64,64", *given])
    printed = capsys.readouterr()
    assert (code, printed.out, printed.err.count("error: ")) == (2, "", 1)
    assert message.format(tmp=tmp_path) in printed.err


def test_a_truncated_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    assert main(["erf", SPEC, "--images", str(tmp_path), "--out", str(tmp_path / "e.png"), "--input", "3,64,64"]) == 2
    assert f"where: {tmp_path / 'a.png'}" in capsys.readouterr().err


def test_files_come_sorted(folder: Path) -> None:
    assert [str(path.relative_to(folder)) for path in image_files(folder)] == ["b/a.png", "b/d.PNG", "c.jpg"]


@pytest.mark.parametrize("size", [(90, 70), (70, 90), (224, 224), (300, 301)])
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_the_transform_is_timms_evaluation_transform(name: str, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    expected = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))(picture)
    torch.testing.assert_close(transform_of(model, (3, 224, 224))(picture), expected, rtol=0, atol=1e-6)


def test_the_whole_of_the_short_side_and_grey() -> None:
    picture = Image.fromarray(np.arange(4 * 8, dtype=np.uint8).reshape(4, 8))
    image = Transform((4, 4), (0.0,), (1.0,))(picture)
    assert torch.equal(image[0] * 255, torch.arange(32.0).reshape(4, 8)[:, 2:6])
    assert transform_of(torch.nn.Identity(), (1, 8, 8)).mean == (0.5,)


def test_the_command_line_imports_no_image_library() -> None:
    import subprocess

    code = "import sys, pl_normkit.cli; print([name for name in ('PIL', 'matplotlib', 'timm', 'scipy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
