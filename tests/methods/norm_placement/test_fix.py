"""Placements against blocks written by hand, on the models of libraries: twice as once, undone bit for bit, refused by name."""

from __future__ import annotations

import copy
import io
import json
import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from pl_normkit import parameter_roles, place_norms
from pl_normkit.errors import EditError
from pl_normkit.graph import ModelGraph
from pl_normkit.graph.sharing import TraceStore, shared_traces
from pl_normkit.methods.norm_placement.fix import placement_records, restore
from pl_normkit.methods.norm_placement.modules import HeadGain, OutputNorm, ShortcutGain
from pl_normkit.methods.norm_placement.placements import PLACEMENTS
from pl_normkit.methods.weight_decay import param_groups
from pl_normkit.nn import CausalTransformer
from tests.methods.norm_placement.by_hand import (
    PRE_NORM,
    SIZES,
    Part,
    bert,
    convnext,
    difference,
    doubled,
    gpt2,
    hf_vit,
    llama,
    output,
    rich_timm_vit,
    swin,
    timm_vit,
    torch_encoder,
    written_by_hand,
)
from tests.methods.norm_placement.making import Made

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")


def post(x: Tensor, part: Part, layer: int, number: int) -> Tensor:
    return part[0](x + part[1](x))


def scaled(x: Tensor, part: Part, layer: int, number: int) -> Tensor:
    return x + part[1](part[0](x) / math.sqrt(layer))


def scaled_output(x: Tensor, part: Part, layer: int, number: int) -> Tensor:
    return x + part[1](part[0](x)) / math.sqrt(layer)


def mixed(x: Tensor, part: Part, layer: int, number: int) -> Tensor:
    return post(x, part, layer, number) if layer == 1 else x + part[1](part[0](x))


CASES: list[tuple[str, dict[str, Any], Callable[..., Tensor]]] = [
    ("post", {}, post),
    ("mix", {"share": 0.3}, mixed),
    ("lns", {"at": "norm"}, scaled),
    ("lns", {"at": "output"}, scaled_output),
]


@pytest.mark.parametrize("make", PRE_NORM.values(), ids=PRE_NORM)
def test_a_placement_is_the_block_written_by_hand(make: Callable[[], Made]) -> None:
    torch.manual_seed(0)
    model, inputs = doubled(*make())
    twin, before = copy.deepcopy(model), output(model, inputs)
    with shared_traces(TraceStore()):
        for kind, options, formula in CASES:
            if kind == "lns" and make is rich_timm_vit:
                with pytest.raises(EditError, match="'lns' cannot be placed"):
                    place_norms(model, kind, inputs, retrain=True, **options)
                continue
            changes = place_norms(model, kind, inputs, retrain=True, **options)
            expected = written_by_hand(copy.deepcopy(twin), formula)
            assert difference(output(model, inputs), output(expected, inputs)) < 1e-12, (kind, options)
            changes.undo()
            assert torch.equal(output(model, inputs), before)


def test_post_norm_draws_what_the_block_by_hand_draws() -> None:
    """Dropout, LayerScale and drop path in training, with the same random numbers."""
    made, inputs = doubled(*rich_timm_vit())
    placed, expected = copy.deepcopy(made).train(), written_by_hand(copy.deepcopy(made), post).train()
    place_norms(placed, "post", inputs, retrain=True)
    torch.manual_seed(3)
    found = output(placed, inputs)
    torch.manual_seed(3)
    assert difference(found, output(expected, inputs)) < 1e-12


@pytest.mark.parametrize("make", [llama, torch_encoder, hf_vit], ids=["llama", "torch", "hf vit"])
def test_peri_norms_what_each_branch_adds(make: Callable[[], Made]) -> None:
    model, inputs = make()
    model.eval()
    place_norms(model, "peri", inputs)
    norms = [module for module in model.modules() if isinstance(module, OutputNorm)]
    seen: list[Tensor] = []
    for norm in norms:
        norm.eps = 0.0  # outputs of small models are small
        norm.register_forward_hook(lambda module, arguments, found: seen.append(found))
    output(model, inputs)
    assert len(norms) == len(seen) == 6
    for found in seen:  # each token has unit mean square: scale 1, shift 0
        assert torch.allclose(found.square().mean(-1), torch.ones(found.shape[:-1]), atol=1e-3)
    kinds = {norm.kind for norm in norms}
    assert kinds == ({"rms"} if make is llama else {"layer"})


