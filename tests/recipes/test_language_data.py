"""Text on disk: parts that do not overlap, windows that follow the text, an order that depends on seed and epoch alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pl_normkit.errors import DataError
from pl_normkit.recipes.language import StandardLibrary, TextFolder, pack
from pl_normkit.recipes.language.corpus import BYTES, stdlib_files


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    root.mkdir()
    for number in range(12):
        (root / f"{number:02}.txt").write_text(f"text {number} " * 20)
    return root


def test_the_standard_library_is_split_without_overlap_and_without_its_tests() -> None:
    parts = stdlib_files()
    names = [path for files in parts.values() for path in files]
    assert len(names) == len(set(names))
    assert not any("test" in path.parts or "site-packages" in path.parts for path in names)
    assert 0.05 < len(parts["val"]) / len(names) < 0.15
    assert any(path.name == "ast.py" for path in names)


def test_packed_text_is_the_text(texts: Path, tmp_path: Path) -> None:
    files = sorted(texts.glob("*.txt"))
    tokens = pack(files, BYTES, tmp_path / "cache")
    whole = b"".join(path.read_bytes() + b"\n" for path in files)
    assert bytes(tokens.values) == whole
    assert isinstance(tokens.values, np.memmap)
    assert tokens.text_bytes == len(whole)
    assert BYTES.decode(BYTES.encode("a ü".encode()).tolist()) == "a ü"
    made = list((tmp_path / "cache").iterdir())
    pack(files, BYTES, tmp_path / "cache")
    assert sorted(made) == sorted((tmp_path / "cache").iterdir())
    files[0].write_text("other")
    assert bytes(pack(files, BYTES, tmp_path / "cache").values).startswith(b"other\n")


def test_targets_are_the_tokens_that_follow(texts: Path, tmp_path: Path) -> None:
    data = TextFolder(str(texts), length=8, batch_size=4, epoch_windows=16, eval_windows=3, cache_dir=str(tmp_path / "cache"))
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [tuple(x.shape) for x, _ in batches] == [(4, 8)] * 4
    for x, y in batches:
        assert torch.equal(x[:, 1:], y[:, :-1])
    [(held_out, _)] = list(data.val_dataloader())
    assert len(held_out) == 3
    text = bytes(data.sources["val"].values)
    assert text.startswith(bytes(held_out[0].tolist()))
    assert data.tokens_per_byte == 1


def test_the_order_depends_on_seed_and_epoch_alone(texts: Path, tmp_path: Path) -> None:
    def order(epoch: int, seed: int = 0) -> list[list[int]]:
        torch.manual_seed(seed)
        data = TextFolder(str(texts), length=8, batch_size=4, epoch_windows=16, cache_dir=str(tmp_path / "cache"))
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        torch.rand(3)
        return [row for x, _ in loader for row in x.tolist()]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, seed=1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"root": "nowhere"}, "there is no such folder"),
        ({"pattern": "*.md"}, "there is no text for"),
        ({"length": 10**6}, "the data option length"),
        ({"tokenizer": "none.json"}, "there is no such tokenizer"),
        ({"samples": 0}, "the data option samples"),
    ],
)
def test_what_cannot_be_used_is_said(options: dict[str, object], told: str, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=told):
        TextFolder(**{"root": str(texts), "cache_dir": str(tmp_path), **options}).setup("fit")  # type: ignore[arg-type]


def test_folders_named_for_parts_are_the_parts(texts: Path, tmp_path: Path) -> None:
    for part, text in (("train", "a"), ("val", "b"), ("test", "c")):
        (texts / part).mkdir()
        (texts / part / "one.txt").write_text(text * 50)
    data = TextFolder(str(texts), length=8, cache_dir=str(tmp_path / "cache"))
    data.setup("fit")
    data.setup("test")
    assert {part: set(bytes(tokens.values)) for part, tokens in data.sources.items()} == {
        part: set(f"{text}\n".encode()) for part, text in (("train", "a"), ("val", "b"), ("test", "c"))
    }


def test_the_built_in_corpus_needs_nothing() -> None:
    assert StandardLibrary().class_names == ["bytes"]
    assert StandardLibrary().vocab_size == 256
