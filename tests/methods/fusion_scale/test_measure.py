from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_normkit.errors import DataError
from pl_normkit.methods.fusion_scale import FusionScale, measure_fusion_scales
from tests.methods.fusion_scale.models import Nested, OwnDecoder, SharedFusion, SumDecoder, images


def by_hand(model: OwnDecoder, loader: list[Tensor]) -> list[tuple[float, float]]:
    with torch.no_grad():
        levels = [model.levels(x) for x in loader]
    branches = (torch.cat([fine for fine, _ in levels]), torch.cat([F.interpolate(c, f.shape[2:], mode="bilinear") for f, c in levels]))
    return [(float(b.double().mean()), float(b.double().std(correction=0))) for b in branches]


def test_every_branch_is_measured_over_all_batches() -> None:
    model, loader = OwnDecoder(), images(3)
    (fusion,) = measure_fusion_scales(model, loader)

    assert [(b.mean, b.std) for b in fusion.branches] == [(pytest.approx(m), pytest.approx(s)) for m, s in by_hand(model, loader)]
    weights = [b.channels * b.std**2 for b in fusion.branches]
    assert [b.share for b in fusion.branches] == [pytest.approx(w / sum(weights)) for w in weights]
    assert (fusion.kind, fusion.module, fusion.consumer, [b.channels for b in fusion.branches]) == ("concat", "", "fuse", [8, 6])
    assert fusion.ratio == pytest.approx(fusion.branches[0].std / fusion.branches[1].std)
    assert 2**fusion.log2_spread == pytest.approx(fusion.ratio)
    assert fusion.branches[0].resize == ""
    assert fusion.branches[1].resize.startswith("bilinear 8x8 to 16x16 (tests/methods/fusion_scale/models.py:")
    assert "14" not in str(fusion)
    assert "std ratio" in str(fusion)


def test_a_sum_is_measured_by_operand() -> None:
    model, loader = SumDecoder(), images()
    (fusion,) = measure_fusion_scales(model, loader)
    with torch.no_grad():
        fine = torch.cat([model.lateral(model.levels(x)[0]) for x in loader])
        coarse = torch.cat([model.up(model.levels(x)[1]) for x in loader])
    assert fusion.kind == "sum"
    assert [b.std for b in fusion.branches] == [pytest.approx(float(t.double().std(correction=0))) for t in (fine, coarse)]


def test_each_call_of_a_shared_fusion_is_listed() -> None:
    found = measure_fusion_scales(SharedFusion(), images())
    assert len(found) == 2
    assert found[1].branches[0].std > found[0].branches[0].std


def test_fusions_are_listed_in_execution_order() -> None:
    assert [fusion.consumer for fusion in measure_fusion_scales(Nested(), images())] == ["fuse1.0", "fuse2"]


def test_measuring_changes_nothing() -> None:
    model = Nested()
    model.fuse1.append(nn.Dropout(0.5))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    first = measure_fusion_scales(model, images())
    assert first == measure_fusion_scales(model, images())
    assert model.training
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class TakesDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = OwnDecoder()

    def forward(self, image: Tensor, scale: float = 1.0) -> Tensor:
        out: Tensor = self.net(image * scale)
        return out


LOADERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[], nn.Module], Callable[[Any], Any] | None]] = {
    "tensors": (lambda x: x, OwnDecoder, None),
    "tuples": (lambda x: (x, torch.zeros(4)), OwnDecoder, None),
    "lists": (lambda x: [x, torch.zeros(4)], OwnDecoder, None),
    "dicts that forward names": (lambda x: {"image": x, "mask": torch.zeros(4, 16, 16), "name": "a"}, TakesDict, None),
    "dicts with one image": (lambda x: {"img": x, "label": torch.zeros(4, dtype=torch.long)}, OwnDecoder, None),
    "anything, through inputs": (lambda x: ("a", {"deep": x}), OwnDecoder, lambda batch: batch[1]["deep"]),
    "keyword inputs": (lambda x: x, TakesDict, lambda batch: {"image": batch, "scale": 1.0}),
}


