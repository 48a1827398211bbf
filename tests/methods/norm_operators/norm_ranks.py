"""One rank: a training step of norms with batch statistics on its part of the tokens, and one of every operator under DDP.

Started by `test_norm_ranks.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from pl_normkit import norm_inputs, swap_norms
from tests.methods.norm_operators.operator_nets import ALL, given, made

NORMS = ("powernorm", "unified", "prepbn", "fixed_std")
WIDTH = 5


def batch(rank: int) -> tuple[Tensor, Tensor]:
    """Tokens of a rank, and which of them count: ranks differ in both."""
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(rank), dtype=torch.float64) * (1 + rank)
    return x.requires_grad_(), torch.tensor([True, True, rank == 0])


def steps(to: str, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers after two steps on the same tokens."""
    model = nn.Sequential(nn.LayerNorm(WIDTH)).double()
    swap_norms(model, to, **({"warmup": 1} if to in ("powernorm", "unified") else {}))
    if to == "prepbn":
        model[0].share.fill_(0.25)
    for _ in range(2):
        with norm_inputs(model, mask=mask):
            y = model(x)
            x.grad = None
            (y * torch.arange(WIDTH)).square()[mask].sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "gradient": x.grad, **dict(model.named_buffers())}


def ddp_step(to: str, rank: int) -> dict[str, Tensor]:
    """Parameters after a step of DDP in which ranks have other samples; DDP raises for a parameter without a gradient."""
    torch.manual_seed(0)
    model, x = made(to)
    x = x * (1 + rank)
    with given(model, len(x)):
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            wrapped(x).square().mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(0.01 * parameter.grad)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    distributed.init_process_group("gloo", store=distributed.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    torch.save({to: steps(to, *batch(rank)) for to in NORMS}, folder / f"{rank}.pt")
    torch.save({to: ddp_step(to, rank) for to in ALL}, folder / f"ddp{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
