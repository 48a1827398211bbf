"""What a norm placement is worth: every placement in one small language model, and transformers' BERT turned to others by `place_norms`.

    python benchmarks/depth.py [--only bert reference vocabulary] [--seeds 2] [--fresh]
    python benchmarks/depth.py --table                                     # markdown, from the rows that are there

A decoder of 12 layers (width 64, 4 heads, 64 bytes of context, 512 bytes a step, AdamW, no clipping) learns the standard library's
source; every tenth file is held out. Bytes above 126 are one token, 128 in all, but for the part "vocabulary", which has 256. Each
setting trains all arms of a seed on the same windows. Writes benchmarks/results/depth.csv, a row a run, and leaves out the runs whose
row is there: a run that is stopped goes on. About 16 seconds a run, 40 minutes in all, on one idle core.
"""

from __future__ import annotations

import argparse
import csv
import math
import sysconfig
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel

from pl_normkit import place_norms
from pl_normkit.errors import NormkitError
from pl_normkit.methods.depth_profile import DepthProbe
from pl_normkit.nn import CausalTransformer

OUT = Path(__file__).parent / "results" / "depth.csv"
CONTEXT, BATCH, LAYERS, WIDTH = 64, 8, 12, 64
SETTINGS = [(3e-3, 0), (3e-3, 50), (1e-2, 0), (1e-2, 50)]
PLACEMENTS = ["pre", "post", "post+depth_init", "deepnorm", "lns", "mix", "peri", "normformer", "hybrid", "sdd", "ngpt"]
BERTS = ["post", "post+depth_init", "deepnorm", "post to pre"]
STUCK, CUT = 0.97, 0.05
"""Of the loss that letter frequencies give, above which a run is stuck; the ratio of gradients below which NK901 fires."""
COLUMNS = [
    "model",
    "vocabulary",
    "arm",
    "lr",
    "warmup",
    "seed",
    "loss",
    "variance",
    "variance_end",
    "gradients",
    "gradients_end",
    "seconds",
]


class Run(NamedTuple):
    """One training; its fields are the first columns of the table."""

    model: str
    vocabulary: int
    arm: str
    lr: float
    warmup: int
    seed: int

    @property
    def steps(self) -> int:
        return 200 if self.model == "bert" else 250


def runs(parts: list[str], seeds: int) -> Iterator[Run]:
    """In the order of what they tell."""
    if "bert" in parts:
        yield from (Run("bert", 128, arm, 3e-3, 0, seed) for seed in range(6) for arm in BERTS[: 4 if seed < 3 else 3])
    for seed in range(seeds if "reference" in parts else 0):
        yield from (Run("reference", 128, arm, lr, warmup, seed) for lr, warmup in SETTINGS for arm in PLACEMENTS)
        if seed == 0 and "bert" in parts:
            yield from (Run("bert", 128, arm, lr, warmup, 0) for lr, warmup in ((1e-3, 0), (3e-3, 50)) for arm in BERTS)
        if seed == 0 and "vocabulary" in parts:
            yield from (Run("bert", 256, arm, 3e-3, 0, seed) for seed in range(3) for arm in BERTS[:3])


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