@pytest.mark.parametrize("name", LOADERS)
def test_loaders_of(name: str) -> None:
    wrap, build, inputs = LOADERS[name]
    torch.manual_seed(1)
    expected = measure_fusion_scales(OwnDecoder(), images())[0]
    torch.manual_seed(1)
    found = measure_fusion_scales(build(), [wrap(x) for x in images()], inputs=inputs)[0]
    assert [b.std for b in found.branches] == [b.std for b in expected.branches]


def test_an_iterator_that_is_read_once_loses_no_batch() -> None:
    torch.manual_seed(1)
    model = OwnDecoder()
    assert measure_fusion_scales(model, iter(images(3))) == measure_fusion_scales(model, images(3))
    assert measure_fusion_scales(model, images(3), max_batches=2) == measure_fusion_scales(model, images(2))


def test_odd_sizes_and_last_batches_of_another_size() -> None:
    loader = [*images(1, size=17), images(1, size=17, samples=1)[0], *images(1, size=13)]
    (fusion,) = measure_fusion_scales(OwnDecoder(), loader)
    assert all(branch.std > 0 for branch in fusion.branches)


def with_nan() -> list[Tensor]:
    loader = images(2)
    loader[1][0, 0, 0, 0] = torch.nan
    return loader


@pytest.mark.parametrize(
    ("model", "loader", "what", "where"),
    [
        (OwnDecoder(), [], "the loader gives no batch", ""),
        (OwnDecoder(), with_nan(), "values that are not finite", "batch 1"),
        (OwnDecoder(), [1e30 * images()[0] * 1e8], "values that are not finite", "batch 0"),
        (OwnDecoder(), [images()[0] * 1e37], "features are not finite", "batch 0"),
        (OwnDecoder(), ["a"], "a batch that is no tensor, sequence or dict", ""),
        (OwnDecoder(), [{"a": images()[0], "b": images()[0]}], "unclear which entry", ""),
    ],
)
def test_bad_data_is_refused(model: nn.Module, loader: list[Any], what: str, where: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        measure_fusion_scales(model, loader, example_inputs=images()[0] if loader else None)
    assert where in caught.value.where


def test_a_batch_norm_over_one_value_is_refused_with_a_reason() -> None:
    model = smp.DeepLabV3("resnet18", encoder_weights=None)
    with pytest.raises(DataError, match="one value per channel") as caught:
        measure_fusion_scales(model, [torch.randn(1, 3, 32, 32)])
    assert "drop_last" in caught.value.fix


# Structure by the sources of segmentation-models-pytorch 0.6; (kind, channels of each branch).
SMP: dict[str, tuple[int, list[tuple[str, list[int]]]]] = {
    "Linknet": (64, [("sum", [256] * 2), ("sum", [128] * 2), ("sum", [64] * 2), ("sum", [64] * 2)]),
    "FPN": (64, [("sum", [256] * 2)] * 3 + [("sum", [128] * 4)]),
    "PAN": (128, [("sum", [1, 1]), ("sum", [1, 1]), ("sum", [32, 32]), ("sum", [32] * 2), ("sum", [32] * 2), ("sum", [32] * 2)]),
    "UPerNet": (64, [("concat", [512] + [256] * 4), *[("sum", [256] * 2)] * 3, ("concat", [256] * 4)]),
}


@pytest.mark.parametrize("name", SMP)
def test_fusions_of_smp(name: str) -> None:
    size, expected = SMP[name]
    model = getattr(smp, name)("resnet18", encoder_weights=None)
    found: list[FusionScale] = measure_fusion_scales(model, [torch.randn(2, 3, size, size)])
    assert [(fusion.kind, [branch.channels for branch in fusion.branches]) for fusion in found] == expected
    assert all(fusion.is_multi_level for fusion in found)
    assert all(branch.std > 0 for fusion in found for branch in fusion.branches)
