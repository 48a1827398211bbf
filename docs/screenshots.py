"""Takes the pictures of report pages in docs/: a failing lint, and the page of a run that is given.

    pl-normkit run segmentation                      # what `make demo` does
    python docs/screenshots.py runs/segmentation/version_0/report.html

Chromium must be installed. The pictures keep 128 colours, so that they stay small.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from pl_normkit.cli import main as pl_normkit

DOCS = Path(__file__).parent
LINT = ["lint", "smp:DeepLabV3Plus", "--input", "3,512,512", "--optimizer", "torch.optim.AdamW(lr=1e-3, weight_decay=0.05)"]


def shoot(page: Path, picture: Path, width: int, height: int) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("Chromium is not installed")
    with tempfile.TemporaryDirectory() as profile:
        flags = ["headless", "no-sandbox", "disable-gpu", "no-first-run", "hide-scrollbars", f"user-data-dir={profile}"]
        flags += [f"window-size={width},{height}", f"screenshot={picture}"]
        command = [browser, *(f"--{flag}" for flag in flags), page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    Image.open(picture).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(picture, optimize=True)


def main(run: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "lint.html")
        pl_normkit([*LINT, "--format", "html", "--output", str(page)])
        shoot(page, DOCS / "report_of_lint.png", 1000, 1000)
    shoot(run, DOCS / "report_of_run.png", 1000, 1300)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
