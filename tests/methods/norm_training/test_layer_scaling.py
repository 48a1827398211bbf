"""`line_s` against its formula, on real checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pl_normkit.errors import ConfigError, DataError
from pl_normkit.methods.norm_training import line_s

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "num_heads": 2, "num_classes": 3, "depth": 3}
RESNET = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]


def pair(name: str = "vit_tiny_patch16_224", **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    old, new = (timm.create_model(name, **(VIT if "vit" in name else {"num_classes": 3}), **options) for _ in range(2))
    return old.double().state_dict(), new.double().state_dict()


def test_a_vit_by_depth() -> None:
    old, new = pair()
    mixed = line_s(old, new, alpha=0.2, beta=0.6, after=0.9)
    factors = {"blocks.0": 0.2, "blocks.1": 0.5, "blocks.2": 0.8, "norm": 0.9, "head": 0.9}
    for name, value in mixed.items():
        factor = next((found for path, found in factors.items() if name.startswith(f"{path}.")), 0.2)
        torch.testing.assert_close(value, (1 - factor) * old[name] + factor * new[name], rtol=1e-12, atol=1e-14)
    assert list(mixed) == list(new)
    timm.create_model("vit_tiny_patch16_224", **VIT).load_state_dict(mixed)


def test_named_blocks_and_counters_and_the_published_rest() -> None:
    old, new = pair("resnet18")
    new = {name: value + 5 if name.endswith("num_batches_tracked") else value for name, value in new.items()}
    mixed = line_s(old, new, alpha=0.3, blocks=RESNET)
    assert all(torch.equal(mixed[name], new[name]) for name in new if name.startswith("layer4.1.") or name.endswith("num_batches_tracked"))
    factor = 0.3 + 0.7 * 3 / 7
    torch.testing.assert_close(mixed["layer2.1.conv1.weight"], old["layer2.1.conv1.weight"].lerp(new["layer2.1.conv1.weight"], factor))
    torch.testing.assert_close(mixed["fc.weight"], old["fc.weight"].lerp(new["fc.weight"], 0.3))


@given(alpha=st.floats(-1, 2), beta=st.floats(-1, 2))
def test_the_ends_are_the_checkpoints(alpha: float, beta: float) -> None:
    old = {f"net.layer_{block}.w": torch.tensor([float(block)]) for block in range(12)}
    new = {name: value + 1 for name, value in old.items()}
    moved = [float(value - old[name]) for name, value in line_s(old, new, alpha=alpha, beta=beta).items()]
    assert moved == pytest.approx([alpha + beta * block / 11 for block in range(12)], abs=1e-5)
    assert line_s(old, new, alpha=1, beta=0) == new
    assert line_s(old, new, alpha=0, beta=0) == old


def test_a_new_head_must_be_named() -> None:
    old, new = pair()
    new["head.weight"] = torch.zeros(7, 8)
    with pytest.raises(DataError, match="another shape"):
        line_s(old, new, alpha=0.1)
    del old["head.bias"]
    with pytest.raises(DataError, match="only one checkpoint"):
        line_s(old, new, alpha=0.1)
    mixed = line_s(old, new, alpha=0.1, keep=["head"])
    assert torch.equal(mixed["head.weight"], new["head.weight"])
    assert mixed["head.weight"] is not new["head.weight"]


BAD: dict[str, Mapping[str, Any]] = {
    "there are no such blocks": {"blocks": "layers"},
    "blocks.7": {"blocks": ["blocks.0", "blocks.7"]},
    "no entry at a path": {"keep": ["haed"]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_refused(message: str) -> None:
    old, new = pair()
    with pytest.raises(ConfigError, match=message):
        line_s(old, new, alpha=0.1, **BAD[message])


def test_blocks_of_several_rows_are_asked_for() -> None:
    old, new = pair("resnet18")
    with pytest.raises(ConfigError, match="the blocks cannot be told"):
        line_s(old, new, alpha=0.1)
