"""`to_rmsnorm`: the same function, no layer norm left on the stream, refusals by name."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_normkit.errors import EditError, NothingMatchedError
from pl_normkit.methods.norm_operators import fold_norms, to_crmsnorm, to_rmsnorm
from tests.methods.norm_operators.tiny_models import build, difference, gpt2, output, timm_vit, tokens, trained_like


def kinds(model: nn.Module) -> dict[str, int]:
    """How many norms of each kind the model holds."""
    norms = [module for module in model.modules() if isinstance(module, (nn.LayerNorm, nn.RMSNorm))]
    return {"layer": sum(isinstance(norm, nn.LayerNorm) for norm in norms), "rms": sum(isinstance(norm, nn.RMSNorm) for norm in norms)}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("gpt2", 0),
        ("gpt_neox", 0),
        ("vit", 0),
        ("deit", 0),
        ("dinov2", 0),
        ("timm_vit", 0),
        ("timm_vit_average", 4),
        ("timm_deit", 0),
        ("torch", 0),
    ],
)
def test_real_models_keep_their_function_and_their_keys(name: str, layer: int) -> None:
    model, inputs = build(name)
    before, keys, parameters = output(model, inputs), set(model.state_dict()), set(map(id, model.parameters()))
    changes = to_rmsnorm(model, inputs)
    assert difference(output(model, inputs), before) < 1e-12
    assert kinds(model) == {"layer": layer, "rms": 5}
    assert (set(model.state_dict()), set(map(id, model.parameters()))) == (keys, parameters)
    assert difference(output(copy.deepcopy(model), inputs), before) < 1e-12
    changes.undo()
    assert torch.equal(output(model, inputs), before)
    assert kinds(model) == {"layer": 5 + layer, "rms": 0}


def test_a_swap_of_the_norms_alone_is_far_off() -> None:
    """What the conversion does is needed: the tests above would see it missing."""
    model, inputs = build("timm_vit")
    before = output(model, inputs)
    for path, norm in list(model.named_modules()):
        if isinstance(norm, nn.LayerNorm):
            model.set_submodule(path, nn.RMSNorm(norm.normalized_shape, eps=norm.eps).double())
    assert difference(output(model, inputs), before) > 0.05


def test_a_tied_head_stays_tied() -> None:
    model, inputs = build("gpt2")
    before = output(model, inputs)
    to_rmsnorm(model, inputs)
    assert model.get_submodule("lm_head").weight is model.get_submodule("transformer.wte").weight
    other = {**inputs, "input_ids": inputs["input_ids"].flip(1)}
    assert difference(output(model, other), output(build("gpt2")[0], other)) < 1e-12
    assert difference(output(model, inputs), before) < 1e-12


def test_both_conversions_after_each_other_are_exact() -> None:
    model, inputs = build("vit")
    before = output(model, inputs)
    to_rmsnorm(model, inputs)
    changes = fold_norms(model, inputs, keep_keys=False)
    assert len(changes.made) == 10
    assert difference(output(model, inputs), before) < 1e-12
    assert not any(list(module.parameters()) for module in model.modules() if isinstance(module, nn.RMSNorm))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_lower_precision_stays_within_rounding(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    model, x = trained_like(timm_vit()).to(dtype), torch.randn(2, 3, 16, 16).to(dtype)
    before = output(model, x)
    to_rmsnorm(model, x)
    assert difference(output(model, x), before) < bound


class Block(nn.Module):
    def __init__(self, width: int = 6, drop: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.drop = nn.LayerNorm(width), nn.Linear(width, 9), nn.Linear(9, width), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.drop(self.down(torch.relu(self.up(self.norm(x)))))
        return result


class WrittenNorm(nn.Module):
    """nanoGPT's LayerNorm: not torch's, nor does it keep its eps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-2)


class Net(nn.Module):
    """Two blocks and a head; `what` spoils it."""

    def __init__(self, what: str = "") -> None:
        super().__init__()
        self.what = what
        self.embed, self.blocks, self.norm, self.head = (
            nn.Embedding(11, 6),
            nn.ModuleList([Block(), Block()]),
            nn.LayerNorm(6),
            nn.Linear(6, 3),
        )
        self.position = nn.Parameter(torch.randn(4, 6))
        self.tap = nn.Linear(6, 3)
        if what == "shared block":
            self.blocks[1] = self.blocks[0]
        if what == "written norms":
            self.blocks[0].norm, self.blocks[1].norm, self.norm = (WrittenNorm(6) for _ in range(3))

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids) + self.position
        for block in self.blocks:
            x = block(x)
            if self.what == "gate":
                x = x * torch.sigmoid(self.tap(x).mean(-1, keepdim=True).mean(1, keepdim=True))
            if self.what == "position in each block":
                x = x + self.position
        if self.what == "tap":
            return self.head(self.norm(x)) + self.tap(x)
        if self.what == "tied":
            hidden = torch.relu(self.blocks[1].up(self.norm(x)))
            return self.head(self.norm(x)) + F.linear(hidden, self.blocks[1].down.weight).mean()
        if self.what == "returned":
            return self.head(self.norm(x)), x
        if self.what == "largest":
            return self.head(self.norm(x.amax(1)))
        return self.head(self.norm(x))


