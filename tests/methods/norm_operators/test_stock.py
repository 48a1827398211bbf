"""`to_stock_norms` keeps the function within float32's rounding, and refuses what cannot hold it."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from pl_normkit.errors import EditError, NothingMatchedError
from pl_normkit.methods.norm_operators import swap_norms, to_stock_norms


def switched(model: nn.Module, rows: torch.Tensor) -> nn.Module:
    """After one batch in training mode, with every norm at its constant."""
    torch.manual_seed(0)
    swap_norms(model, to="fixed_std")
    model.train()(rows)
    for module in model.modules():
        if hasattr(module, "share"):
            module.share.zero_()
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_function_stays(kind: type[nn.Module], dtype: torch.dtype, bound: float) -> None:
    model = nn.Sequential(nn.Linear(6, 7), kind(7), nn.Linear(7, 3), nn.LayerNorm(3, bias=False)).to(dtype)
    rows = torch.randn(20, 6, dtype=dtype) * 3
    model = switched(model, rows)
    before = model(rows)
    changes = to_stock_norms(model)
    assert [type(model[1]), type(model[3])] == [kind, nn.LayerNorm]
    assert float((model(rows) - before).abs().max() / before.abs().max()) < bound
    changes.undo()
    assert torch.equal(model(rows), before)


@torch.no_grad()
def test_the_checkpoint_loads_into_the_original_class() -> None:
    options = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
    image = torch.randn(2, 3, 16, 16)
    model = switched(timm.create_model("vit_tiny_patch16_224", **options), image)
    before = model(image)
    to_stock_norms(model)
    stock = timm.create_model("vit_tiny_patch16_224", **options).eval()
    stock.load_state_dict(model.state_dict())
    for module in stock.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e12
    assert float((stock(image) - before).abs().max() / before.abs().max()) < 1e-5


def test_float16_is_refused_because_it_overflows() -> None:
    rows = torch.randn(20, 6)
    model = switched(nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7)), rows).half()
    with pytest.raises(EditError, match="float16"):
        to_stock_norms(model)
    model = model.float()
    to_stock_norms(model)
    assert not bool(model[1].weight.half().isfinite().all())


def test_norms_that_have_not_switched_are_left_alone() -> None:
    model = switched(
        nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.LayerNorm(7), nn.LayerNorm(7, elementwise_affine=False)), torch.randn(20, 6)
    )
    model[1].share.fill_(1)
    skipped = ["1: it has not switched to its constant", "3: it has no scale that could take the constant in"]
    assert [str(change) for change in to_stock_norms(model).skipped] == skipped
    with pytest.raises(NothingMatchedError, match="has not switched"):
        to_stock_norms(model)
