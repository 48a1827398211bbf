import importlib.util
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch

from pl_normkit.cli import main
from pl_normkit.errors import ConfigError
from pl_normkit.methods.atrous_rates import set_atrous_rates
from pl_normkit.methods.fusion_scale import ScaleEqualizer, equalize_scales
from pl_normkit.recipes.export import export_network, run_or_export
from pl_normkit.recipes.segmentation import RECIPE

run = partial(run_or_export, RECIPE)

LAST = Path("runs/segmentation/version_0/checkpoints/last.ckpt")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _fit(*options: str) -> None:
    small = ["--data.train_count=8", "--data.val_count=2", "--data.batch_size=4", "--trainer.max_steps=2", "--trainer.callbacks=null"]
    assert run([*small, "--trainer.enable_model_summary=false", "--checkpoint.save_top_k=0", *options]) == 0


def _tiny_unet() -> torch.nn.Module:
    return smp.create_model("Unet", "tu-test_resnet", None, classes=8)


def _trained(network: torch.nn.Module) -> torch.nn.Module:
    """`network` with the weights of the checkpoint, in evaluation mode."""
    state = torch.load(LAST, weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")})
    return network.eval()


def test_a_checkpoint_is_exported_in_every_format_and_computes_the_same(here, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    _fit("--model.architecture=Unet", "--model.encoder_name=tu-test_resnet", "--data.crop_size=32")
    for suffix in ("onnx", "pt", "pt2"):
        assert main(["run", "segmentation", "export", f"--ckpt_path={LAST}", f"--to=out/model.{suffix}", "--size=32,64"]) == 0
    assert "create_model('Unet', 'tu-test_resnet', None, classes=8)" in capsys.readouterr().out

    images = torch.rand(3, 3, 32, 64)
    with torch.no_grad():
        expected = _trained(_tiny_unet())(images)
        plain = _tiny_unet().eval()
        plain.load_state_dict(torch.load("out/model.pt", weights_only=True))
        assert torch.equal(plain(images), expected)
        assert torch.allclose(torch.export.load("out/model.pt2").module()(images), expected, atol=1e-5)
    session = onnxruntime.InferenceSession("out/model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)
    assert sorted(path.name for path in (here / "runs" / "segmentation").iterdir()) == ["version_0"]


def test_the_exported_network_is_the_fixed_one(here, capsys):
    """Atrous rates are in no weight: the configuration beside the checkpoint sets them again, and smp can be built with them."""
    _fit("--model.encoder_name=resnet18", "--data.crop_size=96", "--with=AtrousRates(rates=(2,3,5))")
    command = ["run", "segmentation", "export", f"--ckpt_path={LAST}"]

    assert main([*command, "--to=model.pt"]) == 0
    built = re.search(r"loads into: segmentation_models_pytorch\.(create_model\(.*\))", capsys.readouterr().out)
    assert built is not None
    assert "decoder_atrous_rates=[2, 3, 5]" in built[1]
    assert main([*command, "--to=model.pt2"]) == 0
    images = torch.rand(2, 3, 96, 96)
    fixed = smp.create_model("DeepLabV3Plus", "resnet18", None, classes=8, decoder_atrous_rates=(2, 3, 5))
    with torch.no_grad():
        expected = _trained(fixed)(images)
        assert torch.allclose(torch.export.load("model.pt2").module()(images), expected, atol=1e-4)
        plain = smp.create_model("DeepLabV3Plus", "resnet18", None, classes=8, decoder_atrous_rates=[2, 3, 5]).eval()
        plain.load_state_dict(torch.load("model.pt", weights_only=True))
        assert torch.equal(plain(images), expected)


def test_an_edit_that_a_plain_checkpoint_would_lose_is_refused(tmp_path):
    def build() -> torch.nn.Module:
        return smp.create_model("DeepLabV3Plus", "resnet18", None, classes=3)

    network = build()
    set_atrous_rates(network, 64)
    with pytest.raises(ConfigError, match="computes something else"):
        export_network(network, tmp_path / "model.pt", (torch.zeros(2, 3, 64, 64),), build)

    assert not (tmp_path / "model.pt").exists()


def _equalized(architecture: str) -> torch.nn.Module:
    torch.manual_seed(0)
    network = smp.create_model(architecture, "tu-test_resnet", None, classes=3)
    equalize_scales(network, [torch.rand(4, 3, 32, 32)])
    assert any(isinstance(module, ScaleEqualizer) for module in network.modules())
    return network.eval()


@torch.no_grad()
def test_scale_equalizers_that_fold_end_in_a_plain_checkpoint(tmp_path):
    network, images = _equalized("Segformer"), torch.rand(2, 3, 32, 32)
    expected = network(images)

    export_network(network, tmp_path / "model.pt", (images,), lambda: smp.create_model("Segformer", "tu-test_resnet", None, classes=3))

    plain = smp.create_model("Segformer", "tu-test_resnet", None, classes=3).eval()
    plain.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.allclose(plain(images), expected, atol=1e-5)


def test_scale_equalizers_that_stay_are_named(tmp_path):
    network = _equalized("Unet")

    with pytest.raises(ConfigError, match="other weights than its bare architecture") as caught:
        export_network(
            network,
            tmp_path / "model.pt",
            (torch.zeros(2, 3, 32, 32),),
            lambda: smp.create_model("Unet", "tu-test_resnet", None, classes=3),
        )

    assert "scale_equalizer" in caught.value.evidence
    assert ".pt2" in caught.value.fix
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ckpt_path=x.ckpt", "--to=model.h5"], "no such export format"),
        (["--ckpt_path=x.ckpt", "--to=model.pt"], "the checkpoint is not there"),
        (["--ckpt_path=x.ckpt", "--to=model.pt", "--size=50"], "multiples of 32"),
        (["--ckpt_path=x.ckpt", "--to=model.pt", "--size=32,a"], "multiples of 32"),
        (["--to=model.pt"], "--ckpt_path"),
    ],
)
def test_what_cannot_be_exported_is_one_error(here, capsys, options, message):
    assert main(["run", "segmentation", "export", *options]) == 2
    assert message in capsys.readouterr().err


def test_missing_onnx_names_the_extra(here, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name.startswith("onnx") else find(name, *rest))
    assert main(["run", "segmentation", "export", "--ckpt_path=x.ckpt", "--to=model.onnx"]) == 2
    errors = capsys.readouterr().err
    assert "onnx and onnxscript are needed" in errors
    assert "pip install 'pl_normkit[export]'" in errors
