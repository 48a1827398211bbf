"""Jobs that other processes run: some lose their process, once or always."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from pl_normkit.errors import ConfigError


def do(job: tuple[str, str]) -> Any:
    """What the first word says; the second is a folder in which jobs leave marks."""
    word, folder = job
    if word == "refuse":
        raise ConfigError("no such thing", where="there")
    if word == "break":
        raise ValueError("broken")
    if word == "lambda":
        return lambda: None
    if word == "hang":
        time.sleep(600)
    if word == "die" or (word == "die once" and not (Path(folder) / "died").exists()):
        if word == "die once":
            (Path(folder) / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"word": word, "process": os.getpid(), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "folder": str(Path.cwd())}