IDS = torch.arange(8).reshape(2, 4)


@pytest.mark.parametrize(("what", "count"), [("", 3), ("shared block", 2), ("written norms", 3)])
def test_toys_that_meet_the_conditions(what: str, count: int) -> None:
    model = trained_like(Net(what))
    before, keys = model(IDS), set(model.state_dict())
    changes = to_rmsnorm(model, IDS)
    assert difference(model(IDS), before) < 1e-12
    assert (kinds(model), set(model.state_dict())) == ({"layer": 0, "rms": count}, keys)
    changes.undo()
    if what != "shared block":  # it would drop a channel each time
        to_crmsnorm(model, IDS)
    assert difference(model(IDS), before) < 1e-12


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("tied", r"blocks\.1\.down\.weight, which writes what the norm reads, is tied: the model reads it too"),
        ("tap", "linear of tap reads the same values without a norm"),
        ("returned", "the model returns the values that the norm reads"),
        ("gate", "reads the same values without a norm"),
        ("position in each block", "nothing would be saved"),
        ("largest", "amax of the model reads the same values without a norm"),
    ],
)
def test_toys_that_do_not_are_refused_and_stay_as_they_are(what: str, reason: str) -> None:
    model = trained_like(Net(what))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NothingMatchedError, match=reason):
        to_rmsnorm(model, IDS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert kinds(model) == {"layer": 3, "rms": 0}


def test_post_norm_is_refused() -> None:
    model, inputs = build("bert")
    with pytest.raises(NothingMatchedError, match="reads the same values without a norm"):
        to_rmsnorm(model, inputs)


def test_meta_weights_and_rms_models_are_refused() -> None:
    with torch.device("meta"):
        model = gpt2().eval()
    with pytest.raises(EditError, match="meta device"):
        to_rmsnorm(model, tokens())
    model, inputs = build("llama")
    with pytest.raises(NothingMatchedError, match="no layer norm can be converted"):
        to_rmsnorm(model, inputs)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("name", ["gpt2", "timm_vit"])
def test_training_on_is_that_of_the_layer_norm_model(name: str) -> None:
    model, inputs = build(name)
    twin = copy.deepcopy(without_dropout(model))
    changes = to_rmsnorm(model, inputs, for_training=True)
    assert kinds(model) == {"layer": 0, "rms": 5}
    for net in (model, twin):
        optimizer = torch.optim.SGD(net.train().parameters(), 0.05)
        for _ in range(5):
            optimizer.zero_grad()
            result = net(**inputs) if isinstance(inputs, dict) else net(inputs)
            (result if isinstance(result, Tensor) else result[0]).square().mean().backward()
            optimizer.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    expected = output(twin.eval(), inputs)
    assert difference(output(pickle.loads(pickle.dumps(model.eval())), inputs), expected) < 1e-12
    twin.load_state_dict(model.state_dict(), strict=True)  # the keys are those of the layer norm model
    changes.undo()
    to_rmsnorm(model, inputs)  # and now for inference
    assert difference(output(model, inputs), expected) < 1e-12


def test_one_shot_conversion_and_training_on_part_ways() -> None:
    """Why `for_training` exists: weights that were centred once do not stay so."""
    model, inputs = build("timm_vit")
    twin = copy.deepcopy(model)
    to_rmsnorm(model, inputs)
    for net in (model, twin):
        optimizer = torch.optim.SGD(net.train().parameters(), 0.5)
        for _ in range(5):
            optimizer.zero_grad()
            net(inputs).square().mean().backward()
            optimizer.step()
    assert difference(output(model.eval(), inputs), output(twin.eval(), inputs)) > 1e-6


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt2", r"dropout of transformer\.h\.\d\.\S+ takes the zero mean away in training mode"),
        ("gpt2", r"h\.0\.ln_1: the stream goes on to transformer\.h\.0\.ln_2, whose input cannot be given zero mean"),
        ("dinov2", "a LayerScale"),
    ],
)
def test_what_training_cannot_keep_centred_is_refused(name: str, reason: str) -> None:
    model, inputs = build(name)
    with pytest.raises(NothingMatchedError, match=reason):
        to_rmsnorm(model, inputs, for_training=True)
