"""What a norm placement is worth on a model of transformers: BERT as a decoder, as it is and turned to DeepNorm by `place_norms`.

    python benchmarks/depth.py [--seeds 3] [--settings 3] [--steps 200] [--layers 12]

A byte language model (width 64, 4 heads, 64 bytes of context, 512 bytes a step, AdamW) on the standard library's source, every tenth
file held out. Each setting trains all arms from the same random weights on the same bytes. Writes benchmarks/results/depth.csv: a row a
run, with the held-out loss in nats a byte. About half a minute a run on one core.
"""

from __future__ import annotations

import argparse
import csv
import math
import sysconfig
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel

from pl_normkit import place_norms

OUT = Path(__file__).parent / "results" / "depth.csv"
CONTEXT, BATCH = 64, 8
SETTINGS = [(3e-3, 0), (1e-3, 0), (3e-3, 50)]
ARMS = {"post": "", "post and depth_init": "depth_init", "deepnorm": "deepnorm"}


def corpus() -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes held out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")) if "site-packages" not in path.parts]
    files = [path for path in files if not {"test", "idlelib", "encodings", "lib2to3"} & set(path.parts)]
    parts = [b"".join(path.read_bytes() for path in chosen) for chosen in ([f for i, f in enumerate(files) if i % 10], files[::10])]
    train, held_out = (torch.frombuffer(bytearray(part[:6_000_000]), dtype=torch.uint8).long() for part in parts)
    return train, held_out


def batch(data: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(0, len(data) - CONTEXT - 1, (count,), generator=generator)
    rows = data[starts[:, None] + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


def build(seed: int, layers: int, kind: str) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertLMHeadModel(BertConfig(**sizes, **dropout, num_hidden_layers=layers, is_decoder=True))
    if kind:
        place_norms(model, kind, {"input_ids": torch.zeros(2, CONTEXT, dtype=torch.long), "use_cache": False})
    return model


def loss_of(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(input_ids=rows[0], use_cache=False).logits.flatten(0, 1), rows[1].flatten())


def train(model: nn.Module, data: Tensor, rate: float, warmup: int, steps: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(1000 + seed)
    for step in range(steps):
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = rate * ((step + 1) / warmup if step < warmup else cosine)
        optimizer.zero_grad()
        loss_of(model, batch(data, BATCH, generator)).backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("seeds", 3), ("steps", 200), ("layers", 12), ("settings", len(SETTINGS))):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data, held_out = corpus()
    probe = batch(held_out, 128, torch.Generator().manual_seed(7))
    letters = torch.bincount(data, minlength=256).double() + 1
    print(f"letter frequencies alone: {-(letters / letters.sum()).log()[probe[1]].mean():.3f}")
    OUT.write_text("arm,lr,warmup,seed,loss,seconds\n", encoding="utf-8")
    for rate, warmup in SETTINGS[: options.settings]:
        for seed in range(options.seeds):
            for arm, kind in ARMS.items():
                model = build(seed, options.layers, kind)
                started = time.process_time()
                train(model, data, rate, warmup, options.steps, seed)
                with torch.no_grad():
                    loss = loss_of(model.eval(), probe).item()
                seconds = time.process_time() - started
                row = [arm, rate, warmup, seed, round(loss, 4), round(seconds, 1)]
                print(*row, sep=", ", flush=True)
                with OUT.open("a", newline="", encoding="utf-8") as file:  # a run that is stopped keeps its rows
                    csv.writer(file).writerow(row)


if __name__ == "__main__":
    main()
