"""Started twice by test_decision.py: FSDP gradients (DTensor shards) and the one flag that makes both ranks agree."""

from __future__ import annotations

import math
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pl_normkit.methods.nan_safety.guard.decision import Verdict, gradients, measure, shared


def main(rank: int, port: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.ones(2, 4)).square().mean().backward()

    def finite(distributed: bool) -> bool:
        vector = measure([], gradients(optimizer), torch.zeros((), dtype=torch.bool), [], [])
        return not Verdict.of(shared(vector, distributed=distributed)).bad

    answers = [finite(True)]
    if rank == 1:
        gradients(optimizer)[0].view(-1)[0] = math.nan
    answers += [finite(False), finite(True)]
    print(answers)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
