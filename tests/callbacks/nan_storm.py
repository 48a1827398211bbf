"""The storm of test_nan_storm.py: a tiny net, and batches that carry the harm to be done to them. Started as a script, once per rank."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pl_normkit.callbacks.nan_guard import NaNGuard

SITES = ("input", "activation", "loss", "gradient", "statistics", "overflow", "selection", "average")
VALUES = (float("nan"), float("inf"), float("-inf"))


def plan(steps: int, world: int, share: float = 0.06, seed: int = 7) -> dict[int, dict[str, Any]]:
    """For each bad step: the site, the value, and the rank it strikes (-1: all ranks)."""
    chance = random.Random(seed)
    found: dict[int, dict[str, Any]] = {}
    for step in range(steps):
        if chance.random() < share:
            rank = chance.choice([-1, *range(world)])
            found[step] = {"site": chance.choice(SITES), "value": chance.choice(VALUES), "rank": rank}
    return found


class Stream:
    """Batches by step number; with `drop` those of bad steps are left out. Knows where it stands, so a run can resume in the middle."""

    def __init__(self, steps: int, rank: int, harm: dict[int, dict[str, Any]], drop: bool) -> None:
        self.steps = [step for step in range(steps) if not (drop and step in harm)]
        self.rank, self.harm, self.position = rank, harm, 0

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Any:
        while self.position < len(self.steps):
            step = self.steps[self.position]
            self.position += 1
            yield self.batch(step)
        self.position = 0

    def batch(self, step: int) -> dict[str, Any]:
        size = 2 + (step + self.rank) % 3  # uneven over ranks
        x = torch.randn(size, 6, generator=torch.Generator().manual_seed(2 * step + self.rank))
        harm = self.harm.get(step, {"site": "", "value": 0.0, "rank": -1})
        struck = harm["rank"] in (-1, self.rank)
        if struck and harm["site"] == "input":
            x[1, 2] = harm["value"]
        target = torch.nan_to_num(x, 0.0, 0.0, 0.0).sum(1, keepdim=True).sin()
        return {"x": x, "y": target, "site": harm["site"] if struck else "", "value": harm["value"], "step": step}

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class SpoilEntry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: float) -> Tensor:
        ctx.value = value
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        gradient.view(-1)[3] = ctx.value
        return gradient, None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.norm = nn.BatchNorm1d(12)
        self.last = nn.Linear(12, 1)
        self.register_buffer("average", torch.zeros(12))

    def forward(self, x: Tensor, site: str, value: float) -> Tensor:
        hidden = self.first(x)
        if site == "activation":
            hidden[0, 0] = value
        if site == "overflow":
            hidden = hidden * torch.tensor([1e20, 1e25, 1.0, 1.0]).view(4, 1)[: len(hidden)]
        hidden = self.norm(hidden).relu()
        self.average = (
            0.9 * self.average + 0.1 * hidden.detach().mean(0) + (value if site == "average" else 0.0)
        )  # another tensor each time
        if site == "statistics":
            self.norm(hidden.detach() * value)
        weight = SpoilEntry.apply(self.last.weight, value) if site == "gradient" else self.last.weight
        return F.linear(hidden, weight, self.last.bias)


class Module(pl.LightningModule):
    def __init__(self, *, logs: bool, sharded: bool, fused: bool = False) -> None:
        super().__init__()
        self.net = Net()
        self.fused = fused
        self.logs = logs
        self.sharded = sharded

    def configure_model(self) -> None:
        if self.sharded and not isinstance(self.net.first.weight, DTensor):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        out = self.net(batch["x"], batch["site"], batch["value"])
        kept = 0 if batch["site"] == "selection" else len(out)
        loss = F.mse_loss(out[:kept], batch["y"][:kept])  # with nothing selected NaN, and its gradients are zeros
        if batch["site"] == "loss":
            loss = loss + batch["value"]
        if batch["site"] == "spike":
            loss = loss * batch["value"]
        if self.logs:
            self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, fused=self.fused)


class Watch(pl.Callback):
    """After every optimizer step: is anything not finite? And, for the run that dies, the moment of its death."""

    def __init__(self, die_at: int) -> None:
        self.first_bad: int | None = None
        self.die_at = die_at

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # the window is open: its buffers are judged with its step
        tensors = [*pl_module.parameters(), *pl_module.buffers()]
        tensors += [value for entry in trainer.optimizers[0].state.values() for value in entry.values()]
        tensors = [part for tensor in tensors if (part := part_here(tensor)).numel()]
        norms = torch.stack(torch._foreach_norm([tensor.detach() for tensor in tensors if tensor.is_floating_point()], float("inf")))
        if self.first_bad is None and not bool(torch.isfinite(norms).all()):
            self.first_bad = int(batch["step"])
        if trainer.global_step == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)


def part_here(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that this rank holds; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def strategy_for(options: dict[str, Any]) -> Any:
    if options["world"] == 1:
        return "auto"
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(options["port"]), "WORLD_SIZE": str(options["world"])}
    os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(options["rank"])}
    timeout = timedelta(seconds=120)
    if options.get("sharded"):
        return ModelParallelStrategy(
            process_group_backend="gloo", timeout=timeout, data_parallel_size=options["world"], tensor_parallel_size=1
        )
    return DDPStrategy(process_group_backend="gloo", timeout=timeout)


def main(options: dict[str, Any]) -> None:
    rank, world, steps = options["rank"], options["world"], options["steps"]
    folder = Path(options["folder"])
    harm = plan(options["planned"], world, options.get("share", 0.06))
    harm |= {step: {"site": "spike", "value": 1e4, "rank": world - 1} for step in options.get("spikes", ())}
    torch.manual_seed(0)
    module = Module(logs=options["guard"] == "early", sharded=options.get("sharded", False), fused=options.get("fused", False))
    watch = Watch(options.get("die_at", -1))
    callbacks: list[pl.Callback] = [watch]
    guard = NaNGuard(**options.get("arguments", {}))
    if options["guard"] == "nan_guard":
        callbacks.append(guard)
    elif options["guard"] == "spike":
        callbacks.append(SpikeDetection(exclude_batches_path=str(folder / f"spike{rank}.json"), rtol=1e9))
    elif options["guard"] == "early":
        callbacks.append(EarlyStopping("train_loss", check_finite=True, check_on_train_epoch_end=True, patience=10**6))
    if options.get("checkpoint_every"):
        callbacks.append(ModelCheckpoint(folder, "step{step}", every_n_train_steps=options["checkpoint_every"], save_top_k=-1))
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=world, strategy=strategy_for(options), callbacks=callbacks,
        logger=CSVLogger(folder, name=options["name"]) if options.get("logger") else False,
        accumulate_grad_batches=options.get("accumulate", 1), use_distributed_sampler=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=bool(options.get("checkpoint_every")),
        default_root_dir=folder,
    )  # fmt: skip
    error = ""
    try:
        trainer.fit(module, Stream(steps, rank, harm, options["drop"]), ckpt_path=options.get("resume"))
    except Exception as caught:
        error = type(caught).__name__
    events = [
        {
            "batch": event["batch_index"],
            "ranks": event["ranks"],
            "kind": event["first"].kind,
            "module": event["first"].module,
            "op": event["first"].op,
        }
        for event in guard.events
    ]
    optimizer = {
        str(key): {name: part_here(value) for name, value in entry.items()}
        for key, entry in trainer.optimizers[0].state_dict()["state"].items()
    }
    model = {name: part_here(value) for name, value in module.state_dict().items()}
    torch.save({"model": model, "optimizer": optimizer}, folder / f"{options['name']}{rank}.pt")
    facts = {
        "first_bad": watch.first_bad,
        "events": events,
        "error": error,
        "global_step": trainer.global_step,
        "skips": guard.budget.skips,
        "spikes": guard.spikes,
        "files": [event["file"] for event in guard.events if event["file"]],
    }
    (folder / f"{options['name']}{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
