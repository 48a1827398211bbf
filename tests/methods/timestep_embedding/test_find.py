"""Where a time enters, on small networks and on real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pl_normkit.graph import ModelGraph
from pl_normkit.methods.timestep_embedding import TimeInjection, find_time_injections
from tests.methods.timestep_embedding.networks import NORMS, AdaptiveBlock, ContextBlock, OdeFunction, ResBlock, VectorField, res_block


def found(model: nn.Module, inputs: Any) -> list[TimeInjection]:
    return find_time_injections(ModelGraph.from_model(model, inputs))


def reached(injections: list[TimeInjection]) -> list[tuple[str, list[tuple[str, int, float]]]]:
    return [(site.kind, [(norm.module, norm.channels_per_group, norm.kept) for norm in site.norms]) for site in injections]


@pytest.mark.parametrize(
    ("norm", "size", "kept"),
    [("batch", 32, 0.0), ("instance", 1, 0.0), ("group of 2", 2, 0.5), ("group of 4", 4, 0.75), ("one group", 32, 1.0)],
)
def test_planes_of_a_shared_time(norm: str, size: int, kept: float) -> None:
    injections = found(OdeFunction(NORMS[norm]), OdeFunction.inputs())
    assert reached(injections) == [("concat", [("norm2", size, kept)]), ("concat", [("norm3", size, kept)])]
    assert [site.is_shared for site in injections] == [True, True]


@pytest.mark.parametrize(("norm", "kept"), [("batch", 1.0), ("instance", 0.0), ("group of 4", 0.75)])
def test_an_offset_for_each_sample(norm: str, kept: float) -> None:
    (site,) = found(res_block(norm), ResBlock.inputs())
    assert (site.kind, site.is_shared, site.layout) == ("add", False, "channels first")
    assert [(reached.module, reached.kept) for reached in site.norms] == [("block2.0", kept)]


def test_scale_and_shift_behind_a_norm_reach_none() -> None:
    sites = found(AdaptiveBlock(), ResBlock.inputs())
    assert [(site.kind, site.behind, site.norms) for site in sites] == [("scale", "norm", ()), ("add", "norm", ())]


def test_gates_and_contexts_of_the_features_are_no_time() -> None:
    assert found(ContextBlock(), torch.randn(2, 3, 8, 8)) == []


def test_a_column_of_a_vector_field() -> None:
    (site,) = found(VectorField(), (torch.tensor(0.5), torch.randn(8, 2)))
    assert reached([site]) == [("concat", [("norm", 16, 0.0)])]


@pytest.mark.parametrize(
    "planes",
    [
        lambda t, x: t.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:]),
        lambda t, x: t.view(-1, 1, 1, 1).repeat(1, 1, *x.shape[2:]),
        lambda t, x: torch.broadcast_to(t.view(-1, 1, 1, 1), x[:, :1].shape),
        lambda t, x: torch.ones_like(x[:, :1]) * t.view(-1, 1, 1, 1),
        lambda t, x: x.new_full((len(x), 1, *x.shape[2:]), 2.0) * t.view(-1, 1, 1, 1) / 2,
    ],
    ids=["expand", "repeat", "broadcast_to", "ones_like", "new_full"],
)
def test_spellings_of_a_plane(planes: Any) -> None:
    class Spelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 8, 3), nn.InstanceNorm2d(8)

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.norm(self.conv(torch.cat([x, planes(t, x)], 1)))

    assert reached(found(Spelled(), (torch.rand(2), torch.randn(2, 3, 8, 8)))) == [("concat", [("norm", 1, 0.0)])]


def test_a_time_that_varies_over_positions_is_not_taken_away() -> None:
    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 8, 3), nn.InstanceNorm2d(8)
            self.register_buffer("grid", torch.linspace(-1, 1, 64).view(1, 1, 8, 8))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            planes = (t * self.grid).expand(len(x), 1, 8, 8)
            return self.norm(self.conv(torch.cat([planes, x], 1)))

    assert found(Grid(), (torch.tensor(0.5), torch.randn(2, 3, 8, 8))) == []


def test_an_activation_between_bends_the_offset() -> None:
    class Bent(ResBlock):
        def forward(self, x: Tensor, temb: Tensor) -> Tensor:
            return self.block2((self.block1(x) + self.temb_proj(temb)[:, :, None, None]).relu())

    (site,) = found(Bent(nn.InstanceNorm2d), ResBlock.inputs())
    assert site.norms == ()


def test_a_convolution_between_keeps_it_an_offset() -> None:
    class Convolved(ResBlock):
        def __init__(self) -> None:
            super().__init__(nn.InstanceNorm2d)
            self.between = nn.Conv2d(64, 64, 3)

        def forward(self, x: Tensor, temb: Tensor) -> Tensor:
            return self.block2(self.between(self.block1(x) + self.temb_proj(temb)[:, :, None, None]) / 2)

    assert reached(found(Convolved(), ResBlock.inputs())) == [("add", [("block2.0", 1, 0.0)])]


# Real networks.


def unet(**options: Any) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    shape = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    model: nn.Module = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        add_attention=False, **shape, **options,
    )  # fmt: skip
    return model


def test_a_diffusers_unet_adds_its_time_before_the_second_norm_of_each_block() -> None:
    model = unet()
    sites = found(model, (torch.randn(2, 1, 8, 8), torch.tensor([3, 7])))
    blocks = ["down_blocks.0.resnets.0", "down_blocks.1.resnets.0", "mid_block.resnets.0"]
    assert [site.node.module for site in sites][:3] == blocks
    assert reached(sites)[:3] == [("add", [(f"{block}.norm2", size, 1 - 1 / size)]) for block, size in zip(blocks, (2, 4, 4), strict=True)]
    assert len(sites) == sum(type(module).__name__ == "ResnetBlock2D" for module in model.modules())


def test_a_diffusers_unet_with_scale_and_shift_is_told_apart() -> None:
    sites = found(unet(resnet_time_scale_shift="scale_shift"), (torch.randn(2, 1, 8, 8), torch.tensor([3, 7])))
    assert {site.kind for site in sites} == {"scale", "add"}
    assert {site.norms for site in sites} == {()}
    assert all(site.behind.endswith("norm2") for site in sites)


def test_a_diffusion_transformer_scales_and_shifts_its_tokens() -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, num_layers=1, sample_size=8, norm_num_groups=2
    )
    inputs = {"hidden_states": torch.randn(2, 2, 8, 8), "timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([0, 1])}
    sites = found(model, inputs)
    assert {site.kind for site in sites} == {"scale", "add"}
    assert {site.layout for site in sites} == {"channels last"}
    assert all(norm.kept == 1 for site in sites for norm in site.norms)
    assert any(site.behind for site in sites)


def test_networks_without_a_time_have_none() -> None:
    timm = pytest.importorskip("timm")
    assert found(timm.create_model("seresnet18"), torch.randn(2, 3, 32, 32)) == []
