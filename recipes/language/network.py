"""Any causal language model of transformers by its configuration, or the reference decoder."""

from __future__ import annotations

__all__ = ["Logits", "build_network"]

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from pl_normkit.errors import ModelSpecError, nearest
from pl_normkit.nn import CausalTransformer

REFERENCE = "reference"


class Logits(nn.Module):
    """A causal model of transformers that takes tokens (N, T) and gives logits (N, T, vocabulary), without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def build_network(name: str, vocab_size: int, length: int, **options: Any) -> nn.Module:
    """Network from tokens (N, length) to logits (N, length, vocab_size), with random weights.

    Args:
        name: "reference" (`pl_normkit.nn.CausalTransformer`), or a model type of transformers, such as "gpt2" or "llama".
        vocab_size: number of tokens.
        length: most tokens it is called with.
        options: further arguments of the class or of the configuration.

    Raises ModelSpecError for an unknown name, or options that do not make a model.
    """
    try:
        if name == REFERENCE:
            return CausalTransformer(vocab_size, length=length, **options)
        network = Logits(_of_transformers(name, vocab_size, length, options))
        with torch.no_grad():
            network.eval()(torch.zeros(1, 2, dtype=torch.long))
        return network.train()
    except ModelSpecError:
        raise
    except Warning:  # raised where a user makes warnings errors
        raise
    except Exception as error:
        evidence = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        fix = "check --model.name and --model.options; options are those of the configuration"
        raise ModelSpecError(f"{name} cannot be built", where=f"--model.options {options}", evidence=evidence, fix=fix) from error


def _of_transformers(name: str, vocab_size: int, length: int, options: dict[str, Any]) -> nn.Module:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        fix = f"pip install transformers, or take --model.name {REFERENCE}"
        raise ModelSpecError(f"{name} needs transformers", where="--model.name", fix=fix) from error
    known = [REFERENCE, *importlib.import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    if name not in known:
        fix = nearest(name, known) or f"{REFERENCE}, or a model type of transformers such as gpt2 or llama"
        raise ModelSpecError(f"transformers has no causal model {name!r}", where="--model.name", fix=fix)
    # A vocabulary of bytes has no tokens for begin, end and padding; configurations with positions of their own take the longest text.
    base = transformers.AutoConfig.for_model(name)
    sizes = {key: length for key in ("max_position_embeddings", "n_positions") if hasattr(base, key)}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = transformers.AutoConfig.for_model(name, **{"vocab_size": vocab_size, **sizes, **special, **options})
    made: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return made
