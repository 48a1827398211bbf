"""Texts as one long row of tokens on disk, which every process maps into memory."""

from __future__ import annotations

__all__ = ["BYTES", "Tokens", "Vocabulary", "folder_files", "pack", "read_vocabulary", "stdlib_files"]

import hashlib
import importlib
import os
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pl_normkit.errors import DataError
from pl_normkit.recipes.loading import Part

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "turtledemo"}
_PARTS: tuple[Part, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Vocabulary:
    """What tokens there are.

    Attributes:
        name: "bytes", or the file of a tokenizer.
        size: number of tokens.
        encode: from the bytes of a text to tokens.
        decode: from tokens to text.
    """

    name: str
    size: int
    encode: Callable[[bytes], np.ndarray[Any, Any]]
    decode: Callable[[Sequence[int]], str]


BYTES = Vocabulary(
    "bytes", 256, lambda text: np.frombuffer(text, dtype=np.uint8), lambda tokens: bytes(tokens).decode("utf-8", errors="replace")
)


@dataclass(frozen=True)
class Tokens:
    """A row of tokens on disk.

    Attributes:
        values: mapped into memory.
        text_bytes: how many bytes of text they stand for.
    """

    values: np.ndarray[Any, Any]
    text_bytes: int


def read_vocabulary(tokenizer: str | None) -> Vocabulary:
    """Bytes, or what a `tokenizer.json` of Hugging Face's tokenizers has. Raises DataError."""
    if tokenizer is None:
        return BYTES
    if not Path(tokenizer).is_file():
        raise DataError("there is no such tokenizer", where="--data.tokenizer", evidence=tokenizer, fix="give a tokenizer.json")
    try:
        library = importlib.import_module("tokenizers")
        made = library.Tokenizer.from_file(tokenizer)
    except ImportError as error:
        raise DataError("a tokenizer file needs tokenizers", where="--data.tokenizer", fix="pip install tokenizers") from error
    except Exception as error:  # the library raises bare exceptions
        raise DataError("the tokenizer cannot be read", where=tokenizer, evidence=str(error), fix="give a tokenizer.json") from error
    return Vocabulary(
        Path(tokenizer).name,
        made.get_vocab_size(),
        lambda text: np.asarray(made.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False).ids),
        lambda tokens: str(made.decode(list(tokens))),
    )


def stdlib_files() -> dict[Part, list[Path]]:
    """The Python source of the standard library, which every Python has: each tenth file for validation, the one after it for the test."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if not _SKIPPED & set(path.relative_to(root).parts)]
    if len(files) < 20:
        raise DataError("this Python has no source of its standard library", where=str(root), fix="give text files: --data=TextFolder")
    return _split(files, root)


def folder_files(root: Path, pattern: str) -> dict[Part, list[Path]]:
    """Files below `root`: those of its folders train, val and test where they are there, else split by file. Raises DataError."""
    if not root.is_dir():
        raise DataError("there is no such folder", where="--data.root", evidence=str(root), fix="give a folder of text files")
    if all((root / part).is_dir() for part in _PARTS):
        found = {part: [path for path in sorted((root / part).rglob(pattern)) if path.is_file()] for part in _PARTS}
    else:
        found = _split([path for path in sorted(root.rglob(pattern)) if path.is_file()], root)
    for part, files in found.items():
        if not files:
            fix = "give ten files or more, folders train, val and test, or another --data.pattern"
            raise DataError(f"there is no text for {part}", where=str(root), evidence=f"{pattern} finds too few files", fix=fix)
    return found


def _split(files: Sequence[Path], root: Path) -> dict[Part, list[Path]]:
    """By the digest of the path, so that a file that comes or goes moves no other; a few files in order."""
    parts: dict[Part, list[Path]] = {"train": [], "val": [], "test": []}
    for index, path in enumerate(files):
        digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
        place = digest[0] % 10 if len(files) >= 100 else index % 10
        parts["val" if place == 1 else "test" if place == 2 else "train"].append(path)
    return parts


def pack(files: Sequence[Path], vocabulary: Vocabulary, folder: Path | None = None) -> Tokens:
    """All files one after the other, a line end between them, as tokens in a file of `folder`; made once for the same files.

    Raises DataError where a file cannot be read.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"pl_normkit_{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    dtype = np.dtype(np.uint8 if vocabulary.size <= 2**8 else np.uint16 if vocabulary.size <= 2**16 else np.uint32)
    path = folder / f"{_digest(files, vocabulary)}.{dtype.name}"
    size = path.with_suffix(".bytes")
    if not (path.is_file() and size.is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        _write(files, vocabulary, path, size, dtype)
    return Tokens(np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype), int(size.read_text()))


def _digest(files: Sequence[Path], vocabulary: Vocabulary) -> str:
    digest = hashlib.sha256(f"{vocabulary.name} {vocabulary.size}".encode())
    for path in files:
        try:
            state = path.stat()
        except OSError as error:
            raise DataError(
                "a text cannot be read", where=str(path), evidence=str(error), fix="take it out, or make it readable"
            ) from error
        digest.update(f"{path} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def _write(files: Sequence[Path], vocabulary: Vocabulary, path: Path, size: Path, dtype: np.dtype[Any]) -> None:
    """Under another name first: of several processes each finds a whole file or none."""
    total = 0
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    with draft.open("wb") as file:
        for source in files:
            try:
                text = source.read_bytes().rstrip(b"\n") + b"\n"
            except OSError as error:
                draft.unlink()
                raise DataError("a text cannot be read", where=str(source), evidence=str(error), fix="make it readable") from error
            total += len(text)
            file.write(vocabulary.encode(text).astype(dtype).tobytes())
    note = size.with_name(f"{size.name}.{os.getpid()}")
    note.write_text(str(total))
    note.replace(size)
    draft.replace(path)
