"""Runs one training step of every library model and prints what the rules of the room wiring say of it; nothing is expected.

    python benchmarks/zoo_step.py [--only timm.resnet/] [--output benchmarks/results/zoo_step.csv]

One model of every timm family, every smp architecture, torchvision's models and small transformers, on random normalized images or
tokens and random targets, batches of 4. Images are as small as the model takes. Models with more than `--largest` parameters are left out.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.progress
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import SIZES, TORCHVISION, TORCHVISION_SEGMENTATION, Case, smp_cases, timm_cases

from pl_normkit import audit
from pl_normkit.graph.autograd import tensors_in

RESULTS = Path(__file__).parent / "results" / "zoo_step.csv"
BATCH = 4
COLUMNS = ["family", "model", "parameters", "seconds", "findings", "notes"]


@dataclass(frozen=True)
class Step:
    """A model in training mode, what it is called with, and the loss of what it gives."""

    family: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Iterator[Any]]


def image_steps() -> Iterator[Step]:
    import torchvision

    def build(name: str) -> nn.Module:
        without = {"weights_backbone": None} if name in TORCHVISION_SEGMENTATION else {}
        return torchvision.models.get_model(name, weights=None, **without)

    shipped = [
        Case(f"torchvision.{name}", name, "shipped", lambda name=name: build(name), (3, *2 * (SIZES.get(name, 224),)))
        for name in (*TORCHVISION, *TORCHVISION_SEGMENTATION)
    ]
    for case in (*timm_cases(), *smp_cases(), *shipped):
        if case.form == "shipped":
            yield Step(case.family, case.name, case.build, lambda model, case=case: _images(model, case))


def _images(model: nn.Module, case: Case) -> Iterator[Tensor]:
    """Small ones first, then of the size that the model was made for."""
    native = case.size or tuple(model.pretrained_cfg["input_size"])
    for side in (64, 128, native[-1]):
        if side <= native[-1]:
            yield torch.randn(BATCH, native[0], side, side)
    yield torch.randn(BATCH, *native)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
TOKENS = {
    "BertForSequenceClassification": SMALL,
    "BertForMaskedLM": SMALL,
    "RobertaForTokenClassification": SMALL,
    "ElectraForSequenceClassification": {**SMALL, "embedding_size": 32},
    "AlbertForSequenceClassification": {**SMALL, "embedding_size": 16},
    "DistilBertForSequenceClassification": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99},
    "DebertaV2ForSequenceClassification": SMALL,
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2},
    "GPTNeoXForCausalLM": SMALL,
    "OPTForCausalLM": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "LlamaForCausalLM": {**SMALL, "num_key_value_heads": 2},
    "MistralForCausalLM": {**SMALL, "num_key_value_heads": 2},
    "MixtralForCausalLM": {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4},
    "T5ForConditionalGeneration": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 99,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    },
    "BartForConditionalGeneration": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "vocab_size": 99,
        "pad_token_id": 1,
    },
}
PIXELS = {
    "ViTForImageClassification": {**SMALL, "image_size": 32, "patch_size": 8},
    "DeiTForImageClassification": {**SMALL, "image_size": 32, "patch_size": 8},
    "BeitForImageClassification": {**SMALL, "image_size": 32, "patch_size": 8},
    "ConvNextForImageClassification": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
    "ResNetForImageClassification": {"embedding_size": 8, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "SwinForImageClassification": {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [1, 2],
        "num_heads": [2, 4],
        "window_size": 2,
    },
    "MobileNetV2ForImageClassification": {"depth_multiplier": 0.35},
}


def transformer_steps() -> Iterator[Step]:
    import transformers

    for name, settings in (*TOKENS.items(), *PIXELS.items()):
        kind = getattr(transformers, name)
        inputs = _token_inputs if name in TOKENS else _pixel_inputs
        yield Step(f"transformers.{name}", name, lambda kind=kind, settings=settings: kind(kind.config_class(**settings)), inputs)


def _token_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    ids, mask = torch.randint(3, 99, (BATCH, 12)), torch.ones(BATCH, 12, dtype=torch.long)
    mask[1:, 9:] = 0
    labels = torch.randint(0, 2, (BATCH,)) if "SequenceClassification" in type(model).__name__ else ids % 2
    yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _pixel_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    yield {"pixel_values": torch.randn(BATCH, 3, 32, 32), "labels": torch.randint(0, 2, (BATCH,))}


def loss_of(output: Any) -> Tensor:
    """The model's own loss, else cross-entropy of every output with two dimensions and mean squared error of the others."""
    own = output.get("loss") if hasattr(output, "get") else None
    if own is not None:
        return own
    parts = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
    losses = [
        F.cross_entropy(part, torch.randint(0, part.shape[1], part.shape[:1] + part.shape[2:]))
        if part.dim() > 1 and part.shape[1] > 1
        else F.mse_loss(part, torch.randn_like(part))
        for part in parts
    ]
    return torch.stack(losses).sum()


def is_small(step: Step, largest: float) -> bool:
    """Told without memory; of the few that cannot be built so, all are."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in step.build().parameters()) <= largest
    except (NotImplementedError, RuntimeError):
        return True


def judge(step: Step, largest: float) -> dict[str, Any] | None:
    if not is_small(step, largest):
        return None
    torch.manual_seed(0)
    model = step.build().train()
    row: dict[str, Any] = {"family": step.family, "model": step.name, "parameters": sum(p.numel() for p in model.parameters())}
    failure = ""
    for inputs in step.inputs(model):
        try:
            loss = loss_of(model(**inputs) if isinstance(inputs, dict) else model(inputs))
            if not bool(torch.isfinite(loss)):
                raise ValueError("the loss is not finite")
        except Exception as error:
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            continue
        started = time.perf_counter()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        report = audit(model, inputs, loss=loss, optimizers=optimizer, select=["NK0"])
        row["seconds"] = round(time.perf_counter() - started, 2)
        row["findings"] = " | ".join(f"{f.code} {f.message} @ {', '.join(str(place) for place in f.places[:4])}" for f in report.findings)
        row["notes"] = " | ".join(" ".join(str(note).split()) for note in report.notes)
        return row
    return {**row, "notes": f"no step: {failure}"}


def main() -> int:
    """Exit status 1 when anything was said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of FAMILY/MODEL")
    parser.add_argument("--largest", type=float, default=60e6, help="number of parameters")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    steps = [step for step in (*transformer_steps(), *image_steps()) if options.only in f"{step.family}/{step.name}"]
    rows = []
    for step in rich.progress.track(steps, description="one step each"):
        row = judge(step, options.largest)
        if row is not None:
            rows.append(row)
            with options.output.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    said = [row for row in rows if row.get("findings")]
    print(f"{len(rows)} models, {len(said)} with findings; written to {options.output}")
    for row in said:
        print(f"  {row['family']} {row['model']}: {row['findings']}")
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main())
