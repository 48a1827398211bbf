"""Each operator equals its formula written out, values and gradients, in both layouts; and survives what runs do to modules."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from pl_normkit.errors import ConfigError, DataError, NothingMatchedError
from pl_normkit.methods.norm_operators import norm_inputs, operators, swap_norms
from pl_normkit.methods.norm_operators.operators import unified as unified_file
from pl_normkit.methods.norm_operators.places import old_norm
from tests.methods.norm_operators import reference_norms
from tests.methods.norm_operators.operator_nets import IMAGES, LINEAR, ROWS, WIDTH, Net, RowFirst, given, random
from tests.methods.norm_operators.tiny_models import trained_like


def swapped_row(to: str, *, axis: int = -1, **options: Any) -> nn.Module:
    model = trained_like(RowFirst(nn.LayerNorm(WIDTH) if axis == -1 else timm.layers.LayerNorm2d(WIDTH, eps=1e-5)))
    swap_norms(model, to, **options)
    return trained_like(model).train()


def test_each_file_of_the_folder_is_an_operator_and_has_a_reference() -> None:
    files = {file.stem for file in Path(operators.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(operators.operators()) == files == set(ROWS) | IMAGES | LINEAR
    assert all(operator.formula and "arXiv" in operator.source and operator.when for operator in operators.operators().values())


FILE = """
from torch import nn

from pl_normkit.methods.norm_operators.operators import Operator
from pl_normkit.methods.norm_operators.places import row_norms

OPERATOR = Operator("nothing", "x", "arXiv 0000.00000", "layer norms", row_norms, lambda old, options: nn.Identity(), "no", "never")
"""


def test_a_file_more_is_an_operator_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one_more_norm.py").write_text(FILE)
    monkeypatch.setattr(operators, "__path__", [*operators.__path__, str(tmp_path)])
    operators.operators.cache_clear()
    try:
        model = nn.Sequential(nn.LayerNorm(4))
        swap_norms(model, "nothing")
        assert type(model[0]) is nn.Identity
        with pytest.raises(ConfigError, match="nothing has no option 'alpha'"):
            swap_norms(model, "nothing", alpha=1)
    finally:
        operators.operators.cache_clear()


@pytest.mark.parametrize("to", sorted(reference_norms.ROWS))
@pytest.mark.parametrize("shape", [(3, WIDTH), (2, 3, 5, WIDTH), (2, WIDTH, 3, 5)], ids=str)
def test_values_and_gradients_equal_the_formula(to: str, shape: tuple[int, ...]) -> None:
    axis = 1 if shape[-1] != WIDTH else -1
    model = swapped_row(to, axis=axis)
    if to == "prepbn":
        model.norm.share.fill_(0.3)
    x, back = random(*shape).requires_grad_(), random(*shape, seed=1)
    parameters = dict(model.norm.named_parameters())
    rows = x.movedim(axis, -1)
    expected = reference_norms.ROWS[to](rows, parameters).movedim(-1, axis)
    with given(model, shape[0]):
        actual = model(x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, *parameters.values()]
    for mine, theirs in zip(torch.autograd.grad(actual, leaves, back), torch.autograd.grad(expected, leaves, back), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("to", ["rmsnorm", "eln", "prepbn", "tdln", "dyt", "scalenorm", "fixed_std"])
def test_gradients_equal_finite_differences(to: str) -> None:
    model = swapped_row(to)
    names = [name for name, _ in model.named_parameters()]
    buffers = copy.deepcopy(dict(model.named_buffers()))

    def call(x: Tensor, *values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(model, {**copy.deepcopy(buffers), **dict(zip(names, values, strict=True))}, (x,))
        return result

    with given(model, 3):
        assert torch.autograd.gradcheck(call, (random(3, WIDTH).requires_grad_(), *model.parameters()))


def step(model: nn.Module, x: Tensor, back: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of x and gamma after one training step."""
    x = x.clone().requires_grad_()
    with norm_inputs(model, mask=mask):
        y = model(x)
        gradients = torch.autograd.grad(y, [x, model.norm.weight], back)
    return y.detach(), *gradients


