"""Starts the scripts of this folder in two processes on the CPU, as torchrun would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_on_two_ranks(script: str, folder: Path, *words: str) -> list[dict[str, Any]]:
    """What `tests.callbacks.<script>` wrote into `rank0.json` and `rank1.json` of the folder, which is its first argument."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"NODE_RANK": "0", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"tests.callbacks.{script}", str(folder), *words]
    processes = []
    for rank in ("0", "1"):
        with (folder / f"log{rank}").open("w") as log:
            environment = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], (folder / "log0").read_text()[-2000:] + (folder / "log1").read_text()[-2000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
