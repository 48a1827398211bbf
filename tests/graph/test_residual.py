"""Which sums are residual additions: every spelling of one, a second input inside a block, and sums that only look like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pl_normkit.graph import ModelGraph
from tests.graph.networks import Written, adds, fusions

X = torch.zeros(2, 8, 8, 8)
TOKENS = torch.zeros(2, 6, 8)


def _film(m: Written, x: Tensor, t: Tensor) -> Tensor:
    return m.project(x) + m.second(m.branch(x) * (1 + m.embed(t)[:, :, None, None]) + m.embed(t)[:, :, None, None])


CONDITIONED: dict[str, tuple[Callable[..., Any], tuple[int, int]]] = {
    "time added in the branch": (lambda m, x, t: x + m.second((m.branch(x) + m.embed(t)[:, :, None, None]).relu()), (1, 0)),
    "projection, time added in the branch": (
        lambda m, x, t: m.project(x) + m.second((m.branch(x) + m.embed(t)[:, :, None, None]).relu()),
        (0, 1),
    ),
    "projection, FiLM in the branch": (_film, (0, 1)),
    "condition beside the branch": (lambda m, x, t: x + m.branch(x) + m.embed(t)[:, :, None, None], (1, 0)),
    "resized projection with a condition": (
        lambda m, x, t: (
            m.project(F.interpolate(x, scale_factor=2)) + m.branch(F.interpolate((x + m.embed(t)[:, :, None, None]).relu(), scale_factor=2))
        ),
        (0, 1),
    ),
    "transposed on both sides with a condition": (
        lambda m, x, t: m.up(x) + m.branch(m.up((m.second(x) + m.embed(t)[:, :, None, None]).relu())),
        (0, 1),
    ),
    "two blocks that share the condition": (
        lambda m, x, t: _film(m, _film(m, x, t).relu(), t),
        (0, 2),
    ),
}


@pytest.mark.parametrize("name", CONDITIONED)
def test_a_second_input_inside_a_block_hides_no_addition(name: str) -> None:
    forward, expected = CONDITIONED[name]
    assert (adds(forward, X, torch.zeros(2, 4)), fusions(forward, X, torch.zeros(2, 4))) == (expected, 0)


def _masked_attention(m: Written, x: Tensor, mask: Tensor) -> Tensor:
    for _ in range(2):
        scores = m.q(x) @ m.k(x).transpose(1, 2) + mask
        x = x + m.out(scores.softmax(-1) @ m.v(x))
    return x


def _positions_again(m: Written, x: Tensor, position: Tensor) -> Tensor:
    for _ in range(3):
        y = x + position
        x = m.norm(x + m.out(F.scaled_dot_product_attention(m.q(y), m.k(y), m.v(x))))
    return x


def _own_positions_again(m: Written, x: Tensor) -> Tensor:
    return _positions_again(m, x, x)


def _gelu_written_out(m: Written, x: Tensor) -> Tensor:
    return m.out(x * 0.5 * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))))


def _normalised_and_back(m: Written, x: Tensor) -> Tensor:
    mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    return m.out(m.q((x - mean) / deviation).relu()) * deviation + mean


def _scan(m: Written, x: Tensor) -> Tensor:
    gates, values = m.q(x).sigmoid(), m.v(x)
    state = values[:, 0]
    for step in range(1, x.shape[1]):
        state = gates[:, step] * state + values[:, step]
    return m.out(state)


def _straight_through(m: Written, x: Tensor) -> Tensor:
    return x + (m.out(x).relu() - x).detach()


def _gelu_after_a_layer(m: Written, x: Tensor) -> Tensor:
    x = m.norm(x)
    h = m.q(x)
    return m.out(h * 0.5 * (1 + torch.tanh(0.8 * (h + 0.044715 * torch.pow(h, 3)))))


def _embedded(m: Written, tokens: Tensor) -> Tensor:
    return m.out(m.words(tokens) + m.places(tokens.ne(0).cumsum(1)))


def _bias_of_the_chosen(m: Written, x: Tensor) -> Tensor:
    chosen = m.q(x)[..., :3].argmax(-1)
    return m.out(x * m.places.weight[:3][chosen] + m.experts[chosen])


def _linear_attention(m: Written, x: Tensor) -> Tensor:
    q, k, v = m.q(x), m.k(x), m.v(x)
    state = torch.zeros(x.shape[0], 8, 8)
    seen = []
    for step in range(2):
        now = slice(3 * step, 3 * step + 3)
        seen.append(q[:, now] @ state + (q[:, now] @ k[:, now].transpose(1, 2)).tril() @ v[:, now])
        state = state * 0.5 + k[:, now].transpose(1, 2) @ v[:, now]
    return m.out(torch.cat(seen, 1))


def _rows_in_place(m: Written, x: Tensor) -> Tensor:
    scores = (m.q(x) @ m.k(x).transpose(1, 2)).tril(-1)
    for row in range(1, x.shape[1]):
        before, above = scores[:, row, :row].clone(), scores[:, :row, :row].clone()
        scores[:, row, :row] = before + (before.unsqueeze(-1) * above).sum(-2)
    return m.out(scores @ m.v(x))


def _highway(m: Written, x: Tensor) -> Tensor:
    gate = m.q(x).sigmoid()
    return m.out(gate * m.k(x).relu() + (1 - gate) * x)


def _weighed_contexts(m: Written, x: Tensor) -> Tensor:
    x = F.max_pool2d(x, 4)  # fewer positions than channels: each gate is smaller than what it weighs
    weights, near = m.second(x), m.project(x).relu()
    far = m.branch(near)
    everywhere = far.mean((2, 3), keepdim=True)
    return m.up(near * weights[:, :1] + far * weights[:, 1:2] + everywhere * weights[:, 2:3])


def _focal_context(m: Written, x: Tensor) -> Tensor:
    """Gates of one channel beside the features, in one value (FocalNet)."""
    features, _, gates = torch.cat([m.project(x), m.second(x)], 1).split([8, 5, 3], 1)
    near = m.branch(features).relu()
    far = m.branch(near).relu()
    return m.up(near * gates[:, :1] + far * gates[:, 1:2] + far.mean((2, 3), keepdim=True) * gates[:, 2:])


def _rotated(m: Written, x: Tensor) -> Tensor:
    q = m.q(x)
    turned = torch.stack([-q[..., 1::2], q[..., ::2]], dim=-1).reshape_as(q)
    return m.out(q * 0.5 + turned * 0.8)


def _low_rank(m: Written, x: Tensor) -> Tensor:
    return m.out(m.q(x) + 2.0 * (x @ m.k.weight[:, :2] @ m.v.weight[:2])).relu()


def _modulated(m: Written, x: Tensor, known: Tensor) -> Tensor:
    h = m.branch(known).relu()
    return m.up(m.branch(x) * (1 + m.second(h)) + m.project(h))


def _skip_connections(m: Written, x: Tensor) -> tuple[Tensor, Tensor]:
    skips = torch.zeros(())
    for _ in range(3):
        z = m.branch(x).tanh()
        skips = skips + m.project(z)
        x = x + m.second(z)
    return m.up(skips.relu()), x


def _quantized(m: Written, x: Tensor) -> Tensor:
    z = m.norm(x)
    found = m.words(m.q(z).argmax(-1))
    return m.out(z + (found - z).detach())


def _coupling(m: Written, x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    scale, shift = m.q(torch.cat([a, a], -1)).relu().chunk(2, -1)
    return m.out(torch.cat([a, b * scale.tanh().exp() + shift], -1))


def _forward_algorithm(m: Written, x: Tensor) -> Tensor:
    scores = m.q(x)
    state = scores[:, 0]
    for step in range(1, x.shape[1]):
        state = torch.logsumexp(state[:, :, None] + m.k.weight, 1) + scores[:, step]
    return state


def _residual_quantizer(m: Written, x: Tensor) -> Tensor:
    total, rest = 0.0, m.branch(x)
    for _ in range(3):
        code = m.second(m.project(rest).tanh())
        total, rest = total + code, rest - code
    return m.up(total)


def _nearest_codes(m: Written, x: Tensor) -> Tensor:
    x = m.q(x)
    for _ in range(2):
        x = x - m.words(torch.cdist(x, m.words.weight[None]).argmin(-1))
    return m.v(x)


def _deformable_attention(m: Written, x: Tensor) -> Tensor:
    points = m.embed(m.q(x)[..., :4]).tanh().reshape(-1, 6, 4, 2)
    sampled = F.grid_sample(m.v(x).mT.reshape(-1, 8, 2, 3), points, align_corners=False)
    return m.k(x + m.out((sampled * m.k(x)[..., :4].softmax(-1)[:, None]).sum(-1).mT))


def _divided_attention(m: Written, x: Tensor) -> Tensor:
    """Over time and over space, which has a class token of its own (TimeSformer)."""
    for _ in range(2):
        first, rest = x[:, :1], x[:, 1:]
        rest = rest + m.q(m.norm(rest)).relu()
        seen = m.out(m.k(torch.cat([first, rest], 1)).relu())
        x = torch.cat([first, rest], 1) + torch.cat([seen[:, :1], seen[:, 1:]], 1)
    return m.v(x)


def _whole_numbers(m: Written, x: Tensor) -> Tensor:
    tokens = m.q(x).argmax(-1)
    return m.v(m.words(tokens + (tokens * 3).remainder(5)))


def _adapted(m: Written, x: Tensor) -> Tensor:
    for _ in range(2):
        h = m.q(m.norm(x)).relu()
        x = x + (h + m.k(m.v(h).relu()))
    return m.out(x)


def _delta_rule(m: Written, x: Tensor) -> Tensor:
    q, k = m.q(x)[..., None], m.k(x)[..., None]
    state = q[:, 0] @ k[:, 0].mT
    for step in range(1, 3):
        state = state * k[:, step].sigmoid().mT + (state @ q[:, step]) @ k[:, step].mT
    return m.out(state)


def _first_values_again(m: Written, x: Tensor) -> Tensor:
    values = m.v(m.norm(x))
    for _ in range(2):
        y = m.norm(x)
        x = x + m.out(F.scaled_dot_product_attention(m.q(y), m.k(y), 0.5 * m.v(y) + 0.5 * values))
    return x


TIED = torch.ones(2, 6, dtype=torch.long)
LOOK_ALIKES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], int]] = {
    "attention with an additive mask, twice": (_masked_attention, (TOKENS, torch.zeros(2, 6, 6)), 2),
    "positions added anew": (_positions_again, (TOKENS, torch.zeros(2, 6, 8)), 3),
    "the first value added anew": (_own_positions_again, (TOKENS,), 3),
    "GELU written out": (_gelu_written_out, (TOKENS,), 0),
    "normalised, and undone at the end": (_normalised_and_back, (TOKENS,), 0),
    "scan over time": (_scan, (TOKENS,), 0),
    "straight-through estimator": (_straight_through, (TOKENS,), 0),
    "f(x) - x": (lambda m, x: m.branch(x) - x, (X,), 0),
    "x - pool(x)": (lambda m, x: x - F.avg_pool2d(x, 3, 1, 1), (X,), 0),
    "decoder's long skip": (lambda m, x: m.project(x) + F.interpolate(m.branch(F.max_pool2d(x, 2)), scale_factor=2), (X,), 0),
    "levels brought to one size": (
        lambda m, x: F.interpolate(m.project(x), size=16) + F.interpolate(m.branch(F.max_pool2d(x, 2)), size=16),
        (X,),
        0,
    ),
    "GELU written out after a layer": (_gelu_after_a_layer, (TOKENS,), 0),
    "words and counted places": (_embedded, (TIED,), 0),
    "shift of the expert that was chosen": (_bias_of_the_chosen, (TOKENS,), 0),
    "linear attention, its first state zero": (_linear_attention, (TOKENS,), 0),
    "rows of a triangle, in place": (_rows_in_place, (TOKENS,), 0),
    "highway": (_highway, (TOKENS,), 0),
    "contexts, each weighed": (_weighed_contexts, (X,), 0),
    "gates of one channel": (_focal_context, (X,), 0),
    "rotary embedding, in the shape of another value": (_rotated, (TOKENS,), 0),
    "a layer and its low-rank update": (_low_rank, (TOKENS,), 0),
    "features modulated by a map": (_modulated, (X, X), 0),
    "skip connections of all layers": (_skip_connections, (X,), 3),
    "quantized, straight-through": (_quantized, (TOKENS,), 0),
    "coupling of a flow": (_coupling, (TOKENS,), 0),
    "forward algorithm": (_forward_algorithm, (TOKENS,), 0),
    "quantizers of what others left": (_nearest_codes, (TOKENS,), 0),
    "residual quantizer": (_residual_quantizer, (X,), 0),
    "attention over time, then over space": (_divided_attention, (TOKENS,), 4),
    "arithmetic on whole numbers": (_whole_numbers, (TOKENS,), 0),
    "blocks that end in an adapter": (_adapted, (TOKENS,), 4),
    "running sums of samples": (lambda m, x: (y := m.q(x), y.sum((1, 2)) + m.k(y).relu().sum((1, 2))), (TOKENS,), 0),
    "parallel convolutions, no identity": (lambda m, x: m.up(m.project(x) + m.second(x) + m.second(x.flip(1))), (X,), 0),
    "folded branches, one behind a sum with nothing": (lambda m, x: m.up(m.project(x) + (0.0 + m.second(x))), (X,), 0),
    "RepMixer's difference of folded branches": (
        lambda m, x: m.up(x + m.scale * ((m.project(x) + m.second(x) + x * m.scale) - x * m.norm.weight[:, None, None])),
        (X,),
        2,
    ),
    "values of the first attention added again": (_first_values_again, (TOKENS,), 2),
    "sample around a mean": (lambda m, x: m.out(m.q(x) + torch.randn(x.shape) * (0.5 * m.k(x)).exp()), (TOKENS,), 0),
    "noise that a router adds": (lambda m, x: m.out((m.q(x) + torch.randn_like(x) * F.softplus(m.k(x))).softmax(-1)), (TOKENS,), 0),
    "deformable attention": (_deformable_attention, (TOKENS,), 1),
    "delta rule": (_delta_rule, (TOKENS,), 0),
    "branch times a mask of full size": (lambda m, x, mask: m.up(x + m.branch(x) * mask), (X, X), 1),
    "gate as wide as the features": (lambda m, x: torch.lerp(m.branch(x), x, m.second(x).sigmoid()), (X,), 0),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_sums_that_only_look_like_one_are_left_out(name: str) -> None:
    forward, inputs, expected = LOOK_ALIKES[name]
    assert adds(forward, *inputs) == (expected, 0)


NO_FUSIONS = [
    _own_positions_again,
    _scan,
    _gelu_written_out,
    _normalised_and_back,
    _linear_attention,
    _rows_in_place,
    _highway,
    _low_rank,
    _quantized,
    _divided_attention,
    _whole_numbers,
]


@pytest.mark.parametrize("forward", NO_FUSIONS)
def test_they_are_no_fusions_either(forward: Callable[..., Any]) -> None:
    assert fusions(forward, TOKENS) == 0


@pytest.mark.parametrize(("forward", "inputs"), [(_embedded, (TIED,)), (_weighed_contexts, (X,)), (_modulated, (X, X))])
def test_embeddings_of_one_token_weighed_contexts_and_modulation_are_no_fusion(
    forward: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> None:
    assert fusions(forward, *inputs) == 0


def test_a_shortcut_that_alone_is_weighed_is_one() -> None:
    assert adds(lambda m, x: m.up(x * m.second(x)[:, :1] + m.branch(x)), X) == (1, 0)


def _coupled(m: Written, x: Tensor) -> Tensor:
    a, b = x.repeat(1, 2, 1, 1).chunk(2, 1)
    a = a + m.branch(b)
    b = b + m.second(a).relu()
    return torch.cat([a, b], 1)


def _coupled_layers(m: Written, x: Tensor) -> Tensor:
    """Reformer's: both halves start as the input."""
    a = b = m.norm(x)
    for _ in range(2):
        a = a + m.out(m.q(m.norm(b)).relu())
        b = b + m.v(m.k(m.norm(a)).relu())
    return torch.cat([a, b], -1)


