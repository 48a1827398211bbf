"""What one process of a two-process run with `GaussianBias` does; started by test_gaussian_bias.py with torchrun's environment."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import GaussianBias


def network(name: str = "vit_tiny_patch16_224") -> nn.Module:
    torch.manual_seed(0)
    built = timm.create_model(name, img_size=16, patch_size=4, depth=2, embed_dim=24, num_heads=2, num_classes=3)
    for parameter in built.parameters():  # with the library's small start the bias hardly moves in two steps
        nn.init.normal_(parameter, std=0.2)
    return built


class Module(pl.LightningModule):
    """`style`: "plain"; "sharded" shards in configure_model, "late" also builds there."""

    def __init__(self, style: str, name: str = "vit_tiny_patch16_224") -> None:
        super().__init__()
        self.style, self.name = style, name
        if style != "late":
            self.net = network(name)

    def configure_model(self) -> None:
        if self.style == "late":
            self.net = network(self.name)
        if self.style != "plain":
            for block in self.net.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def run(kind: str) -> dict[str, Any]:
    """The parameters of the biases after two steps, or the error."""
    module = Module({"fsdp2_heads": "sharded", "fsdp2_relpos": "sharded", "fsdp2_late": "late"}.get(kind, "plain"),
                    "vit_relpos_small_patch16_224" if "relpos" in kind else "vit_tiny_patch16_224")  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(16, 3, 16, 16, generator=generator), torch.randint(3, (16,), generator=generator))
    strategy: Any = DDPStrategy(process_group_backend="gloo")
    if "fsdp2" in kind:
        strategy = ModelParallelStrategy(process_group_backend="gloo", data_parallel_size=2, tensor_parallel_size=1)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    callback = GaussianBias(per_head="head" in kind, sigma=2.0)
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=2, callbacks=[callback], **quiet)
    module.eval()
    try:
        trainer.fit(module, DataLoader(data, batch_size=4))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {name: _whole(parameter) for name, parameter in module.named_parameters() if "gaussian_bias" in name}


def _whole(parameter: Tensor) -> list[float]:
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.detach().tolist()


if __name__ == "__main__":
    folder, *kinds = sys.argv[1:]
    found = {kind: run(kind) for kind in kinds}
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
