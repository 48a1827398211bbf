import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from pl_normkit.cli import main
from pl_normkit.recipes.export import run_or_export
from pl_normkit.recipes.vit import RECIPE, ClassifierModule

run = partial(run_or_export, RECIPE)

LAST = Path("runs/vit/version_0/checkpoints/last.ckpt")
OPTIONS = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
EXPORT = ["run", "vit", "export", f"--ckpt_path={LAST}"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _fit(*more: str) -> None:
    quiet = [
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=2",
        "--trainer.callbacks=null",
        "--trainer.enable_model_summary=false",
        "--field.images=0",
    ]
    assert run([f"--model.options={OPTIONS}", *quiet, *more]) == 0


def _load(module: ClassifierModule) -> torch.nn.Module:
    module.load_state_dict(torch.load(LAST, weights_only=True)["state_dict"])
    return module.network.eval()


@torch.no_grad()
def test_a_biased_network_is_exported_with_its_bias(capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    _fit("--model.gaussian_bias=true", "--model.lr=0.1")
    images = torch.randn(3, 1, 16, 16)
    digits = [str(digit) for digit in range(10)]
    expected = _load(ClassifierModule(digits, options=OPTIONS, image_size=16, in_chans=1, gaussian_bias=True))(images)

    assert main([*EXPORT, "--to=out/model.onnx"]) == 0
    shown = capsys.readouterr().out
    assert "images:     1 x 16 x 16 in [0, 1], minus [0.3055], over [0.3759]" in shown
    assert f"classes:    {', '.join(digits)}" in shown
    session = onnxruntime.InferenceSession("out/model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-4)

    assert main([*EXPORT, "--to=out/model.pt"]) == 2
    assert "gaussian_bias.amplitude" in capsys.readouterr().err
    assert not Path("out/model.pt").exists()


@torch.no_grad()
def test_a_plain_network_is_exported_as_timm_builds_it(capsys):
    _fit()

    assert main([*EXPORT, "--to=model.pt"]) == 0

    call = re.search(r"loads into: (timm\.create_model\(.*\))", capsys.readouterr().out)
    assert call is not None
    network = eval(call[1], {"timm": timm}).eval()
    network.load_state_dict(torch.load("model.pt", weights_only=True))
    module = ClassifierModule([str(digit) for digit in range(10)], options=OPTIONS, image_size=16, in_chans=1)
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(network(images), _load(module)(images))


def test_the_size_of_an_export_is_that_of_the_data(capsys):
    assert main([*EXPORT, "--to=model.onnx", "--size=32"]) == 2
    assert "--size=32" in capsys.readouterr().err
