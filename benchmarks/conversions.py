"""What exact conversions save: time of a forward pass before and after, in turns, and size. Writes results/conversions.csv.

    python benchmarks/conversions.py [--rounds 9]

Models have random weights and their usual widths with few blocks; the ratio of a round is free of what the machine does in the long run.
"""

from __future__ import annotations

import argparse
import copy
import csv
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import nn

from pl_normkit import fold_norms, to_crmsnorm, to_rmsnorm, to_scalenorm
from pl_normkit.errors import NothingMatchedError

RESULTS = Path(__file__).parent / "results" / "conversions.csv"
GAIN = 0.98
"""A gain is a median ratio below this with three of four rounds faster than before."""


def gpt2() -> tuple[nn.Module, Any]:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, vocab_size=1000, bos_token_id=0, eos_token_id=1))
    return model, {"input_ids": torch.randint(1000, (2, 64)), "use_cache": False}


def llama() -> tuple[nn.Module, Any]:
    config = transformers.LlamaConfig(hidden_size=512, intermediate_size=1376, num_hidden_layers=2, num_attention_heads=8, vocab_size=1000)
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(1000, (2, 64)), "use_cache": False}


def vit() -> tuple[nn.Module, Any]:
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_hidden_layers=2)), {
        "pixel_values": torch.randn(1, 3, 224, 224)
    }


def timm_deit() -> tuple[nn.Module, Any]:
    return timm.create_model("deit_tiny_patch16_224", depth=4), torch.randn(2, 3, 224, 224)


MODELS = {"gpt2": gpt2, "llama": llama, "vit": vit, "timm deit_tiny": timm_deit}


def rms(model: nn.Module, inputs: Any) -> None:
    to_rmsnorm(model, inputs)


def fold(model: nn.Module, inputs: Any) -> None:
    fold_norms(model, inputs, keep_keys=False)


def both(model: nn.Module, inputs: Any) -> None:
    to_rmsnorm(model, inputs)
    fold_norms(model, inputs, keep_keys=False)


def crms(model: nn.Module, inputs: Any) -> None:
    to_crmsnorm(model, inputs)


def scale(model: nn.Module, inputs: Any) -> None:
    if any(isinstance(module, nn.LayerNorm) for module in model.modules()):
        to_rmsnorm(model, inputs)
    to_scalenorm(model, inputs)


CONVERSIONS: dict[str, Callable[[nn.Module, Any], None]] = {
    "fold_norms": fold,
    "to_rmsnorm": rms,
    "both": both,
    "to_crmsnorm": crms,
    "to_scalenorm": scale,
}


def converted(make: Callable[[], tuple[nn.Module, Any]]) -> tuple[dict[str, nn.Module], Any]:
    """The model as it is and after each conversion that its graph allows."""
    model, inputs = make()
    models = {"": model.eval()}
    for name, convert in CONVERSIONS.items():
        candidate = copy.deepcopy(model)
        try:
            convert(candidate, inputs)
        except NothingMatchedError:
            continue
        models[name] = candidate
    return models, inputs


@torch.inference_mode()
def seconds(model: nn.Module, inputs: Any) -> float:
    start = time.perf_counter()
    model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return time.perf_counter() - start


def rows_of(name: str, rounds: int) -> list[dict[str, Any]]:
    models, inputs = converted(MODELS[name])
    ratios: dict[str, list[float]] = {kind: [] for kind in models if kind}
    for number in range(-2, rounds):  # the first rounds warm up
        taken = {kind: seconds(models[kind], inputs) for kind in random.sample(sorted(models), k=len(models))}
        if number >= 0:
            for kind, found in ratios.items():
                found.append(taken[kind] / taken[""])
    return [_row(name, kind, found, size(models[kind]) / size(models[""])) for kind, found in ratios.items()]


def size(model: nn.Module) -> int:
    """Bytes of the parameters, shared ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _row(name: str, kind: str, ratios: list[float], size_ratio: float) -> dict[str, Any]:
    low, median, high = statistics.quantiles(ratios, n=4)
    verdict = "gain" if median < GAIN and high < 1 else "no gain here"
    row = {"model": name, "conversion": kind, "ratio": round(median, 3), "low": round(low, 3), "high": round(high, 3), "verdict": verdict}
    row["size"] = f"{size_ratio:.5f}"
    print(f"| {name} | `{kind}` | {median:.3f} | {low:.3f} to {high:.3f} | {size_ratio:.5f} | {verdict} |")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("| model | conversion | time, median ratio | quartiles | size | |\n|---|---|---|---|---|---|")
    rows = [row for name in MODELS for row in rows_of(name, rounds)]
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
