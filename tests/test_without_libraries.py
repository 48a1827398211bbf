"""With torch and Lightning alone, as after `pip install --no-deps`: what needs no model library works, the rest says what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import USER_MODULE

ROOT = Path(__file__).parents[1]

# Found by no import and in no list of installed packages, as where they are not installed.
ABSENCE = """
import re, sys
from importlib.machinery import PathFinder

ABSENT = {"timm", "segmentation_models_pytorch", "torchvision", "transformers", "diffusers", "monai", "skimage", "sklearn", "matplotlib",
          "albumentations", "onnx", "onnxruntime", "onnxscript"}
PROJECTS = ABSENT | {"scikit_image", "scikit_learn"}

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else PathFinder.find_spec(name, path, target)

    @staticmethod
    def find_distributions(context):
        found = PathFinder.find_distributions(context)
        return [each for each in found if re.sub(r"[-.]+", "_", each.name or "").lower() not in PROJECTS]

    @staticmethod
    def invalidate_caches():
        PathFinder.invalidate_caches()

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""

RUN = """
import warnings
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from pl_normkit.callbacks import GammaDecay, ModelAudit, NaNGuard
from userpkg.models import build

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(build(), torch.nn.Flatten(), torch.nn.LazyLinear(2))
        self.net(torch.randn(2, 3, 8, 8))

    def training_step(self, batch, index):
        return self.net(batch[0]).square().mean() * (float("nan") if index == 1 else 1.0)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3, weight_decay=0.1)

warnings.simplefilter("ignore")
module, audit, guard, decay = Module(), ModelAudit(config=False), NaNGuard(folder="guard"), GammaDecay()
trainer = pl.Trainer(max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                     enable_model_summary=False, callbacks=[guard, decay, audit])
trainer.fit(module, DataLoader(TensorDataset(torch.randn(12, 3, 8, 8)), batch_size=4))
assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [0.1, 0.0]
assert [event["step"] for event in guard.events] == [1], guard.events
assert [finding.code for finding in audit.report.findings if finding.code == "NK101"] == ["NK101"]
assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())
"""

NAMES = """
import pl_normkit
import pl_normkit.callbacks, pl_normkit.nn
from pl_normkit.rules import load_rules

for name in pl_normkit._homes():
    getattr(pl_normkit, name)
for package in (pl_normkit.callbacks, pl_normkit.nn):
    for name in package.__all__:
        getattr(package, name)
assert len(load_rules()) > 30
"""

LINT = """
from pl_normkit.cli import main

assert main(["lint", "userpkg.models:build", "--input", "3,16,16"]) == 1
assert main(["lint", "userpkg.models:build?drop=0.0", "--input", "3,16,16"]) == 0
assert main(["lint", "--loss", "userpkg.models:loss"]) == 0
for words in {words!r}:
    assert main(words) == 2, words
"""

REFUSED = {
    ("lint", "timm:resnet18"): "timm",
    ("lint", "smp:Unet"): "segmentation-models-pytorch",
    ("lint", "torchvision:resnet18"): "torchvision",
    ("lint", "transformers:ViTModel"): "transformers",
    ("run", "segmentation"): "segmentation-models-pytorch",
    ("run", "vit", "--help"): "torchvision",
    ("compare", "segmentation", "--with", "GammaDecay"): "segmentation-models-pytorch",
}


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "userpkg").mkdir()
    (folder / "userpkg" / "models.py").write_text(USER_MODULE)
    (folder / "script.py").write_text(ABSENCE + script)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", [RUN, NAMES], ids=["a run with three callbacks", "every name of the library"])
def test_it_works(script: str, tmp_path: Path) -> None:
    result = run(script, tmp_path)
    assert result.returncode == 0, result.stderr


def test_lint_works_and_what_needs_a_library_names_it(tmp_path: Path) -> None:
    result = run(LINT.format(words=[list(words) for words in REFUSED]), tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    errors = result.stderr.split("error: ")[1:]
    assert [f"pip install {package}" in error for error, package in zip(errors, REFUSED.values(), strict=True)] == [True] * len(REFUSED)
