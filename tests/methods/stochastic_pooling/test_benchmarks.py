"""What the benchmarks prove without a GPU: the kernels compile well, and the script for the GPU runs from end to end."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of the benchmarks, in a Python without segmentation-models-pytorch."""
    script, *rest = arguments
    code = f"""
import runpy, sys
sys.modules["segmentation_models_pytorch"] = None
sys.argv = {[script, *rest]!r}
runpy.run_path({str(BENCHMARKS / script)!r}, run_name="__main__")
"""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=600
    )


def test_kernels_compile_for_three_gpus_without_spills_in_128_registers() -> None:
    done = run("stochastic_pooling_kernels.py", "--sample")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()]
    assert {(row[1], row[5]) for row in rows} >= {
        (kernel, layout) for kernel in ("_pool_large", "_pool_small", "_spread") for layout in ("channels-last", "NCHW")
    }
    assert {row[0] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    for row in rows:
        kernel, layout, registers, spilled = row[1], row[5], int(row[9]), int(row[10])
        loads, stores = row[12], row[13]
        assert registers <= 128
        assert spilled == 0
        if layout == "channels-last" and kernel.startswith("_pool"):
            assert "128:" in loads, row
        if kernel == "_spread" and (layout == "channels-last" or row[4].endswith("28x28")):
            assert "16:" not in stores, row


def test_spills_and_too_many_registers_are_faults() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
from stochastic_pooling_kernels import faults
cases = ((0, 128, "sm_80"), (8, 40, "sm_90"), (0, 129, "sm_100"), (0, 256, "gfx942"), (0, 257, "gfx942"))
rows = [{{"spilled bytes": spilled, "registers": registers, "target": target}} for spilled, registers, target in cases]
print([row["registers"] for row in faults(rows)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[40, 129, 257]"


def test_the_script_for_the_gpu_runs_whole_on_the_cpu_without_smp(tmp_path: Path) -> None:
    done = run("gpu.py", "--rehearse", "--out", str(tmp_path / "gpu.csv"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = list(csv.DictReader((tmp_path / "gpu.csv").read_text().splitlines()))
    assert {row["section"] for row in rows} == {"correctness", "graphs", "nan_guard", "pooling", "memory", "gaussian_bias", "compiled_form"}
    assert [row for row in rows if row["quantity"] in ("failed", "not reached")] == []
    assert {row["value"] for row in rows if row["quantity"] == "held"} == {"True"}


def test_the_script_for_the_gpu_ends_in_time_and_says_what_it_left_out(tmp_path: Path) -> None:
    done = run("gpu.py", "--rehearse", "--out", str(tmp_path / "gpu.csv"), "--minutes", "0")
    assert done.returncode == 1
    rows = list(csv.DictReader((tmp_path / "gpu.csv").read_text().splitlines()))
    assert {row["section"] for row in rows if row["quantity"] == "not reached"} >= {"correctness", "pooling", "gaussian_bias"}


def test_the_script_for_the_gpu_names_what_is_missing(tmp_path: Path) -> None:
    done = run("gpu.py", "--out", str(tmp_path / "gpu.csv"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stderr.strip() == "cannot run: torch sees no CUDA device"
    assert not (tmp_path / "gpu.csv").exists()
