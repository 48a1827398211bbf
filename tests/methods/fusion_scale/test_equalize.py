"""Every branch of every fusion to zero mean and unit deviation, on toys and real decoders; what is refused, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from pl_normkit.errors import ConfigError, DataError, EditError, NormkitWarning, NothingMatchedError
from pl_normkit.methods.fusion_scale import calibrate_scales, equalize_scales, insert_equalizers
from pl_normkit.nn import ScaleEqualizer
from tests.methods.fusion_scale.models import Nested, OwnDecoder, SharedFusion, SumDecoder, images, scales_after


def smp_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(smp, name)("resnet18", encoder_weights=None, **options)


def transformers_model(name: str) -> nn.Module:
    import transformers

    widths = {"hidden_sizes": [16, 24, 32, 48], "depths": [1] * 4}
    if name == "segformer":
        heads = transformers.SegformerConfig(**widths, num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=32)
        return transformers.SegformerForSemanticSegmentation(heads)
    backbone = transformers.ConvNextConfig(**widths, out_features=["stage1", "stage2", "stage3", "stage4"])
    return transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(backbone_config=backbone, hidden_size=32, auxiliary_in_channels=32)
    )


def torchvision_model(name: str) -> nn.Module:
    return getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None, num_classes=1)  # type: ignore[no-any-return]


# Where equalizers stand, with the channels of the branches. SMP's map is its source; the rest was read from theirs.
PLACES: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = {
    "own": (OwnDecoder, {"fuse": (8, 6)}),
    "nested": (Nested, {"fuse1.0": (8, 6), "fuse2": (7, 4)}),
    "dropout between": (lambda: OwnDecoder(between=nn.Dropout2d(0.5)), {"between": (8, 6)}),
    "non-linearity between": (lambda: OwnDecoder(between=nn.ReLU()), {"fuse": (8, 6)}),
    "group norm between": (lambda: OwnDecoder(between=nn.GroupNorm(2, 14)), {"between": (8, 6)}),
    "shared": (SharedFusion, {"fuse": (8, 6)}),
    "Unet": (
        smp_model("Unet", decoder_channels=(32, 24, 16, 16, 8)),
        {
            "decoder.blocks.0.conv1.0": (512, 256),
            "decoder.blocks.1.conv1.0": (32, 128),
            "decoder.blocks.2.conv1.0": (24, 64),
            "decoder.blocks.3.conv1.0": (16, 64),
        },
    ),
    "Unet scse": (
        smp_model("Unet", encoder_depth=3, decoder_channels=(32, 24, 16), decoder_attention_type="scse"),
        {"decoder.blocks.0.attention1.attention": (128, 64), "decoder.blocks.1.attention1.attention": (32, 64)},
    ),
    "UnetPlusPlus": (
        smp_model("UnetPlusPlus", encoder_depth=3, decoder_channels=(32, 24, 16)),
        {
            "decoder.blocks.x_0_0.conv1.0": (128, 64),
            "decoder.blocks.x_0_1.conv1.0": (32, 64, 64),
            "decoder.blocks.x_1_1.conv1.0": (64, 64),
        },
    ),
    "MAnet": (
        smp_model("MAnet", encoder_depth=3, decoder_channels=(32, 24, 16)),
        {"decoder.blocks.0.conv1.0": (64, 64), "decoder.blocks.1.conv1.0": (64, 64)},
    ),
    "PSPNet": (smp_model("PSPNet"), {"decoder.conv.0": (32, 32, 32, 32, 128)}),
    "DeepLabV3": (smp_model("DeepLabV3", decoder_channels=32), {"decoder.aspp.project.0": (32,) * 5}),
    "DeepLabV3Plus": (
        smp_model("DeepLabV3Plus", decoder_channels=32),
        {"decoder.aspp.0.project.0": (32,) * 5, "decoder.block2.0.0": (32, 48)},
    ),
    "UPerNet": (
        smp_model("UPerNet", decoder_channels=32),
        {"decoder.psp.out_conv.0": (512, 32, 32, 32, 32), "decoder.fusion_block.0": (32,) * 4},
    ),
    "Segformer": (smp_model("Segformer", decoder_segmentation_channels=32), {"decoder.fuse_stage.0": (32,) * 5}),
    "FPN cat": (smp_model("FPN", decoder_merge_policy="cat"), {"decoder.dropout": (128,) * 4}),
    "torchvision DeepLabV3": (
        lambda: torchvision_model("deeplabv3_mobilenet_v3_large"),
        {"classifier.0.project.0": (256,) * 5},
    ),
    "torchvision LRASPP": (
        lambda: torchvision_model("lraspp_mobilenet_v3_large"),
        {"classifier.low_classifier": (40,), "classifier.high_classifier": (128,)},
    ),
    "transformers SegFormer": (lambda: transformers_model("segformer"), {"decode_head.linear_fuse": (32,) * 4}),
    "transformers UPerNet": (
        lambda: transformers_model("upernet"),
        {"decode_head.bottleneck.conv": (48, 32, 32, 32, 32), "decode_head.fpn_bottleneck.conv": (32,) * 4},
    ),
}
TOYS = ("own", "nested", "dropout between", "non-linearity between", "group norm between", "shared")


def data(name: str, seed: int, batches: int = 2) -> list[Any]:
    if name in TOYS:
        return list(images(batches, size=15, samples=8, seed=seed))
    key = "pixel_values" if name.startswith("transformers") else ""
    samples = [x + torch.rand(8, 3, 1, 1) for x in images(batches, size=64, samples=8, seed=seed)]
    return [{key: x} for x in samples] if key else samples


@pytest.mark.parametrize("name", PLACES)
def test_every_branch_gets_zero_mean_and_unit_std(name: str) -> None:
    """Within 2 % on the data it was calibrated on; held-out data are in `test_held_out_data`. Before it, nothing changes at all."""
    build, expected = PLACES[name]
    model = build().eval()
    loader = data(name, 0)
    keys = list(model.state_dict())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    changes = equalize_scales(model, loader)

    found = {path.removesuffix(".scale_equalizer"): m for path, m in model.named_modules() if isinstance(m, ScaleEqualizer)}
    assert {path: equalizer.widths for path, equalizer in found.items()} == expected
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in state.items())
    assert [key for key in after if "scale_equalizer" not in key] == keys
    means, stds = zip(*scales_after(model, loader).values(), strict=True)
    assert [abs(mean) < 0.02 for branch in means for mean in branch] == [True] * sum(map(len, means))
    assert [abs(std - 1) < 0.02 for branch in stds for std in branch] == [True] * sum(map(len, stds))
    assert not equalize_scales(model, loader)
    changes.undo()
    assert list(model.state_dict()) == keys
    hooks = [hook for module in model.modules() for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())]
    assert not any("scale_equalizer" in repr(hook) for hook in hooks)


HELD_OUT = {"own": OwnDecoder, "nested": Nested, "UPerNet": smp_model("UPerNet", encoder_depth=4, decoder_channels=64)}


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_data(name: str) -> None:
    model = HELD_OUT[name]()
    batches = 32 if name in TOYS else 6
    equalize_scales(model, data(name, 0, batches))
    for means, stds in scales_after(model, data(name, 1, batches)).values():
        assert [abs(mean) < 0.02 for mean in means] == [True] * len(means)
        assert [abs(std - 1) < 0.02 for std in stds] == [True] * len(stds)


@pytest.mark.zoo
@pytest.mark.parametrize("name", sorted(set(PLACES) - set(TOYS)))
def test_held_out_data_of_every_architecture(name: str) -> None:
    """320 small images: sampling alone costs up to 3 % with 48."""
    model = PLACES[name][0]()
    equalize_scales(model, data(name, 0, 40))
    for means, stds in scales_after(model, data(name, 1, 40)).values():
        assert [abs(mean) < 0.02 for mean in means] == [True] * len(means)
        assert [abs(std - 1) < 0.02 for std in stds] == [True] * len(stds)


def test_the_structure_alone_is_the_identity() -> None:
    model = Nested().eval()
    x = images()[0]
    before = model(x)
    changes = insert_equalizers(model, x)
    assert [change.module for change in changes.made] == ["fuse1.0", "fuse2"]
    assert torch.equal(model(x), before)
    assert not insert_equalizers(model, x)
    calibrate_scales(model, images())
    assert not torch.equal(model(x), before)
    assert not calibrate_scales(model, images())


def test_levels_follow_the_graph() -> None:
    model = Nested()
    insert_equalizers(model, images()[0])
    assert [m.level for m in model.modules() if isinstance(m, ScaleEqualizer)] == [0, 1]
    passes: list[tuple[int, int]] = []
    calibrate_scales(model, images(2), progress=lambda done, turn: passes.append((turn, done)))
    assert passes == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_branches_are_equal_in_a_training_pass() -> None:
    """Statistics are those of training: batch norms before the fusion use their batch."""
    model, (x,) = Nested(), images(1)
    equalize_scales(model, [x])
    outputs: list[Tensor] = []
    model.get_submodule("fuse2.scale_equalizer").register_forward_hook(lambda _, __, output: outputs.append(output.detach()))
    model.train()
    model(x)
    assert [float(part.std(correction=0)) for part in outputs[0].split([7, 4], 1)] == [pytest.approx(1, abs=1e-4)] * 2


def test_by_channel() -> None:
    model, loader = OwnDecoder(), images()
    equalize_scales(model, loader, granularity="channel")
    equalizer = model.get_submodule("fuse.scale_equalizer")
    fine = torch.cat([model.levels(x)[0] for x in loader]).double()
    torch.testing.assert_close(equalizer.std[:8], fine.std((0, 2, 3), correction=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(equalizer.mean[:8], fine.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_sums_on_request() -> None:
    model, loader = SumDecoder(), images()
    with pytest.raises(NothingMatchedError, match="no fusion of levels") as caught:
        equalize_scales(model, loader)
    assert "sums=True" in caught.value.fix
    equalize_scales(model, loader, sums=True)
    assert set(scales_after(model, loader)) == {"lateral.1.scale_equalizer", "up.scale_equalizer"}
    for (mean,), (std,) in scales_after(model, loader).values():
        assert (mean, std) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))


@pytest.mark.parametrize("name", ["FPN", "DPT"])
def test_sums_of_real_decoders(name: str) -> None:
    fpn = {f"decoder.seg_blocks.{i}.block.{j}" for i, j in ((0, 2), (1, 1), (2, 0))} | {"decoder.seg_blocks.3.block.0.block.2"}
    dpt = {f"decoder.fusion_blocks.{i}.project" for i in range(3)} | {f"decoder.fusion_blocks.{i}.residual_conv_block1" for i in (1, 2, 3)}
    vit = "tu-vit_tiny_patch16_224"
    model = smp_model("FPN")() if name == "FPN" else smp.DPT(vit, encoder_weights=None, dynamic_img_size=True, decoder_fusion_channels=32)
    equalize_scales(model, images(1, size=64), sums=True)
    found = scales_after(model, images(1, size=64))
    assert {path.removesuffix(".scale_equalizer") for path in found} == (fpn if name == "FPN" else dpt)
    assert [abs(std - 1) < 0.02 for _, stds in found.values() for std in stds] == [True] * len(found)


class DenseFusion(nn.Module):
    """A batch norm reads the fusion."""

    def __init__(self) -> None:
        super().__init__()
        self.net = OwnDecoder(between=nn.BatchNorm2d(14))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Functional(nn.Module):
    """The fusion convolution is a function call, and so is the resize: nothing to attach to."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = OwnDecoder().levels
        self.weight = nn.Parameter(torch.randn(4, 14, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = self.levels(x)
        return F.conv2d(torch.cat([fine, F.interpolate(coarse, fine.shape[2:])], 1), self.weight)


def frozen() -> nn.Module:
    model = OwnDecoder()
    model.fuse.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (DenseFusion, "a batch norm reads it"),
        (Functional, "no module reads the joined features alone"),
        (frozen, "frozen"),
        (lambda: torchvision_model("fcn_resnet50"), "0 fusions, none with a resized branch"),
        (smp_model("Linknet"), "a sum has no fusion weights"),
    ],
)
def test_what_is_left_alone_says_why(build: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(NothingMatchedError) as caught:
        equalize_scales(build(), images(1, size=64))
    assert reason in caught.value.evidence


def test_a_trained_network_is_refused_unless_told() -> None:
    model = OwnDecoder()
    model(images()[0])
    with pytest.raises(EditError, match="trained already") as caught:
        equalize_scales(model, images())
    assert "norm" in caught.value.evidence
    assert not any("scale_equalizer" in key for key in model.state_dict())
    assert equalize_scales(model, images(), allow_trained=True)


def test_constant_branches_are_centred_and_not_scaled_with_a_warning() -> None:
    model, loader = OwnDecoder(norm=False), images()
    for conv in (model.levels.fine, model.levels.coarse):
        nn.init.zeros_(conv.weight)
        nn.init.constant_(conv.bias, 0.25)  # type: ignore[arg-type]
    with pytest.warns(NormkitWarning, match="fuse: 2 of 2 branches are constant"):
        equalize_scales(model, loader)
    equalizer = model.get_submodule("fuse.scale_equalizer")
    assert equalizer.scale.tolist() == [1.0] * 14
    torch.testing.assert_close(equalizer.mean, torch.tensor([1.25] * 8 + [0.175] * 6, dtype=torch.float64), rtol=1e-6, atol=0)
    assert bool(torch.isfinite(model(loader[0])).all())


@pytest.mark.filterwarnings("default::pl_normkit.errors.NormkitWarning")
@pytest.mark.parametrize("granularity", ["branch", "channel"])
def test_constant_images_leave_no_division_by_zero(granularity: Any, recwarn: pytest.WarningsRecorder) -> None:
    """Channels differ from each other, so branches have a std and channels have none; the images are named in both cases."""
    model, loader = OwnDecoder(norm=False), [torch.full((2, 3, 16, 16), 0.5), torch.rand(2, 3, 1, 1).expand(-1, -1, 16, 16)]
    for conv in (model.levels.fine, model.levels.coarse):
        conv.padding_mode, conv._reversed_padding_repeated_twice = "replicate", [1, 1, 1, 1]
    equalize_scales(model, loader[: 1 if granularity == "channel" else 2], granularity=granularity)
    told = [str(warning.message) for warning in recwarn]
    assert [word for word in ("every image of the loader is constant", "channels are constant") if any(word in text for text in told)] == [
        "every image of the loader is constant"
    ] + ["channels are constant"] * (granularity == "channel")
    assert bool(torch.isfinite(model(loader[0])).all())


@pytest.mark.filterwarnings("ignore:every image of the loader is constant")
def test_the_rounding_error_of_a_constant_branch_is_not_blown_up() -> None:
    """Image pooling of constant images, through a batch norm over its batch, is rounding error of std 1e-6 to 1e-5."""
    model = smp.DeepLabV3("resnet18", encoder_weights=None, decoder_channels=32)
    with (
        pytest.warns(NormkitWarning, match="every image of the loader is constant"),
        pytest.warns(NormkitWarning, match="project.0: 1 of 5 branches are constant.*branches 4"),
    ):
        equalize_scales(model, [torch.full((4, 3, 64, 64), 0.5)])
    assert float(model.get_submodule("decoder.aspp.project.0.scale_equalizer").scale.max()) < 100


def test_one_image_that_varies_is_content() -> None:
    changes = equalize_scales(OwnDecoder(), [torch.zeros(2, 3, 16, 16), images()[0]])
    assert changes
    assert changes.skipped == []


def test_nothing_is_half_done_when_the_data_are_bad() -> None:
    model, loader = Nested(), images()
    loader[1][0] = torch.inf
    keys = list(model.state_dict())
    with pytest.raises(DataError):
        equalize_scales(model, loader)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("options", [{"mode": "implicit"}, {"granularity": "pixel"}, {"border": "reflect"}])
def test_unknown_options_are_refused(options: Any) -> None:
    with pytest.raises(ConfigError, match="unknown"):
        equalize_scales(OwnDecoder(), images(), **options)