class Bert(nn.Module):
    """BERT as a decoder: tokens to logits."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
        config = BertConfig(
            **sizes, vocab_size=vocabulary, num_hidden_layers=LAYERS, is_decoder=True, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.model = BertLMHeadModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def build(run: Run) -> nn.Module:
    torch.manual_seed(run.seed)
    base, _, edit = run.arm.partition("+")
    if run.model == "bert":
        model: nn.Module = Bert(run.vocabulary)
        edit = {"post": edit, "deepnorm": "deepnorm", "post to pre": "pre"}[base]
    else:
        model = CausalTransformer(run.vocabulary, WIDTH, LAYERS, 4, CONTEXT, placement=base)
    if edit:
        place_norms(model, edit, torch.zeros(2, CONTEXT, dtype=torch.long))
    return model


def loss_of(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(rows[0]).flatten(0, 1), rows[1].flatten())


def optimizer_of(model: nn.Module, run: Run) -> torch.optim.Optimizer:
    """BERT decays all parameters, the reference its matrices; nGPT none, and its matrices keep length 1."""
    matrices = [parameter for parameter in model.parameters() if run.model == "bert" or parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if run.model != "bert" and parameter.dim() < 2]
    decay = 0.0 if run.arm == "ngpt" else 0.1
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=run.lr, betas=(0.9, 0.95))
    if isinstance(model, CausalTransformer) and model.placement == "ngpt":
        optimizer.register_step_post_hook(lambda *_: model.normalize_weights())
    return optimizer


def train(model: nn.Module, data: Tensor, run: Run) -> None:
    optimizer, generator = optimizer_of(model, run), torch.Generator().manual_seed(1000 + run.seed)
    for step in range(run.steps):
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - run.warmup) / (run.steps - run.warmup)))
        for group in optimizer.param_groups:
            group["lr"] = run.lr * ((step + 1) / run.warmup if step < run.warmup else cosine)
        optimizer.zero_grad()
        loss_of(model, batch(data, BATCH, generator)).backward()
        optimizer.step()


def depth_of(model: nn.Module, rows: tuple[Tensor, Tensor], probe: list[DepthProbe]) -> tuple[str, str]:
    """Variance of the stream after the last addition, and gradient of the first over the last quarter; empty where no addition is read."""
    try:
        probe += [] if probe else [DepthProbe(model, rows[0])]
        profile = probe[0].measure(rows[0], lambda logits: F.cross_entropy(logits.flatten(0, 1), rows[1].flatten()))
    except NormkitError:
        return "", ""
    ratio = profile.gradient_ratio
    return f"{profile.stream[-1].variance:.4g}", "" if ratio is None else f"{ratio:.3g}"


def measure(run: Run, data: Tensor, held_out: Tensor) -> list[object]:
    data, held_out = data.clamp(max=run.vocabulary - 1), held_out.clamp(max=run.vocabulary - 1)
    rows = batch(held_out, 128, torch.Generator().manual_seed(7))
    model, probe, few = build(run), [], (rows[0][:16], rows[1][:16])
    before = depth_of(model, few, probe)
    started = time.process_time()
    train(model, data, run)
    seconds = time.process_time() - started
    with torch.no_grad():
        loss = loss_of(model.eval(), rows).item()
    after = depth_of(model, few, probe)
    return [*run, round(loss, 4), before[0], after[0], before[1], after[1], round(seconds, 1)]


def read() -> list[dict[str, str]]:
    if not OUT.is_file():
        return []
    with OUT.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def interval(losses: list[float]) -> str:
    """Bits a byte: mean, and half the width of a 95 % interval over seeds."""
    bits = torch.tensor(losses, dtype=torch.float64) / math.log(2)
    if len(losses) < 2:
        return f"{bits.mean():.2f}"
    half = float(student.ppf(0.975, len(losses) - 1)) * float(bits.std()) / math.sqrt(len(losses))
    return f"{bits.mean():.2f} ± {half:.2f}"


def print_table(letters: float) -> None:
    """Bits a byte, with how many runs ended no more than 3 % below what letter frequencies give; what the profile says, first seed."""
    cells: defaultdict[tuple[str, ...], dict[tuple[str, str], list[dict[str, str]]]] = defaultdict(dict)
    for row in read():
        key, setting = (row["model"], row["vocabulary"], row["arm"]), (row["lr"], row["warmup"])
        cells[key].setdefault(setting, []).append(row)
    for model, vocabulary in dict.fromkeys(key[:2] for key in cells):
        arms = {key[2]: found for key, found in cells.items() if key[:2] == (model, vocabulary)}
        settings = list(dict.fromkeys(setting for found in arms.values() for setting in found))
        for title, cell in (
            ("bits a byte", partial(_loss, letters=letters)),
            ("variance, and gradients of first over last blocks", _profile),
        ):
            print(f"\n{model}, {vocabulary} tokens: {title} (letter frequencies alone {letters / math.log(2):.2f} bits)\n")
            print("| |", " | ".join(f"{lr}, warm-up {warmup}" for lr, warmup in settings), "|\n|---|" + "---|" * len(settings))
            for arm, found in arms.items():
                print(f"| {arm} |", " | ".join(cell(found.get(setting, [])) for setting in settings), "|")


def print_claims(letters: float) -> None:
    """Of the reference: each placement against pre-norm on the same windows, and what the gradients say of runs that are stuck."""
    rows = [row for row in read() if row["model"] == "reference"]
    bits = {(row["arm"], row["lr"], row["warmup"], row["seed"]): float(row["loss"]) / math.log(2) for row in rows}
    for arm in PLACEMENTS[1:]:
        pairs = [found - bits["pre", *key[1:]] for key, found in bits.items() if key[0] == arm]
        if pairs:
            ahead, mean = sum(difference < 0 for difference in pairs), sum(pairs) / len(pairs)
            print(f"{arm}: ahead of pre in {ahead} of {len(pairs)} pairs of runs, {mean:+.2f} bits in the mean")
    ends = [(float(row["loss"]) < STUCK * letters, float(row["gradients_end"]) < CUT) for row in rows if row["gradients_end"]]
    for learned, name in ((False, "stuck"), (True, "other")):
        low = [is_low for has_learned, is_low in ends if has_learned is learned]
        print(f"gradients of first over last blocks below {CUT} at the end: {sum(low)} of {len(low)} {name} runs")


def _loss(rows: list[dict[str, str]], letters: float) -> str:
    losses = [float(row["loss"]) for row in rows]
    stuck = sum(not loss < STUCK * letters for loss in losses)
    return (interval(losses) if losses else "-") + (f", {stuck} of {len(losses)} stuck" if stuck else "")


def _profile(rows: list[dict[str, str]]) -> str:
    """Of the first seed, from the start of the run to its end."""
    measured = [row for row in rows if row["variance"]]
    if not measured:
        return "-"
    start, end = ([float(measured[0][name + when]) for name in ("variance", "gradients")] for when in ("", "_end"))
    return f"{start[0]:.3g} to {end[0]:.3g}, {start[1]:.2g} to {end[1]:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["bert", "reference", "vocabulary"])
    parser.add_argument("--seeds", type=int, default=2, help="of the reference")
    parser.add_argument("--fresh", action="store_true", help="forget the rows that are there")
    parser.add_argument("--table", action="store_true", help="train nothing, print what the rows say")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data, held_out = corpus()
    letters = torch.bincount(data, minlength=256).double() + 1
    probe = batch(held_out, 128, torch.Generator().manual_seed(7))
    alone = float(-(letters / letters.sum()).log()[probe[1]].mean())
    if options.table:
        print_table(alone)
        print_claims(alone)
        return
    if options.fresh or not OUT.is_file():
        OUT.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    done = {tuple(row[name] for name in COLUMNS[:6]) for row in read()}
    for run in runs(options.only, options.seeds):
        if tuple(map(str, run)) not in done:
            row = measure(run, data, held_out)
            print(*row, sep=", ", flush=True)
            with OUT.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(row)


if __name__ == "__main__":
    main()
