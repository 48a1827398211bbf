"""Two processes with half of the tokens each compute what one process computes with all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tests.methods.norm_operators.norm_ranks import NORMS, batch, steps
from tests.methods.norm_operators.operator_nets import ALL


def test_statistics_are_those_of_all_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.methods.norm_operators.norm_ranks"]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"ddp{rank}.pt") for rank in (0, 1))
    assert set(first) == set(ALL)
    torch.testing.assert_close(second, first, rtol=0, atol=0)  # gradients are those of all ranks
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    (x0, mask0), (x1, mask1) = batch(0), batch(1)
    for to in NORMS:
        whole = steps(to, torch.cat([x0, x1]).detach().requires_grad_(), torch.cat([mask0, mask1]))
        for name, expected in whole.items():
            parts = [rank[to][name] for rank in found]
            if name in ("y", "gradient"):
                torch.testing.assert_close(
                    torch.cat(parts), expected, rtol=1e-10, atol=1e-10, msg=lambda text, at=(to, name): f"{at}: {text}"
                )
            else:
                for part in parts:
                    torch.testing.assert_close(part, expected, rtol=1e-10, atol=1e-10, msg=lambda text, at=(to, name): f"{at}: {text}")