def _tokens_beside_an_image(m: Written, x: Tensor) -> tuple[Tensor, Tensor]:
    """The end of SAM's decoder: tokens read the image, the image the tokens, and the tokens the image once more."""
    image, tokens = m.q(x), m.k(x[:, :2])
    tokens = m.norm(tokens + F.scaled_dot_product_attention(tokens, image, image))
    image = m.norm(image + m.out(F.scaled_dot_product_attention(image, tokens, tokens)))
    return m.v(tokens + m.out(F.scaled_dot_product_attention(tokens, image, image))), m.q(image)


def _part_in_place(m: Written, x: Tensor) -> Tensor:
    x = m.norm(x).clone()
    x[:, :4] += m.q(m.norm(x[:, :4])).relu()
    return m.out(x)


def _joined_twice(m: Written, x: Tensor) -> Tensor:
    first, rest = x[:, :2], x[:, 2:]
    for _ in range(2):
        normed = m.norm(torch.cat([first, rest], 1))
        mixed = m.out(torch.cat([normed[:, 2:], normed[:, :2]], 1).relu())
        first, rest = (mixed + torch.cat([first, rest], 1)).split([2, 4], 1)
    return m.q(torch.cat([rest, first], 1))


def _mixed_streams(m: Written, x: Tensor) -> Tensor:
    """Of hyper-connections the last: the block reads one mixture of the streams, and is added to each of the others."""
    mixed = torch.einsum("bld,dm->bmld", x, m.q.weight[:, :4])
    return m.k((mixed[:, 1:] + m.out(m.norm(mixed[:, 0]).relu())[:, None]).sum(1))