def test_peri_on_convolutions_normalizes_channels() -> None:
    model, inputs = convnext(conv_mlp=True)
    place_norms(model.eval(), "peri", inputs)
    norms = [module for module in model.modules() if isinstance(module, OutputNorm)]
    assert [(norm.axis, norm.width) for norm in norms] == [(1, 8), (1, 8), (1, 16), (1, 16)]
    x = torch.randn(2, 8, 4, 4)
    assert torch.allclose(
        norms[0](x), nn.functional.layer_norm(x.permute(0, 2, 3, 1), (8,), eps=norms[0].eps).permute(0, 3, 1, 2), atol=1e-6
    )


@pytest.mark.parametrize("make", [bert, lambda: torch_encoder(norm_first=False)], ids=["bert", "torch"])
def test_deepnorm_amplifies_the_shortcut(make: Callable[[], Made]) -> None:
    model, inputs = make()
    model = model.double().eval()
    inputs = inputs.double() if isinstance(inputs, Tensor) else inputs
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.0  # the gain form moves eps: equal up to that
    place_norms(model, "deepnorm", inputs)
    expected, alpha = copy.deepcopy(model), (2 * 3) ** 0.25
    for module in expected.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
        part: Any = module
        if type(module).__name__ in ("BertSelfOutput", "BertOutput"):
            part.forward = types.MethodType(lambda self, hidden, x: self.LayerNorm(self.dropout(self.dense(hidden)) + alpha * x), part)
        elif type(module).__name__ == "TransformerEncoderLayer":

            def forward(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
                x = self.norm1(alpha * x + self._sa_block(x, None, None))
                result: Tensor = self.norm2(alpha * x + self._ff_block(x))
                return result

            part.forward = types.MethodType(forward, part)
    assert difference(output(model, inputs), output(expected, inputs)) < 1e-12


def test_deepnorm_scales_values_and_outputs_by_beta_and_leaves_queries_and_keys() -> None:
    beta = (8 * 3) ** -0.25
    model, inputs = bert()
    place_norms(model, "deepnorm", inputs)
    layer: Any = model.bert.encoder.layer[0]
    square, wide = math.sqrt(2 / 32), math.sqrt(2 / 48)
    parts = (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value, layer.attention.output.dense)
    expected = [square, square, beta * square, beta * square, beta * wide, beta * wide]
    spreads = [part.weight.detach().square().mean().sqrt().item() for part in (*parts, layer.intermediate.dense, layer.output.dense)]
    assert spreads == pytest.approx(expected, rel=1e-5)

    encoder, x = torch_encoder(norm_first=False)
    place_norms(encoder, "deepnorm", x)
    thirds = encoder.layers[0].self_attn.in_proj_weight.detach().chunk(3)
    assert [third.square().mean().sqrt().item() for third in thirds] == pytest.approx([square, square, beta * square], rel=1e-5)


def test_a_deeper_deepnorm_has_more_shortcut_and_smaller_weights() -> None:
    """Public codes have the exponent of beta inverted, so that weights grow with depth."""
    found = []
    for depth in (2, 8):
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        place_norms(encoder, "deepnorm", torch.randn(2, 6, 16))
        gain = encoder.layers[0].dropout2.placed_gain.value if hasattr(encoder.layers[0].dropout2, "placed_gain") else None
        gain = gain if gain is not None else encoder.layers[0].linear2.placed_gain.value
        found.append((1 / gain, encoder.layers[0].linear2.weight.detach().std().item()))
    (alpha_2, spread_2), (alpha_8, spread_8) = found
    assert (alpha_2, alpha_8) == pytest.approx((4**0.25, 16**0.25))
    assert spread_8 < spread_2 < 1


def test_normformer_is_the_block_written_by_hand() -> None:
    made, inputs = doubled(*gpt2())
    model = copy.deepcopy(made)
    place_norms(model, "normformer", inputs, retrain=True, scale_residual=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (HeadGain, OutputNorm, ShortcutGain)):
                module.weight.add_(torch.rand(module.weight.shape, generator=generator, dtype=torch.float64))
    expected = copy.deepcopy(made)
    for block, own in zip(expected.transformer.h, model.transformer.h, strict=True):
        own: Any
        heads, behind = own.attn.c_proj.placed_heads, own.attn.c_proj.placed_norm
        inner, shortcut = own.mlp.c_proj.placed_norm, own.mlp.placed_shortcut

        def forward(
            self: Any, x: Tensor, *_: Any, heads: Any = heads, behind: Any = behind, inner: Any = inner, shortcut: Any = shortcut, **k: Any
        ) -> Tensor:
            gains = heads.weight.repeat_interleave(4)
            weight, bias = self.attn.c_proj.weight, self.attn.c_proj.bias
            project = types.SimpleNamespace(weight=gains[:, None] * weight, bias=bias)
            kept = self.attn.c_proj.forward
            self.attn.c_proj.forward = lambda h: h @ project.weight + project.bias
            attended = self.attn(self.ln_1(x), attention_mask=k.get("attention_mask"))[0]
            self.attn.c_proj.forward = kept
            norm = nn.functional.layer_norm
            x = x + norm(attended, (16,), behind.weight, behind.bias, behind.eps)
            hidden = self.mlp.act(self.mlp.c_fc(self.ln_2(x)))
            result: Tensor = shortcut.weight * x + self.mlp.c_proj(norm(hidden, (64,), inner.weight, inner.bias, inner.eps))
            return result

        block.forward = types.MethodType(forward, block)
    assert difference(output(model, inputs), output(expected, inputs)) < 1e-12


@pytest.mark.parametrize("kind", ["head_scale", "res_scale"])
@pytest.mark.parametrize("make", [gpt2, swin], ids=["gpt2", "swin"])
def test_gains_of_one_keep_a_trained_function(kind: str, make: Callable[[], Made]) -> None:
    model, inputs = doubled(*make())
    before = output(model, inputs)
    changes = place_norms(model, kind, inputs)
    assert changes
    assert difference(output(model, inputs), before) < 1e-12
    gains = [module for module in model.modules() if isinstance(module, (HeadGain, ShortcutGain))]
    for gain in gains:
        gain.weight.data.fill_(1.5)
    assert difference(output(model, inputs), before) > 1e-6  # they do act


def test_branches_start_smaller_the_more_there_are() -> None:
    model, inputs = torch_encoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    place_norms(model, "depth_init", inputs)
    factors = {
        name: float((value / before[name]).nanmean()) for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    lasts = [f"layers.{layer}.{name}.weight" for layer in range(3) for name in ("self_attn.out_proj", "linear2")]
    assert factors == pytest.approx(dict.fromkeys(lasts, 1 / math.sqrt(6)))


def small_bert() -> Made:
    sizes = {**SIZES, "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
    config = tf.BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return tf.BertForSequenceClassification(config), {"input_ids": torch.arange(16).reshape(2, 8) % 50}


def reference(placement: str) -> Made:
    model = CausalTransformer(31, width=8, depth=2, heads=2, length=8, placement=placement)
    return model, {"tokens": torch.arange(16).reshape(2, 8)}


def fitting(kind: str) -> Made:
    """A model that has what the placement asks for."""
    return small_bert() if kind == "pre" else reference("post" if kind == "deepnorm" else "pre")


EVERY_KIND: dict[str, dict[str, Any]] = {kind: {"share": 0.5} if kind == "mix" else {} for kind in PLACEMENTS}


def test_twice_is_once_keys_stay_and_undo_gives_everything_back() -> None:
    with shared_traces(TraceStore()):
        made = {kind: fitting(kind) for kind in ("pre", "deepnorm", "peri")}
        for kind, options in EVERY_KIND.items():
            _check_twice_and_back(*made.get(kind, made["peri"]), kind, options)


def _check_twice_and_back(model: nn.Module, inputs: Any, kind: str, options: dict[str, Any]) -> None:
    model.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, before, text = dict(model.named_parameters()), output(model, inputs), repr(model)
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    changes = place_norms(model, kind, inputs, **options)
    placed = output(model, inputs)
    assert changes
    assert state.keys() <= model.state_dict().keys()
    assert all(found is parameters[name] for name, found in model.named_parameters() if name in parameters)
    again = place_norms(model, kind, inputs, **options)
    assert (again.made, [str(change) for change in again.skipped]) == ([], [f"(the model): {kind!r} is placed already"])
    assert torch.equal(output(model, inputs), placed)
    changes.undo()
    assert torch.equal(output(model, inputs), before)
    assert repr(model) == text
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_every_placement_resumes_bit_for_bit() -> None:
    """Into a fresh model with the record and the weights of a checkpoint: the next steps are those of the run that went on."""
    with shared_traces(TraceStore()):
        made = {kind: fitting(kind) for kind in ("pre", "deepnorm", "peri")}
        for kind, options in EVERY_KIND.items():
            model, inputs = made.get(kind, made["peri"])
            fresh, begun = copy.deepcopy(model), copy.deepcopy(model.state_dict())
            changes = place_norms(model, kind, inputs, **options)
            optimizer = _steps(model, inputs, None)
            [record], weights, state = (
                placement_records("", model),
                copy.deepcopy(model.state_dict()),
                copy.deepcopy(optimizer.state_dict()),
            )
            restore(fresh, json.loads(json.dumps(record)))
            assert fresh.load_state_dict(weights).missing_keys == []
            _steps(fresh, inputs, copy.deepcopy(state))  # an optimizer shares what it loads
            _steps(model, inputs, state)
            assert all(torch.equal(value, model.state_dict()[name]) for name, value in fresh.state_dict().items()), kind
            assert not all(torch.equal(value, weights[name]) for name, value in fresh.state_dict().items()), kind
            changes.undo()
            model.load_state_dict(begun)


def _steps(model: nn.Module, inputs: Any, state: dict[str, Any] | None) -> torch.optim.Optimizer:
    """A step that every parameter that is trained takes part in."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], 0.01)
    if state is not None:
        optimizer.load_state_dict(state)
    optimizer.zero_grad()
    found = model.eval()(**inputs)
    (found if isinstance(found, Tensor) else found.logits).square().mean().backward()
    optimizer.step()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []
    return optimizer


@pytest.mark.parametrize("kind", ["post", "peri"])
def test_copies_and_pickles_are_placed_too(kind: str) -> None:
    model, inputs = gpt2()
    place_norms(model.eval(), kind, inputs)
    expected = output(model, inputs)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    assert torch.equal(output(twin, inputs), expected)
    assert torch.equal(output(loaded, inputs), expected)
    assert place_norms(twin, kind, inputs).made == []


def test_gradients_pass_and_checkpointing_gives_the_same() -> None:
    model, inputs = timm_vit()
    place_norms(model, "post", inputs)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model.train()(inputs).square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain = gradients()
    model.set_grad_checkpointing(True)
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys() == {name for name, _ in model.named_parameters()}
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-6) for name in plain)


def test_scales_of_output_norms_are_not_decayed() -> None:
    model, inputs = timm_vit()
    place_norms(model, "peri", inputs)
    roles = parameter_roles(model, inputs)
    placed = [name for name in roles if "placed_norm" in name]
    assert {str(roles[name]) for name in placed} == {"own", "beta"}
    assert len(placed) == 12
    for policy in ("no_norm", "gamma_roles", "gamma_roles_extended"):
        groups = param_groups(model, 0.1, inputs, policy=policy)
        decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
        assert not any(id(model.get_parameter(name)) in decayed for name in placed)


def test_a_placed_model_can_be_traced_and_compiled() -> None:
    model, inputs = timm_vit()
    place_norms(model.eval(), "post", inputs)
    graph = ModelGraph.from_model(model, inputs)
    assert len(graph.residual_adds) > 0
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(inputs), model(inputs), atol=1e-5)
