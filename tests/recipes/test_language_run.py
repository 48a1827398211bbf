"""`pl-normkit run language`: fit, resume, test, predict, export, other models, placements."""

from __future__ import annotations

import csv
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from pl_normkit.errors import ConfigError, ModelSpecError
from pl_normkit.recipes.export import run_or_export
from pl_normkit.recipes.language import RECIPE, LanguageModule, build_network

run = partial(run_or_export, RECIPE)

TINY = ["--model.options={width: 16, depth: 4, heads: 2}", "--model.sample_tokens=12", "--trainer.callbacks=null"]
QUIET = ["--trainer.enable_model_summary=false", "--trainer.enable_progress_bar=false"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs write into their working directory; text of two letters in turn."""
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number:02}.txt").write_text("ab" * 400)
    return tmp_path


def _words(here: Path, *more: str) -> list[str]:
    data = ["--data=TextFolder", f"--data.root={here / 'texts'}", "--data.length=16", "--data.batch_size=8", "--data.epoch_windows=64"]
    return [*data, f"--data.cache_dir={here / 'cache'}", "--data.eval_windows=16", *TINY, *QUIET, *more]


def _latest(here: Path) -> Path:
    return max((here / "runs" / "language").iterdir(), key=lambda path: int(path.name.removeprefix("version_")))


def _column(version: Path, name: str) -> list[float]:
    with (version / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_fit_resume_test_predict_and_export(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(_words(here, "--trainer.max_epochs=2")) == 0
    shown = capsys.readouterr().out
    whole = _latest(here)
    bits, nats = _column(whole, "val_bpb"), _column(whole, "val_loss")
    assert bits == pytest.approx([loss / math.log(2) for loss in nats])
    assert f"text:       {bits[-1]:.3f} bits a byte" in shown
    assert re.search(r"checkpoint: \S+\.ckpt \(val_bpb \d", shown)
    assert "it writes:" in shown

    last = whole / "checkpoints" / "last.ckpt"
    assert run(["test", *_words(here, f"--ckpt_path={last}")]) == 0
    assert re.search(r"text: +\d\.\d{3} bits a byte, \d\.\d{4} nats a token \(test\)", capsys.readouterr().out)

    assert run(["predict", *_words(here, f"--ckpt_path={last}", "--data.samples=2", "--samples.output_file=out.txt")]) == 0
    written = (here / "out.txt").read_text(encoding="utf-8")
    assert written.startswith("--- 0\n")
    assert "\n--- 1\n" in written

    capsys.readouterr()
    assert run(["export", f"--ckpt_path={last}", "--to=net.pt2"]) == 0
    told = capsys.readouterr().out
    assert "loads into" not in told
    assert "tokens:     (N, 16) int64 below 256, of bytes" in told
    program = torch.export.load(here / "net.pt2").module()
    state = torch.load(last, weights_only=True)["state_dict"]
    network = build_network("reference", 256, 16, width=16, depth=4, heads=2)
    network.load_state_dict({name.removeprefix("network."): value for name, value in state.items()})
    tokens = torch.randint(0, 256, (3, 16))
    assert torch.allclose(program(tokens), network.eval()(tokens), atol=1e-5)


def test_a_resumed_run_ends_as_the_whole_one(here: Path) -> None:
    """The schedule is that of two epochs in both."""
    module = _words(here, "--trainer.max_epochs=2", "--checkpoint.save_top_k=-1")
    run(module)
    whole = _latest(here)
    first = next((whole / "checkpoints").glob("epoch=0*.ckpt"))
    run([*module, f"--ckpt_path={first}"])
    states = [torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for path in (whole, _latest(here))]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_placement_trains_resumes_and_is_folded_for_export(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = _words(here, "--with=NormPlacement('lns')", "--trainer.limit_train_batches=2")
    assert run([*words, "--trainer.max_epochs=1"]) == 0
    assert re.search(r"edits: +9 by NormPlacement", capsys.readouterr().out)
    last = _latest(here) / "checkpoints" / "last.ckpt"
    assert run([*words, "--trainer.max_epochs=2", f"--ckpt_path={last}"]) == 0
    assert run(["export", f"--ckpt_path={last}", "--to=net.pt"]) == 0
    assert "build_network('reference', 256, 16, width=16, depth=4, heads=2)" in capsys.readouterr().out
    network = build_network("reference", 256, 16, width=16, depth=4, heads=2)
    network.load_state_dict(torch.load(here / "net.pt", weights_only=True))


BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "is_decoder": True}


@pytest.mark.parametrize(("name", "options"), [("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2}), ("bert", BERT)])
def test_models_of_transformers_give_logits_of_the_past_alone(name: str, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    network = build_network(name, 50, 8, **options).eval()
    tokens = torch.randint(0, 50, (2, 8))
    changed = tokens.clone()
    changed[:, 5:] = 7
    with torch.no_grad():
        first, second = network(tokens), network(changed)
    assert first.shape == (2, 8, 50)
    assert torch.allclose(first[:, :5], second[:, :5], atol=1e-6)


def test_bad_models_are_refused() -> None:
    with pytest.raises(ModelSpecError, match="no causal model 'gtp2'"):
        build_network("gtp2", 256, 8)
    with pytest.raises(ModelSpecError, match="reference cannot be built"):
        build_network("reference", 256, 8, layers=3)
    with pytest.raises(ConfigError, match="warmup"):
        LanguageModule(warmup=1.5)


def test_a_text_is_the_same_for_the_same_number() -> None:
    torch.manual_seed(0)
    module = LanguageModule(length=8, options={"width": 16, "depth": 1, "heads": 2}, sample_tokens=20).eval()
    assert module.generate(3) == module.generate(3)
    assert module.generate(3) != module.generate(4)
    assert len(module.generate(0)) == 20
    module.temperature = 0
    assert module.generate(3) == module.generate(4)
