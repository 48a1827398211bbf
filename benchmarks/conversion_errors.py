"""How exact the conversions are, and what they save in size, on real architectures. Writes results/conversion_errors.csv.

    python benchmarks/conversion_errors.py [--only NAME ...]          # about five minutes of one core

Classes are those of transformers, timm and torchvision with few and narrow blocks; weights are random, moved away from the scales of 1
and shifts of 0 that they start with. The error is the largest difference of the outputs over their largest value, on inputs that the
conversion has not seen. Size counts the parameters, shared ones once.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pl_normkit import fold_norms, to_crmsnorm, to_rmsnorm, to_scalenorm
from pl_normkit.errors import NormkitError
from pl_normkit.methods.norm_operators.modules import CompressedRMSNorm, ShiftedRMSNorm
from pl_normkit.methods.norm_operators.operators.scalenorm import ScaleNorm
from pl_normkit.norm_modules import is_written_rms_norm

RESULTS = Path(__file__).parent / "results" / "conversion_errors.csv"
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WORDS = {**SIZES, "vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
IMAGES = {**SIZES, "image_size": 32, "patch_size": 8, "num_labels": 5}
TIMM = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 4, "num_classes": 5}
T = transformers


Conversion = Callable[[nn.Module, Any], Any]


def _ids() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 60, (2, 9)), "use_cache": False}


def _image() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


def _pixels() -> dict[str, Any]:
    return {"pixel_values": _image()}


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **TIMM, **options)


def _torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(48, 4, 64, batch_first=True, norm_first=True, dropout=0.0)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(48), enable_nested_tensor=False), nn.Linear(48, 5))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "transformers GPT-2": (
        lambda: T.GPT2LMHeadModel(T.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=60, bos_token_id=0, eos_token_id=1)),
        _ids,
    ),
    "transformers GPT-NeoX": (lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**WORDS)), _ids),
    "transformers OPT": (lambda: T.OPTForCausalLM(T.OPTConfig(**WORDS, ffn_dim=64, word_embed_proj_dim=48)), _ids),
    "transformers Bloom": (lambda: T.BloomForCausalLM(T.BloomConfig(hidden_size=48, n_layer=2, n_head=4, vocab_size=60)), _ids),
    "transformers Phi": (lambda: T.PhiForCausalLM(T.PhiConfig(**WORDS)), _ids),
    "transformers Llama": (lambda: T.LlamaForCausalLM(T.LlamaConfig(**WORDS)), _ids),
    "transformers Mistral": (lambda: T.MistralForCausalLM(T.MistralConfig(**WORDS, num_key_value_heads=2)), _ids),
    "transformers Qwen2": (lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**WORDS, num_key_value_heads=2)), _ids),
    "transformers ViT": (lambda: T.ViTForImageClassification(T.ViTConfig(**IMAGES)), _pixels),
    "transformers DeiT": (lambda: T.DeiTForImageClassification(T.DeiTConfig(**IMAGES)), _pixels),
    "transformers DINOv2": (lambda: T.Dinov2ForImageClassification(T.Dinov2Config(**IMAGES)), _pixels),
    "transformers CLIP (image)": (lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**SIZES, image_size=32, patch_size=8)), _pixels),
    "transformers BERT": (lambda: T.BertModel(T.BertConfig(**WORDS)), lambda: {"input_ids": _ids()["input_ids"]}),
    "timm ViT": (_timm("vit_tiny_patch16_224"), _image),
    "timm DeiT, distilled": (_timm("deit_tiny_distilled_patch16_224"), _image),
    "timm BEiT": (_timm("beit_base_patch16_224"), _image),
    "timm EVA-02": (_timm("eva02_tiny_patch14_224"), _image),
    "timm Swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=32, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=5
        ),
        _image,
    ),
    "torchvision ViT": (
        lambda: torchvision.models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=64, num_classes=5
        ),
        _image,
    ),
    "torch TransformerEncoder": (_torch_encoder, lambda: torch.randn(2, 9, 48, dtype=torch.float64)),
}


def _scale(model: nn.Module, inputs: Any) -> None:
    """ScaleNorms in place of RMS norms, after layer norms have become such where that is exact."""
    with contextlib.suppress(NormkitError):
        to_rmsnorm(model, inputs)
    to_scalenorm(model, inputs)


CONVERSIONS: dict[str, Conversion] = {
    "fold_norms": lambda model, inputs: fold_norms(model, inputs, keep_keys=False),
    "to_rmsnorm": to_rmsnorm,
    "to_crmsnorm": to_crmsnorm,
    "to_scalenorm": _scale,
}


@torch.no_grad()
def _trained_like(model: nn.Module) -> nn.Module:
    for parameter in model.double().eval().parameters():
        parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim < 2 else 0.05))
    return model


def _in(inputs: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, inputs)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Any) -> Tensor:
    result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return next(leaf for leaf in tree_leaves(result if isinstance(result, Tensor) else tuple(result.values())) if isinstance(leaf, Tensor))


def _error(model: nn.Module, convert: Conversion, inputs: Any, others: Any, dtype: torch.dtype) -> tuple[float, nn.Module]:
    old, new = copy.deepcopy(model).to(dtype), copy.deepcopy(model).to(dtype)
    convert(new, _in(inputs, dtype))
    expected = _outputs(old, _in(others, dtype)).double()
    return float((_outputs(new, _in(others, dtype)).double() - expected).abs().max() / expected.abs().max()), new


def _norms(model: nn.Module) -> str:
    kinds = {"layer": nn.LayerNorm, "RMS": (nn.RMSNorm, ShiftedRMSNorm), "CRMS": CompressedRMSNorm, "ScaleNorm": ScaleNorm}
    counts = {name: sum(isinstance(module, kind) for module in model.modules()) for name, kind in kinds.items()}
    counts["RMS"] += sum(is_written_rms_norm(module) for module in model.modules())
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def rows_of(name: str) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    make, draw = MODELS[name]
    model, inputs, others = _trained_like(make()), draw(), draw()
    rows = []
    for kind, convert in CONVERSIONS.items():
        row: dict[str, Any] = {"model": name, "conversion": kind, "norms before": _norms(model)}
        try:
            (double, new), (single, _) = (_error(model, convert, inputs, others, dtype) for dtype in (torch.float64, torch.float32))
        except NormkitError as error:
            row |= dict.fromkeys(("norms after", "float64", "float32", "parameters"), "") | {"why not": " ".join(str(error).split())[:250]}
        else:
            row |= {"norms after": _norms(new), "float64": f"{double:.1e}", "float32": f"{single:.1e}"}
            row |= {"parameters": f"{_size(new) / _size(model) - 1 or 0.0:+.2%}", "why not": ""}
        print(*row.values(), sep=" | ", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = list(csv.DictReader(options.out.open(encoding="utf-8"))) if options.out.exists() else []
    rows: list[dict[str, Any]] = [row for row in kept if row["model"] not in options.only]
    for name in options.only:
        rows += rows_of(name)
        _write(options.out, sorted(rows, key=lambda row: list(MODELS).index(row["model"])))


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
