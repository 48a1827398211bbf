"""A LightningModule that trains a causal language model, and writes text."""

from __future__ import annotations

__all__ = ["LanguageModule"]

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from pl_normkit.nn import CausalTransformer
from pl_normkit.recipes.cosine import cosine_factor, decay_groups
from pl_normkit.recipes.language.network import build_network
from pl_normkit.recipes.module import RecipeModule, require_model_option, step_schedule

Batch = tuple[Tensor, Tensor]


class LanguageModule(RecipeModule):
    """Train a decoder to predict the next token.

    Args:
        class_names: the name of the vocabulary; from the command line it comes from the data, as do the next two.
        vocab_size: number of tokens.
        length: tokens in a window.
        name: "reference", or a model type of transformers such as "gpt2" or "llama".
        options: of `pl_normkit.nn.CausalTransformer`, or of the configuration.
        lr: learning rate after the warm-up, before the cosine to 0.
        weight_decay: of the parameters whose role wants it (`pl_normkit.methods.weight_decay.param_groups`).
        warmup: share of the steps in which the learning rate rises.
        ema_decay: decay of the moving average of the weights, by which validation and the checkpoint go; 0 switches it off.
        compile: run the network through torch.compile.
        sample_tokens: length of a text that prediction writes.
        temperature: of sampling; 0 takes the likeliest token.

    Raises ModelSpecError or ConfigError for arguments that do not make a network.
    """

    def __init__(
        self,
        class_names: Sequence[str] = ("bytes",),
        vocab_size: int = 256,
        length: int = 128,
        name: str = "reference",
        options: dict[str, Any] | None = None,
        lr: float = 3e-3,
        weight_decay: float = 0.1,
        warmup: float = 0.1,
        ema_decay: float = 0.0,
        compile: bool = False,  # noqa: A002
        sample_tokens: int = 200,
        temperature: float = 0.8,
    ) -> None:
        super().__init__()
        require_model_option(lr > 0, "lr", lr, "take a number above 0")
        require_model_option(0 <= warmup < 1, "warmup", warmup, "take a share of the steps below 1")
        require_model_option(0 <= ema_decay < 1, "ema_decay", ema_decay, "take a decay below 1, such as 0.999; 0 switches it off")
        require_model_option(sample_tokens > 0, "sample_tokens", sample_tokens, "take at least 1")
        require_model_option(temperature >= 0, "temperature", temperature, "take 0 or more")
        self.class_names = list(class_names)
        self.length, self.lr, self.weight_decay, self.warmup, self.ema_decay = length, lr, weight_decay, warmup, ema_decay
        self.compiles, self.sample_tokens, self.temperature = compile, sample_tokens, temperature
        self.network = build_network(name, vocab_size, length, **(options or {}))
        self.example_input_array: Tensor = torch.arange(2 * length).reshape(2, length) % vocab_size
        self.scores: dict[str, float] = {}

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T) to logits (N, T, vocabulary)."""
        logits: Tensor = self.network(tokens)
        return logits

    def on_fit_start(self) -> None:
        if self.compiles:  # after callbacks have edited the network
            self.network.compile()

    def _loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats a token."""
        return F.cross_entropy(self(batch[0]).flatten(0, 1).float(), batch[1].flatten())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def evaluate(self, batch: Batch, stage: str) -> None:
        loss = self._loss(batch)
        per_byte = getattr(self.trainer.datamodule, "tokens_per_byte", 1.0)  # type: ignore[attr-defined]
        values = {f"{stage}_loss": loss, f"{stage}_bpb": loss * per_byte / math.log(2)}
        self.log_dict(values, batch_size=len(batch[0]), sync_dist=True, prog_bar=True)

    def log_scores(self, stage: str) -> None:
        if not self.trainer.sanity_checking:
            logged = self.trainer.callback_metrics
            self.scores = {name: float(logged[f"{stage}_{name}"]) for name in ("bpb", "loss")}

    @torch.no_grad()
    def generate(self, number: int, start: Sequence[int] = (10,)) -> list[int]:
        """`sample_tokens` tokens that go on from `start`; a number gives the same ones each time."""
        generator = torch.Generator().manual_seed(number)
        tokens = list(start)
        for _ in range(self.sample_tokens):
            window = torch.tensor([tokens[-self.length :]], device=self.device)
            logits = self(window)[0, -1].float().cpu()
            if self.temperature == 0:
                tokens.append(int(logits.argmax()))
            else:
                tokens.append(int(torch.multinomial((logits / self.temperature).softmax(-1), 1, generator=generator)))
        return tokens[len(start) :]

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> list[list[int]]:
        """A text, in tokens, for each number."""
        return [self.generate(number) for number in batch[0].tolist()]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        total = self.count_steps()
        groups = decay_groups(self.network, self.weight_decay, self.example_input_array)
        optimizer = torch.optim.AdamW(groups, self.lr, betas=(0.9, 0.95))
        network = self.network
        if isinstance(network, CausalTransformer) and network.placement == "ngpt":
            optimizer.register_step_post_hook(lambda *_: network.normalize_weights())
        warmup = round(self.warmup * total)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_factor(step, total, warmup))
        return step_schedule(optimizer, schedule)
