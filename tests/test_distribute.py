"""The files people install: one content gives the same bytes, whatever modes, owners and times the build left in them."""

from __future__ import annotations

import io
import runpy
import tarfile
import zipfile
from pathlib import Path

EPOCH = 1_700_000_000
DISTRIBUTE = runpy.run_path(str(Path(__file__).parents[1] / ".ci" / "distribute.py"))
FILES = {"pkg-1/b.py": b"x = 1\n", "pkg-1/a/c.py": b"", "pkg-1/PKG-INFO": b"Name: pkg\n"}


def write_wheel(path: Path, mode: int) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in FILES.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = mode << 16
            archive.writestr(member, content)


def write_sdist(path: Path, mode: int) -> None:
    with tarfile.open(path, "w:gz") as archive:
        folder = tarfile.TarInfo("pkg-1")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in sorted(FILES.items(), reverse=mode == 0o600):
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime, member.uname = len(content), mode, mode * 1000, f"user{mode}"
            archive.addfile(member, io.BytesIO(content))


def test_a_wheel_packed_anew_holds_the_same_files_and_nothing_of_the_machine(tmp_path: Path) -> None:
    paths = [tmp_path / "one.whl", tmp_path / "two.whl"]
    for path, mode in zip(paths, (0o100600, 0o100664), strict=True):
        write_wheel(path, mode)
        DISTRIBUTE["pack_wheel"](path, EPOCH)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with zipfile.ZipFile(paths[0]) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == FILES
        assert {member.external_attr >> 16 for member in archive.infolist()} == {0o100644}


def test_an_sdist_packed_anew_holds_the_same_files_and_nothing_of_the_machine(tmp_path: Path) -> None:
    paths = [tmp_path / "one.tar.gz", tmp_path / "two.tar.gz"]
    for path, mode in zip(paths, (0o600, 0o664), strict=True):
        write_sdist(path, mode)
        DISTRIBUTE["pack_sdist"](path, EPOCH)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with tarfile.open(paths[0]) as archive:
        assert {member.name: archive.extractfile(member).read() for member in archive} == FILES  # type: ignore[union-attr]
        assert {(member.mode, member.mtime, member.uname) for member in archive} == {(0o644, EPOCH, "")}