@pytest.mark.parametrize(
    ("forward", "x", "expected"),
    [
        (_joined_twice, TOKENS, (2, 0)),
        (_coupled, X, (2, 0)),
        (_part_in_place, TOKENS, (1, 0)),
        (_mixed_streams, TOKENS, (1, 0)),
        (_coupled_layers, TOKENS, (4, 0)),
        (_tokens_beside_an_image, TOKENS, (3, 0)),
    ],
)
def test_streams_that_hold_a_part_of_the_value(forward: Callable[..., Any], x: Tensor, expected: tuple[int, int]) -> None:
    assert adds(forward, x) == expected


@pytest.mark.parametrize("name", ["decoder's long skip", "levels brought to one size"])
def test_levels_that_join_stay_fusions(name: str) -> None:
    forward, inputs, _ = LOOK_ALIKES[name]
    assert fusions(forward, *inputs) == 1


def _channel_gate(m: Written, x: Tensor) -> Tensor:
    """By average and maximum, as in CBAM."""
    return x * (m.branch(F.adaptive_avg_pool2d(x, 1)) + m.branch(F.adaptive_max_pool2d(x, 1))).sigmoid()


def test_a_gate_of_several_statistics_is_no_fusion() -> None:
    assert (fusions(_channel_gate, X), adds(_channel_gate, X)) == (0, (0, 0))


def test_a_product_added_to_a_bias_stays_a_layer() -> None:
    graph = ModelGraph.from_model(Written(lambda m, x: torch.addmm(m.q.bias, x[:, 0], m.q.weight).relu()), TOKENS)
    assert [node.op for node in graph.nodes if node.reads] == ["addmm"]


def test_a_cast_that_finds_nothing_to_convert_is_no_operation() -> None:
    """The code goes on with the same tensor, so a shortcut would seem to start at the norm's own cast."""
    graph = ModelGraph.from_model(Written(lambda m, x: x + m.out(m.norm(x.float()).contiguous().to(torch.float32))), TOKENS)
    assert [node.op for node in graph.nodes] == ["input", "layer_norm", "linear", "add"]


def test_a_cast_that_converts_stays_one() -> None:
    graph = ModelGraph.from_model(Written(lambda m, x: m.out(x.double().float())), TOKENS)
    assert [node.op for node in graph.nodes] == ["input", "to", "to", "linear"]
