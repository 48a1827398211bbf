"""`fold_norms`: the same function, unit scales, and nothing where a weight is tied or something else reads the norm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pl_normkit.errors import EditError, NothingMatchedError
from pl_normkit.methods.norm_operators import fold_norms
from tests.methods.norm_operators.tiny_models import build, difference, output, trained_like


@pytest.mark.parametrize(
    ("name", "folded", "kept"),
    [
        ("gpt2", 4, {"transformer.ln_f": "transformer.wte.weight is tied: transformer.wte reads it too"}),
        ("gpt_neox", 4, {"gpt_neox.final_layer_norm": "lm_head has no bias to take the shift"}),
        ("vit", 5, {}),
        ("deit", 5, {}),
        ("timm_vit", 5, {}),
        ("timm_deit", 5, {}),
        ("llama", 5, {}),
    ],
)
def test_real_models_keep_their_function_and_their_keys(name: str, folded: int, kept: dict[str, str]) -> None:
    model, inputs = build(name)
    before, keys = output(model, inputs), set(model.state_dict())
    values = copy.deepcopy(model.state_dict())
    changes = fold_norms(model, inputs)
    assert (len(changes.made), {change.module: change.what for change in changes.skipped}) == (folded, kept)
    assert difference(output(model, inputs), before) < 1e-12
    assert set(model.state_dict()) == keys
    for change in changes.made:
        norm = model.get_submodule(change.module)
        assert all(bool((parameter == (name == "weight")).all()) for name, parameter in norm.named_parameters())
    changes.undo()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_a_second_call_changes_nothing() -> None:
    model, inputs = build("gpt2")  # its last norm cannot be folded
    fold_norms(model, inputs)
    assert not fold_norms(model, inputs)


@pytest.mark.parametrize("name", ["vit", "timm_vit", "torch"])
def test_parameters_of_norms_go_where_asked(name: str) -> None:
    model, inputs = build(name)
    before, keys = output(model, inputs), set(model.state_dict())
    changes = fold_norms(model, inputs, keep_keys=False)
    assert difference(output(model, inputs), before) < 1e-12
    assert len(keys - set(model.state_dict())) == 10
    assert not any(list(module.parameters()) for module in model.modules() if isinstance(module, nn.LayerNorm))
    changes.undo()
    assert set(model.state_dict()) == keys
    assert torch.equal(output(model, inputs), before)


def test_post_norm_is_refused_with_the_reader() -> None:
    model, inputs = build("bert")
    with pytest.raises(NothingMatchedError, match=r"add of encoder\.layer\.0\.attention\.output reads its output too"):
        fold_norms(model, inputs)


class Gemma(nn.Module):
    """A scale stored as its difference from 1 is not what multiplies the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)
        result: Tensor = self.layer(y)
        return result


class TwoNorms(nn.Module):
    """One layer reads two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.layer = nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(self.a(x)) + self.layer(self.b(x))
        return result


class SharedNorm(nn.Module):
    """One norm is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.norm(self.first(self.norm(x))))
        return result


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Gemma(), "no norm can be folded"),
        (TwoNorms(), "layer.weight is tied: layer reads it too"),
        (SharedNorm(), "norm.weight is shared with another norm"),
        (nn.Sequential(nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2)), "relu of 1 reads its output too"),
        (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2, bias=False)), "1 has no bias to take the shift"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "the model returns its output"),
        (nn.Sequential(nn.LayerNorm(4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))), "reads its output too"),
    ],
)
def test_what_cannot_be_folded_is_left_alone(model: nn.Module, reason: str) -> None:
    trained_like(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NothingMatchedError, match=reason):
        fold_norms(model, torch.randn(3, 4, dtype=torch.float64))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_means_over_tokens_and_tied_readers_of_one_norm_are_folded() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.norm(x)
            result: Tensor = self.head(rows[:, 1:].mean(1)) + self.head(rows[:, 0])
            return result

    model, x = trained_like(Pooled()), torch.randn(2, 5, 4, dtype=torch.float64)
    before = model(x)
    fold_norms(model, x)
    assert difference(model(x), before) < 1e-12
    assert model.get_parameter("norm.weight").tolist() == [1.0] * 4


def test_the_filter_chooses_and_meta_weights_are_refused() -> None:
    model, inputs = build("vit")
    changes = fold_norms(model, inputs, filter_fn=lambda _, path: path.endswith("layernorm"))
    assert [change.module for change in changes.made] == ["vit.layernorm"]
    with pytest.raises(EditError, match="meta device"):
        fold_norms(model.to("meta"), inputs)
