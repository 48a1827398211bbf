"""Build the wheel and the sdist so that the same commit gives the same bytes, whatever machine, umask and clock.

    python .ci/distribute.py dist        needs `pip install build`; times come from SOURCE_DATE_EPOCH, else from the commit

setuptools takes file modes from the checkout, and in the sdist times and owners too: both files are packed anew without them.
"""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(folder: Path) -> None:
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or subprocess.check_output(["git", "-C", ROOT, "log", "-1", "--format=%ct"]))
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch)})
    for path in folder.glob("pl_normkit-*.whl"):
        pack_wheel(path, epoch)
    for path in folder.glob("pl_normkit-*.tar.gz"):
        pack_sdist(path, epoch)


def pack_wheel(path: Path, epoch: int) -> None:
    """The same files in their order, readable by all."""
    with zipfile.ZipFile(path) as archive:
        contents = [(member.filename, archive.read(member)) for member in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents:
            member = zipfile.ZipInfo(name, time.gmtime(epoch)[:6])
            member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, 0o100644 << 16
            archive.writestr(member, content)


def pack_sdist(path: Path, epoch: int) -> None:
    """The same files by name, of nobody."""
    with tarfile.open(path) as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}  # type: ignore[union-attr]
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", mtime=epoch, fileobj=raw) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode = len(content), epoch, 0o644
            archive.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
