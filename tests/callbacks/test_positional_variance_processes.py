"""Two processes on CPU with gloo, whose images differ: one ratio for the run, one warning."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def test_ranks_add_up_and_one_warns(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"NODE_RANK": "0", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.callbacks.positional_ranks", str(tmp_path)]
    processes = []
    for rank in ("0", "1"):
        with (tmp_path / f"log{rank}").open("w") as log:
            environment = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], (tmp_path / "log0").read_text()[-2000:] + (tmp_path / "log1").read_text()[-2000:]
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0]["rho"] == found[1]["rho"] == pytest.approx((0.25 + 1.0) / 2, abs=0.06)
    assert [rank["warnings"] for rank in found] == [1, 0]