MASK = torch.tensor([[True, True, False, True, True], [True, True, True, False, False]])


@pytest.mark.parametrize("warmup", [0, 3])
def test_powernorm_equals_its_formula_over_steps(warmup: int) -> None:
    model = swapped_row("powernorm", warmup=warmup)
    p = {name: value.detach() for name, value in model.norm.named_parameters()}
    model.norm.second_moment.fill_(1)
    model.norm.gradient_mean.zero_()
    xs, backs = [random(2, 5, WIDTH, seed=i) * (1 + i) for i in range(6)], [random(2, 5, WIDTH, seed=90 + i) for i in range(6)]
    rows = [(x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()) for x in xs]
    outputs, inner, phi = reference_norms.power(rows, backs, p, MASK, warmup)
    for x, back, expected, gradient in zip(xs, backs, outputs, inner, strict=True):
        actual, mine, _ = step(model, x, back, MASK)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        leaf = x.clone().requires_grad_()
        scaled = leaf / (leaf.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(mine, torch.autograd.grad(scaled, leaf, gradient)[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.norm.second_moment, phi, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.eval()(xs[0]), rows[0] / (phi + 1e-5).sqrt() * p["weight"] + p["bias"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("warmup", "outliers"), [(0, False), (3, True), (20, False)])
def test_unified_equals_its_formula_over_steps(warmup: int, outliers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unified_file, "UNCOMPENSATED", 5)
    model = swapped_row("unified", warmup=warmup, window=3, outliers=outliers)
    p = {name: value.detach() for name, value in model.norm.named_parameters()}
    xs = [random(2, 5, WIDTH, seed=i) * (9 if i == 7 else 1) for i in range(10)]
    backs = [random(2, 5, WIDTH, seed=90 + i) for i in range(10)]
    outputs, inner, gammas, running, skipped = reference_norms.unified(xs, backs, p, MASK, warmup, 3, outliers, 5)
    for x, back, expected, gradient, gamma in zip(xs, backs, outputs, inner, gammas, strict=True):
        actual, mine, mine_gamma = step(model, x, back, MASK)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(mine, gradient, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(mine_gamma, gamma, rtol=1e-10, atol=1e-10)
    assert model.norm.skipped.item() == skipped
    assert (skipped > 0) is outliers
    torch.testing.assert_close(model.norm.running_var, running, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.eval()(xs[0]), xs[0] / (running + 1e-5).sqrt() * p["weight"] + p["bias"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("to", ["powernorm", "unified", "prepbn", "fixed_std"])
def test_what_the_mask_leaves_out_is_not_seen(to: str) -> None:
    """Padding may hold anything, NaN too; evaluation and the other tokens are as without it."""
    model, alone = (swapped_row(to) for _ in range(2))
    x = random(2, 5, WIDTH)
    padded = torch.where(MASK[..., None], x, float("nan"))
    with norm_inputs(model, mask=MASK):
        y = model(padded)
    expected = alone(x[MASK])
    torch.testing.assert_close(y[MASK], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.state_dict(), alone.state_dict(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.eval()(x)[MASK], alone.eval()(x[MASK]), rtol=1e-12, atol=1e-12)
    with pytest.raises(DataError, match="another shape than the tokens"), norm_inputs(model.train(), mask=MASK[:1]):
        model(x)
    assert model.norm.mask is None


def test_inputs_beside_x_reach_a_norm_or_are_refused() -> None:
    with pytest.raises(NothingMatchedError, match="no norm of the model takes mask"), norm_inputs(swapped_row("dyt"), mask=MASK):
        pass
    with pytest.raises(DataError, match="without a time"):
        swapped_row("tdln")(random(2, WIDTH))
    model = swapped_row("tdln")
    with pytest.raises(DataError, match="3 times, 2 samples"), norm_inputs(model, time=random(3)):
        model(random(2, WIDTH))


@pytest.mark.parametrize("to", ["tdln", "prepbn", "fixed_std"])
def test_what_keeps_the_function_starts_as_the_old_norm(to: str) -> None:
    model = trained_like(RowFirst(nn.LayerNorm(WIDTH))).train()
    before = model(random(4, WIDTH))
    swap_norms(model, to)
    with given(model, 4):
        torch.testing.assert_close(model(random(4, WIDTH)), before, rtol=1e-13, atol=1e-14)


def test_fixed_std_switches_to_the_constant_it_measured() -> None:
    model = swapped_row("fixed_std")
    model.norm.std.zero_()
    x, y = random(4, WIDTH), random(4, WIDTH, seed=1) * 3
    deviations = [(rows.var(-1, correction=0) + 1e-5).sqrt().mean() for rows in (x, y)]
    model(x), model(y)
    std = 0.9 * deviations[0] + 0.1 * deviations[1]
    assert model.norm.std.item() == pytest.approx(std.item(), rel=1e-12)
    model.norm.share.zero_()
    expected = (x - x.mean(-1, keepdim=True)) / std * model.norm.weight + model.norm.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert model.norm.std.item() == pytest.approx(std.item(), rel=1e-12)


def test_prepbn_evaluates_as_a_gain_and_a_shift_and_tracks_as_torch() -> None:
    model, batch = swapped_row("prepbn"), nn.BatchNorm1d(WIDTH).double()
    model.norm.running_mean.zero_()
    model.norm.running_var.fill_(1)
    for i in range(3):
        model(random(5, WIDTH, seed=i))
        batch(random(5, WIDTH, seed=i))
    torch.testing.assert_close(model.norm.running_mean, batch.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.norm.running_var, batch.running_var, rtol=1e-12, atol=1e-12)
    norm, x = model.eval().norm, random(4, WIDTH, seed=9)
    gain = norm.batch_weight / (norm.running_var + 1e-5).sqrt()
    expected = x * (gain + norm.eta) + norm.batch_bias - gain * norm.running_mean
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


# -- norms of images


def image_net(to: str, **options: Any) -> tuple[Net, Any]:
    net = trained_like(Net()).train()
    return net, swap_norms(net, to, example_inputs=random(2, 3, 9, 7), **options)


def compare(norm: nn.Module, x: Tensor, expected: Tensor, rounding: float = 1e-10) -> None:
    """Values, and gradients of x and of all parameters, which the reference reads too."""
    actual, back = norm(x), random(*expected.shape, seed=5)
    torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding)
    leaves = [x, *norm.parameters()]
    for mine, theirs in zip(torch.autograd.grad(actual, leaves, back), torch.autograd.grad(expected, leaves, back), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=10 * rounding, atol=10 * rounding)


def test_groupnorm() -> None:
    net, changes = image_net("groupnorm")
    assert [change.module for change in changes.made] == ["stem.1", "first.1", "second.1"]
    norm, x = net.second[1], random(3, 10, 5, 3).requires_grad_()
    assert norm.num_groups == 2
    compare(norm, x, reference_norms.group(x, 2) * reference_norms.images(norm.weight) + reference_norms.images(norm.bias))


def test_bcn() -> None:
    net, _ = image_net("bcn", groups=3)
    norm = trained_like(net.stem[1]).train()
    x = random(3, 6, 5, 3).requires_grad_()
    inner = reference_norms.batch(x) * reference_norms.images(norm.batch.weight) + reference_norms.images(norm.batch.bias)
    gain, shift = (value.repeat_interleave(2).reshape(1, -1, 1, 1) for value in (norm.weight, norm.bias))
    compare(norm, x, reference_norms.group(inner, 3) * gain + shift)


def test_ibn_a_takes_first_norms_of_branches_but_those_of_the_last_stage() -> None:
    net, changes = image_net("ibn_a")
    assert [change.module for change in changes.made] == ["first.1"]
    assert [change.module for change in changes.skipped] == ["second.1"]
    norm, x = net.first[1], random(3, 6, 5, 3).requires_grad_()
    gain, shift = (torch.cat([getattr(norm.instance, name), getattr(norm.batch, name)]) for name in ("weight", "bias"))
    parts = torch.cat([reference_norms.instance(x[:, :3]), reference_norms.batch(x[:, 3:])], 1)
    compare(norm, x, parts * reference_norms.images(gain) + reference_norms.images(shift))


def test_ibn_a_copies_parameters_and_statistics_of_odd_numbers_of_channels() -> None:
    old = trained_like(nn.BatchNorm2d(7))
    old.running_mean.copy_(torch.arange(7))
    new = operators.operators()["ibn_a"].make(old_norm(old), {"ratio": 0.5})
    assert torch.equal(torch.cat([new.instance.weight, new.batch.weight]), old.weight)
    assert torch.equal(torch.cat([new.instance.bias, new.batch.bias]), old.bias)
    assert new.batch.running_mean.tolist() == [3.0, 4.0, 5.0, 6.0]


def test_evonorm_replaces_the_activation_too() -> None:
    net, changes = image_net("evonorm", groups=3)
    assert [change.module for change in changes.made] == ["stem.1", "stem.2", "first.1", "first.2", "second.1", "second.2"]
    assert type(net.stem[2]) is nn.Identity
    norm = trained_like(net.stem[1])
    x = random(3, 6, 5, 3).requires_grad_()
    std = torch.stack([torch.cat([(part.var(correction=0) + 1e-5).sqrt().expand_as(part) for part in sample.chunk(3)]) for sample in x])
    v, gain, shift = (reference_norms.images(value) for value in (norm.v, norm.weight, norm.bias))
    compare(norm, x, x / (1 + torch.exp(-v * x)) / std * gain + shift, rounding=1e-6)  # timm takes the deviation in float32
    changes.undo()
    assert [type(net.stem[i]) for i in (1, 2)] == [nn.BatchNorm2d, nn.ReLU]


def test_an_activation_of_several_places_keeps_its_norms() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(4), act), nn.Sequential(nn.BatchNorm2d(4), act), nn.BatchNorm2d(4))
    with pytest.raises(NothingMatchedError, match="no activation that is a module of its own"):
        swap_norms(model, "evonorm")


def test_weight_standardization_takes_convolutions_in_front_of_norms() -> None:
    net, changes = image_net("weight_standardized")
    assert [change.module for change in changes.made] == ["stem.0", "first.0", "second.0"]
    assert {change.module: change.what for change in changes.skipped} == dict.fromkeys(
        ("first.3", "down", "second.3"), "no norm follows it at once, so that its outputs would be rescaled"
    )
    conv, x = net.stem[0], random(2, 3, 5, 3).requires_grad_()
    filters = [(w - w.mean()) / (w.var(correction=0) + 1e-6).sqrt() for w in conv.weight]
    compare(conv, x, nn.functional.conv2d(x, torch.stack(filters), conv.bias, padding=1))


# -- what is refused


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("powernorm", {"groups": 2}, "divide"),
        ("eln", {"variance": 0.0}, "positive"),
        ("evonorm", {"kind": "s9"}, "no EvoNorm"),
        ("sigma_reparam", {"gain": "two"}, "no such start"),
    ],
)
def test_bad_options_change_nothing(to: str, options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.Linear(3, 3))
    before = list(model.modules())
    with pytest.raises(ConfigError, match=message):
        swap_norms(model, to, **options)
    assert list(model.modules()) == before


def test_operators_that_read_the_graph_ask_for_inputs() -> None:
    with pytest.raises(ConfigError, match="inputs are not known"):
        swap_norms(Net(), "ibn_a")
