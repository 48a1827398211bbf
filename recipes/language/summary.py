"""What a run ends with: bits per byte, findings, checkpoint and a text of the network's own."""

from __future__ import annotations

__all__ = ["print_scores", "summarize_fit"]

import lightning as L
from rich.console import Console

from pl_normkit.recipes.language.data import TextData
from pl_normkit.recipes.language.model import LanguageModule
from pl_normkit.recipes.outcome import finish_fit


def print_scores(console: Console, module: LanguageModule, title: str) -> None:
    """Bits a byte of text held out, and nats a token."""
    text = f"{module.scores['bpb']:.3f} bits a byte, {module.scores['loss']:.4f} nats a token ({title})"
    console.print(f"text:       {text}", highlight=False, soft_wrap=True)


def summarize_fit(trainer: L.Trainer, module: LanguageModule, data: TextData, console: Console) -> None:
    """Print the result of a fit; rank zero prints and writes, the others do nothing."""
    if not trainer.is_global_zero:
        return
    if module.scores:
        print_scores(console, module, f"validation after {trainer.global_step} steps")
    finish_fit(trainer, module, None, console)
    training = module.training
    module.eval()
    text = data.vocabulary.decode(module.generate(0))
    module.train(training)
    console.print("it writes:", highlight=False)
    console.print("\n".join(f"    {line}" for line in text.splitlines()), highlight=False, markup=False, soft_wrap=True)
