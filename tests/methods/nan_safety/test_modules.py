"""Same values as the naive forms where those are finite; finite value and gradient where they are not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pl_normkit import audit_loss
from pl_normkit.errors import ConfigError, NothingMatchedError
from pl_normkit.methods.nan_safety.fix import replace_unsafe_losses
from pl_normkit.nn import BinaryFocalLoss, BinaryLogLoss, RMSELoss, SILogLoss, safe_log, safe_power, safe_sqrt, stable_variance

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def naive_bts(pred: Tensor, gt: Tensor, mask: Tensor) -> Tensor:
    g = torch.log(pred[mask]) - torch.log(gt[mask])
    return 10 * torch.sqrt((g**2).mean() - 0.85 * g.mean() ** 2)


def naive_adabins(pred: Tensor, gt: Tensor, mask: Tensor) -> Tensor:
    g = torch.log(pred[mask]) - torch.log(gt[mask])
    return 10 * torch.sqrt(torch.var(g) + 0.15 * g.mean() ** 2)


def gradient(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def all_finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@pytest.mark.parametrize(("form", "naive"), [("bts", naive_bts), ("adabins", naive_adabins)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_silog_equals_the_published_forms(form: str, naive: object, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pred = (0.5 + 50 * torch.rand(2, 1, 9, 11, dtype=dtype)).requires_grad_()
    gt = 0.5 + 50 * torch.rand(2, 1, 9, 11, dtype=dtype)
    mask = gt > 10
    expected = naive(pred, gt, mask)  # type: ignore[operator]
    actual = SILogLoss(form, root=True, weight=10.0)(pred, gt, mask)  # type: ignore[arg-type]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient(actual, pred)[0], gradient(expected, pred)[0], rtol=1e-5, atol=1e-6)


def test_the_identity_between_the_two_forms_holds_to_2e_16() -> None:
    g = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.1
    assert abs(float(g.var(correction=0) + 0.15 * g.mean() ** 2 - ((g * g).mean() - 0.85 * g.mean() ** 2))) <= 2e-16


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("form", ["bts", "adabins"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("valid", [0, 1, 2])
def test_silog_is_finite_on_few_valid_pixels(form: str, root: bool, dtype: torch.dtype, valid: int) -> None:
    pred = torch.full((1, 1, 3, 3), 4.0, dtype=dtype, requires_grad=True)
    gt = torch.zeros(9, dtype=dtype)
    gt[:valid] = 2.0
    loss = SILogLoss(form, root=root)(pred, gt.view(1, 1, 3, 3))  # type: ignore[arg-type]
    assert all_finite(loss, *gradient(loss, pred))
    expected = 0.15 * math.log(2) ** 2 if valid else 0.0
    torch.testing.assert_close(loss.item(), math.sqrt(expected) if root else expected, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:var.*degrees of freedom:UserWarning")
@pytest.mark.parametrize("valid", [0, 1, 2])
def test_the_naive_variance_fails_on_few_elements(valid: int) -> None:
    g = torch.arange(valid, dtype=torch.float32)
    assert bool(g.var().isnan()) == (valid < 2)
    assert bool(g.var(correction=0).isnan()) == (valid < 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silog_on_a_perfect_fit(dtype: torch.dtype) -> None:
    gt = torch.linspace(1, 9, 9, dtype=dtype).view(1, 1, 3, 3)
    pred = gt.clone().requires_grad_()
    loss = SILogLoss(root=True, weight=10.0)(pred, gt)
    assert loss.item() == 0.0
    assert all_finite(*gradient(loss, pred))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logit", [-800.0, -95.0, -20.0, 0.0, 20.0, 800.0])
def test_silog_on_saturated_logits(dtype: torch.dtype, logit: float) -> None:
    z = torch.full((1, 1, 2, 2), logit, dtype=dtype, requires_grad=True)
    gt = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype).view(1, 1, 2, 2)
    loss = SILogLoss(root=True, weight=10.0, max_depth=80.0)(z, gt)
    assert all_finite(loss, *gradient(loss, z))


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(torch.float32, -88.73, 16.64), (torch.float64, -709.8, 36.75), (torch.bfloat16, -89.0, 6.25), (torch.float16, -17.34, 8.32)],
)
def test_where_log_of_sigmoid_breaks_and_the_fused_form_does_not(dtype: torch.dtype, low: float, high: float) -> None:
    z = torch.tensor(low - 0.6 * (dtype == torch.float64) - 0.02 * (dtype != torch.bfloat16) - 16 * (dtype == torch.float32), dtype=dtype)
    z.requires_grad_()
    naive = torch.log(torch.sigmoid(z))
    assert naive.item() == -math.inf
    assert math.isnan(float(gradient(naive, z)[0]))
    assert float(torch.sigmoid(torch.tensor(high, dtype=dtype))) == 1.0
    fused = F.logsigmoid(z)
    assert all_finite(fused, *gradient(fused, z))


def test_epsilon_after_a_float16_sigmoid_still_gives_nan() -> None:
    z = torch.tensor(-20.0, dtype=torch.float16, requires_grad=True)
    loss = torch.log((80 * torch.sigmoid(z)).float() + 1e-3)
    assert math.isfinite(loss.item())
    assert math.isnan(float(gradient(loss, z)[0]))
    stable = SILogLoss(max_depth=80.0)(z.view(1, 1), torch.ones(1, 1).half())
    assert all_finite(stable, *gradient(stable, z))


@pytest.mark.parametrize("hidden", [math.nan, math.inf, -math.inf, 0.0, -3.0])
@pytest.mark.parametrize("side", ["prediction", "target"])
def test_what_the_mask_hides_never_reaches_the_loss(hidden: float, side: str) -> None:
    pred, gt = torch.rand(2, 1, 4, 4) + 1, torch.rand(2, 1, 4, 4) + 1
    mask = torch.ones_like(gt, dtype=torch.bool)
    mask[0, 0, 0, 0] = False
    loss = SILogLoss(root=True)
    expected = loss(pred, gt, mask)
    (pred if side == "prediction" else gt)[0, 0, 0, 0] = hidden
    pred.requires_grad_()
    actual = loss(pred, gt, mask)
    assert actual.item() == expected.item()
    assert all_finite(*gradient(actual, pred))


def test_a_nan_prediction_on_a_valid_pixel_is_not_hidden() -> None:
    pred = torch.tensor([1.0, math.nan])
    assert math.isnan(float(SILogLoss()(pred, torch.ones(2))))


def test_silog_resizes_the_prediction_like_adabins() -> None:
    pred, gt = torch.rand(1, 1, 4, 4) + 1, torch.rand(1, 1, 8, 8) + 1
    resized = F.interpolate(pred, (8, 8), mode="bilinear", align_corners=True)
    assert float(SILogLoss()(pred, gt)) == float(SILogLoss()(resized, gt))


@pytest.mark.parametrize("wrong", [{"form": "eigen"}, {"variance_focus": 1.5}, {"min_depth": 0.0}, {"max_depth": -1.0}])
def test_silog_refuses_bad_options(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SILogLoss(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [SILogLoss(root=True), SILogLoss("adabins", root=True), SILogLoss(), SILogLoss(max_depth=9.0), RMSELoss()])
def test_gradcheck_depth_losses(loss: nn.Module) -> None:
    torch.manual_seed(0)
    pred = (torch.rand(1, 1, 3, 3, dtype=torch.float64) + 0.5).requires_grad_()
    gt = torch.rand(1, 1, 3, 3, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(lambda p: loss(p, gt), (pred,))


@pytest.mark.parametrize("loss", [BinaryLogLoss(), BinaryFocalLoss(), BinaryFocalLoss(0.5, None), BinaryFocalLoss(0.0, 0.5, "sum")])
def test_gradcheck_binary_losses(loss: nn.Module) -> None:
    torch.manual_seed(0)
    z = torch.randn(7, dtype=torch.float64, requires_grad=True)
    t = (torch.rand(7) > 0.5).double()
    assert torch.autograd.gradcheck(lambda logits: loss(logits, t), (z,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_binary_losses_equal_the_naive_forms(dtype: torch.dtype, reduction: str) -> None:
    torch.manual_seed(0)
    z, t = torch.randn(50, dtype=dtype), (torch.rand(50) > 0.5).to(dtype)
    wide_z, wide_t = z.double(), t.double()
    p = wide_z.sigmoid()
    focal = -(wide_t * 0.25 * (1 - p) ** 2 * p.log() + (1 - wide_t) * 0.75 * p**2 * (1 - p).log())
    log_loss = F.binary_cross_entropy_with_logits(wide_z, wide_t, reduction="none")
    for naive, ours in [(focal, BinaryFocalLoss(reduction=reduction)), (log_loss, BinaryLogLoss(reduction))]:  # type: ignore[arg-type]
        expected = {"mean": naive.mean(), "sum": naive.sum(), "none": naive}[reduction]
        torch.testing.assert_close(ours(z, t).double(), expected, rtol=2e-6, atol=1e-6)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), max_size=6),
    st.sampled_from(DTYPES),
    st.sampled_from([BinaryLogLoss(), BinaryFocalLoss(), BinaryFocalLoss(5.0, None)]),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_binary_losses_are_finite_on_finite_logits(values: list[float], dtype: torch.dtype, loss: nn.Module, label: float) -> None:
    bound = min(torch.finfo(dtype).max, 1e30)
    z = torch.tensor(values, dtype=torch.float64).clamp(-bound, bound).to(dtype).requires_grad_()
    value = loss(z, torch.full_like(z, label))
    assert all_finite(value, *gradient(value, z))


DEPTHS = st.floats(0, 1e4, width=32, allow_subnormal=True)
TARGETS = st.one_of(DEPTHS, st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e-42]))


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.lists(st.tuples(DEPTHS, TARGETS), max_size=6), st.sampled_from(DTYPES), st.booleans(), st.sampled_from(["bts", "adabins"]))
def test_silog_is_finite_on_finite_depths(pairs: list[tuple[float, float]], dtype: torch.dtype, root: bool, form: str) -> None:
    pred = torch.tensor([p for p, _ in pairs], dtype=dtype, requires_grad=True)
    gt = torch.tensor([t for _, t in pairs], dtype=dtype)
    value = SILogLoss(form, root=root)(pred, gt, interpolate=False)  # type: ignore[arg-type]
    assert all_finite(value, *gradient(value, pred))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=6), st.sampled_from(DTYPES), st.booleans())
def test_rmse_is_finite(values: list[float], dtype: torch.dtype, constant: bool) -> None:
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    target = x.detach().clone() if constant else torch.zeros_like(x)
    value = RMSELoss()(x, target)
    assert all_finite(value, *gradient(value, x))
    expected = (x.detach().double() - target.double()).square().mean().sqrt()
    torch.testing.assert_close(value.detach().double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_rmse_neither_underflows_nor_overflows(size: float) -> None:
    x = torch.full((4,), size, requires_grad=True)
    value = RMSELoss()(x, torch.zeros(4))
    torch.testing.assert_close(value.item(), size, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradient(value, x)[0], torch.full((4,), 0.25))


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.lists(st.floats(-(2.0**59), 2.0**59, width=32), max_size=6), st.data())
def test_stable_variance(values: list[float], data: st.DataObject) -> None:
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))), dtype=torch.bool)
    correction = data.draw(st.sampled_from([0, 1]))
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    value = stable_variance(x, mask, correction=correction)
    assert all_finite(value, *gradient(value, x))
    expected = x.detach()[mask].var(correction=correction) if int(mask.sum()) > correction else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=1e-6)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.floats(0, 2.0**99, width=32, allow_subnormal=True), st.sampled_from(DTYPES))
def test_safe_sqrt(value: float, dtype: torch.dtype) -> None:
    x = torch.tensor(min(value, torch.finfo(dtype).max), dtype=dtype, requires_grad=True)
    y = safe_sqrt(x)
    assert all_finite(y, *gradient(y, x))
    wide = x.detach().float() if dtype in (torch.float16, torch.bfloat16) else x.detach()  # processors differ in a half's own root
    torch.testing.assert_close(y.detach(), wide.sqrt().to(dtype), rtol=1e-6, atol=3e-5 if dtype == torch.float16 else 1e-6)


@pytest.mark.parametrize(("x", "expected"), [(math.inf, math.inf), (-1.0, 0.0), (0.0, 0.0)])
def test_safe_sqrt_at_the_ends(x: float, expected: float) -> None:
    assert float(safe_sqrt(torch.tensor(x))) == expected


def test_safe_sqrt_keeps_nan_and_refuses_a_bad_epsilon() -> None:
    assert math.isnan(float(safe_sqrt(torch.tensor(math.nan))))
    with pytest.raises(ValueError, match="eps"):
        safe_sqrt(torch.ones(1), 0.0)
    with pytest.raises(ValueError, match="eps"):
        safe_log(torch.ones(1), -1.0)


def test_the_where_trap() -> None:
    d = torch.zeros((), requires_grad=True)
    outside = torch.where(d > 0, torch.sqrt(d), 0.0)
    inside = torch.sqrt(torch.where(d > 0, d, 1.0))
    assert math.isnan(float(gradient(outside, d)[0]))
    assert float(gradient(inside, d)[0]) == 0.0


def test_safe_log_is_a_log_above_eps_and_a_tangent_below() -> None:
    x = torch.tensor([-1.0, 0.0, 1e-3, 2.0], requires_grad=True)
    y = safe_log(x, 1e-3)
    torch.testing.assert_close(y.detach()[2:], x.detach()[2:].log())
    torch.testing.assert_close(gradient(y.sum(), x)[0], torch.tensor([1e3, 1e3, 1e3, 0.5]))


class silog_loss(nn.Module):  # noqa: N801 (the name BTS gives it)
    def __init__(self, variance_focus: float, factor: float = 10.0) -> None:
        super().__init__()
        self.variance_focus, self.factor = variance_focus, factor

    def forward(self, depth_est: Tensor, depth_gt: Tensor, mask: Tensor) -> Tensor:
        d = torch.log(depth_est[mask]) - torch.log(depth_gt[mask])
        return torch.sqrt((d**2).mean() - self.variance_focus * (d.mean() ** 2)) * self.factor


class RMSE(nn.Module):
    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return torch.sqrt(F.mse_loss(pred, target))


class Holder(nn.Module):
    def __init__(self, **losses: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        for name, loss in losses.items():
            self.add_module(name, loss)


def test_replace_swaps_what_agrees_and_is_idempotent_and_reversible() -> None:
    model = Holder(depth=silog_loss(0.85), other=RMSE(), scaled=silog_loss(0.85, factor=3.0))
    before = dict(model.named_modules())
    changes = replace_unsafe_losses(model)
    assert sorted(change.module for change in changes.made) == ["depth", "other"]
    assert [change.module for change in changes.skipped] == ["scaled"]
    assert isinstance(model.get_submodule("depth"), SILogLoss)
    assert isinstance(model.get_submodule("other"), RMSELoss)
    assert not replace_unsafe_losses(model).made
    changes.undo()
    assert dict(model.named_modules()) == before


def test_replace_takes_your_own_classes() -> None:
    model = Holder(mine=nn.L1Loss())
    assert replace_unsafe_losses(model, {nn.L1Loss: lambda old: SILogLoss()}).made[0].module == "mine"


def test_replace_raises_when_there_is_nothing() -> None:
    with pytest.raises(NothingMatchedError):
        replace_unsafe_losses(Holder(fine=nn.L1Loss()))


def library_losses() -> dict[str, tuple[nn.Module, tuple[Tensor, Tensor]]]:
    smp = pytest.importorskip("segmentation_models_pytorch.losses")
    pixels = (torch.rand(2, 1, 6, 6) * 4 - 2, (torch.rand(2, 1, 6, 6) > 0.5).float())
    several = (torch.rand(2, 3, 6, 6) * 4 - 2, torch.randint(0, 3, (2, 6, 6)))
    return {
        "tversky": (smp.TverskyLoss("binary", gamma=0.75), pixels),
        "tversky of classes": (smp.TverskyLoss("multiclass", gamma=0.5, smooth=1.0), several),
        "focal": (smp.FocalLoss("binary", gamma=0.5), pixels),
        "focal with alpha": (smp.FocalLoss("binary", gamma=0.5, alpha=0.25, reduction="sum"), pixels),
        "focal of classes": (smp.FocalLoss("multiclass", gamma=0.5, ignore_index=255), several),
    }


@pytest.mark.parametrize("name", ["tversky", "tversky of classes", "focal", "focal with alpha", "focal of classes"])
def test_library_losses_get_a_stable_form_of_the_same_values(name: str) -> None:
    """The search breaks the library's own form, and not the one that replaces it."""
    old, (logits, labels) = library_losses()[name]
    model = Holder(loss=old)
    assert [change.module for change in replace_unsafe_losses(model).made] == ["loss"]
    new = model.get_submodule("loss")
    torch.testing.assert_close(new(logits, labels), old(logits, labels), rtol=1e-6, atol=1e-6)
    example = (logits.clone().requires_grad_(), labels)
    assert "NK401" in {finding.code for finding in audit_loss(old, example).at_least("error")}
    assert audit_loss(new, example).at_least("error") == []


def test_library_losses_that_are_stable_are_left_alone() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch.losses")
    with pytest.raises(NothingMatchedError):
        replace_unsafe_losses(Holder(one=smp.TverskyLoss("binary"), two=smp.FocalLoss("binary"), three=smp.DiceLoss("binary")))


@pytest.mark.parametrize("exponent", [0.25, 0.75, 1.0])
def test_safe_power(exponent: float) -> None:
    x = torch.tensor([-1.0, 0.0, 1e-30, 1e-6, 0.3, 2.0], requires_grad=True)
    y = safe_power(x, exponent)
    torch.testing.assert_close(y[3:], x[3:] ** exponent, rtol=1e-6, atol=0)
    assert (y[:2] == 0).all()
    assert all_finite(gradient(y.sum(), x)[0])
    with pytest.raises(ValueError, match="exponent"):
        safe_power(x, 1.5)
