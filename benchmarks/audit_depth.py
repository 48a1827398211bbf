"""How much of `torch.export` over all layers an audit of a deep decoder costs, whose like blocks are traced once.

    python benchmarks/audit_depth.py [--layers 80]

`audit(model, inputs)` over `torch.export.export(model, inputs, strict=False)` on a small Llama, in processor seconds, after a
warm-up of both on a shallow one. The findings are held against those of an audit that traces every block. Target: at most a third.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from pl_normkit import audit
from pl_normkit.graph import repeated

INPUTS = {"input_ids": torch.zeros(2, 6, dtype=torch.long)}


def build(layers: int) -> nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaModel(LlamaConfig(**sizes, num_hidden_layers=layers, use_cache=False)).train()


def seconds(work: Callable[[], object]) -> tuple[float, object]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def export(model: nn.Module) -> object:
    return torch.export.export(model, (), INPUTS, strict=False)


def findings(model: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    report = audit(model, INPUTS)
    return [(finding.code, tuple(place.module for place in finding.places)) for finding in report.findings]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80)
    layers = parser.parse_args().layers
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shallow, model = build(repeated.MIN_BLOCKS), build(layers)
    export(shallow)
    findings(shallow)
    audited, found = seconds(lambda: findings(model))
    exported, _ = seconds(lambda: export(model))
    repeated.MIN_BLOCKS = layers + 1
    whole, expected = seconds(lambda: findings(model))
    print(f"{layers} layers: export {exported:.2f} s, audit {audited:.2f} s (ratio {audited / exported:.2f}, target 0.33)")
    print(f"audit that traces every layer {whole:.2f} s; findings {'agree' if found == expected else 'DIFFER'}")


if __name__ == "__main__":
    main()
