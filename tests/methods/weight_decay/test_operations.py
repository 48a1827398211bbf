"""Hand-set parameters of small networks: the role of each is known from what the code does with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.methods.weight_decay import Role, parameter_roles

R = Role
Case = tuple[nn.Module, Any, dict[str, Role]]
CASES: dict[str, Callable[[], Case]] = {}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    CASES[build.__name__.removeprefix("_")] = build
    return build


class Net(nn.Module):
    """Parameters and modules by name, and a forward given as a function of them."""

    def __init__(self, forward: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self, *inputs)


def p(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) if shape else torch.ones(()))


TOKENS = torch.zeros(2, 6, 8)


@case
def _recurrent_cells() -> Case:
    def forward(net: Any, x: Tensor) -> Tensor:
        h, c = net.lstm(x[:, 0])
        h = net.gru(x[:, 1], h)
        return net.rnn(x[:, 2], h) + c

    roles = {f"{cell}.{leaf}_{end}": role for cell in ("lstm", "gru", "rnn") for leaf, role in _BOTH for end in ("ih", "hh")}
    return Net(forward, lstm=nn.LSTMCell(8, 8), gru=nn.GRUCell(8, 8), rnn=nn.RNNCell(8, 8, nonlinearity="relu")), TOKENS, roles


_BOTH = (("weight", R.WEIGHT), ("bias", R.BIAS))


@case
def _cell_written_out() -> Case:
    def forward(net: Any, x: Tensor) -> Tensor:
        h = torch.zeros(2, 8)
        for t in range(3):
            h = torch.tanh(x[:, t] @ net.w + torch.addmm(net.b, h, net.u)) + torch.sigmoid(h @ net.v + net.read(x[:, t]))
        return h

    parts = {"w": p(8, 8), "u": p(8, 8), "v": p(8, 8), "b": p(8), "read": nn.Linear(8, 8)}
    roles = {"w": R.WEIGHT, "u": R.WEIGHT, "v": R.WEIGHT, "b": R.BIAS, **{f"read.{leaf}": role for leaf, role in _BOTH}}
    return Net(forward, **parts), TOKENS, roles


@case
def _layer_whose_weight_another_network_makes() -> Case:
    def forward(net: Any, x: Tensor) -> Tensor:
        weight = net.maker(x.mean((0, 1))).view(8, 8)
        x = net.first(x)
        return x + F.linear(net.norm(x).relu(), weight)

    parts = {"first": nn.Linear(8, 8), "maker": nn.Linear(8, 64), "norm": nn.LayerNorm(8)}
    roles = {f"{name}.{leaf}": role for name in ("first", "maker") for leaf, role in _BOTH}
    return Net(forward, **parts), TOKENS, {**roles, "norm.weight": R.GAMMA_BRANCH, "norm.bias": R.BETA}


EXPERTS = {"w1": R.WEIGHT, "w2": R.WEIGHT, "b1": R.BIAS, "b2": R.BIAS}


@case
def _experts_by_einsum() -> Case:
    def forward(net: Any, x: Tensor) -> Tensor:
        gate = net.router(x).softmax(-1)
        hidden = torch.einsum("btd,edf->betf", x, net.w1) + net.b1[:, None]
        out = torch.einsum("betf,efd->betd", F.gelu(hidden), net.w2) + net.b2[:, None]
        return x + torch.einsum("bte,betd->btd", gate, out)

    parts = {"router": nn.Linear(8, 4, bias=False), "w1": p(4, 8, 16), "w2": p(4, 16, 8), "b1": p(4, 16), "b2": p(4, 8)}
    return Net(forward, **parts), TOKENS, {"router.weight": R.WEIGHT, **EXPERTS}


@case
def _experts_in_a_batch() -> Case:
    def forward(net: Any, x: Tensor) -> Tensor:
        each = x.reshape(1, -1, 8).expand(4, -1, -1)
        hidden = torch.bmm(each, net.w1) + net.b1[:, None, :]
        out = torch.baddbmm(net.b2[:, None, :], hidden.relu(), net.w2)
        return x + out.mean(0).view_as(x)

    return Net(forward, w1=p(4, 8, 16), w2=p(4, 16, 8), b1=p(4, 16), b2=p(4, 8)), TOKENS, EXPERTS


@case
def _experts_chosen_by_index() -> Case:
    def forward(net: Any, x: Tensor) -> Tensor:
        chosen = net.router(x[:, 0]).argmax(-1)
        hidden = torch.einsum("btd,bdf->btf", x, net.w1[chosen]) + net.b1[chosen][:, None]
        out = torch.bmm(hidden.relu(), net.w2.index_select(0, chosen)) + net.b2.index_select(0, chosen)[:, None]
        return x + out

    parts = {"router": nn.Linear(8, 4, bias=False), "w1": p(4, 8, 16), "w2": p(4, 16, 8), "b1": p(4, 16), "b2": p(4, 8)}
    return Net(forward, **parts), TOKENS, {"router.weight": R.WEIGHT, **EXPERTS}


@case
def _experts_in_a_loop() -> Case:
    def forward(net: Any, x: Tensor) -> Tensor:
        gate = net.router(x).softmax(-1)
        outs = [F.linear(F.linear(x, net.w1[e], net.b1[e]).relu(), net.w2[e], net.b2[e]) * gate[..., e : e + 1] for e in range(4)]
        return x + torch.stack(outs).sum(0)

    parts = {"router": nn.Linear(8, 4, bias=False), "w1": p(4, 16, 8), "w2": p(4, 8, 16), "b1": p(4, 16), "b2": p(4, 8)}
    return Net(forward, **parts), TOKENS, {"router.weight": R.WEIGHT, **EXPERTS}


@case
def _tables_read_between_their_cells() -> Case:
    """Positions of patches at any size (GLM-4V), and a plane of features looked up at points."""

    def forward(net: Any, x: Tensor, points: Tensor) -> Tensor:
        grid = points[None, :, None, :].tanh()
        places = F.grid_sample(net.places.weight.T.reshape(1, 8, 3, 3), grid, align_corners=False)[0, :, :, 0].T
        found = F.grid_sample(net.plane[None], grid, align_corners=False)[0, :, :, 0].T
        return net.out(x[0] + places).relu() * net.read(found)

    parts = {"places": nn.Embedding(9, 8), "plane": p(8, 5, 5), "out": nn.Linear(8, 8), "read": nn.Linear(8, 8)}
    roles = {f"{name}.{leaf}": role for name in ("out", "read") for leaf, role in _BOTH}
    return Net(forward, **parts), (TOKENS, torch.zeros(6, 2)), {"places.weight": R.POSITION, "plane": R.EMBEDDING, **roles}


@case
def _heads_in_the_weight() -> Case:
    """Query, key and value weights with an axis of their own for the heads, shifts too (Flax, XLNet)."""

    def forward(net: Any, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bld,dhc->blhc", x, w) + b for w, b in ((net.wq, net.bq), (net.wk, net.bk), (net.wv, net.bv)))
        scores = torch.einsum("blhc,bmhc->bhlm", q, k).softmax(-1)
        return x + torch.einsum("bhlm,bmhc,hcd->bld", scores, v, net.wo)

    parts = {f"w{n}": p(8, 2, 4) for n in "qkv"} | {f"b{n}": p(2, 4) for n in "qkv"} | {"wo": p(2, 4, 8)}
    return Net(forward, **parts), TOKENS, {name: R.BIAS if name.startswith("b") else R.WEIGHT for name in parts}


def attend(net: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return ((q @ k.transpose(-1, -2)) / 8**0.5 + bias).softmax(-1) @ v


def near(size: int) -> Tensor:
    return (torch.arange(size)[:, None] - torch.arange(size)[None]) + size - 1


@case
def _relative_table_added_by_index() -> Case:
    def forward(net: Any, x: Tensor) -> Tensor:
        return attend(net, x, net.k(x), x, net.table[near(6)].unsqueeze(0))

    return Net(forward, k=nn.Linear(8, 8, bias=False), table=p(11)), TOKENS, {"k.weight": R.WEIGHT, "table": R.RELATIVE_POSITION}


@case
def _relative_table_under_a_mask() -> Case:
    """As T5 keeps it: an embedding of distances, with the mask filled into it before it is added."""

    def forward(net: Any, x: Tensor, keep: Tensor) -> Tensor:
        bias = net.table(near(6)).permute(2, 0, 1)[None].masked_fill(keep[:, None, None] == 0, -1e9)
        x = x + F.scaled_dot_product_attention(x[:, None], net.k(x)[:, None], x[:, None], attn_mask=bias)[:, 0]
        other = torch.where(keep[:, None] > 0, net.other(near(6))[..., 0], -1e9)
        return attend(net, x, net.k(x), x, other)

    parts = {"k": nn.Linear(8, 8, bias=False), "table": nn.Embedding(11, 1), "other": nn.Embedding(11, 1)}
    roles = {"k.weight": R.WEIGHT, "table.weight": R.RELATIVE_POSITION, "other.weight": R.RELATIVE_POSITION}
    return Net(forward, **parts), (TOKENS, torch.ones(2, 6)), roles


@case
def _relative_keys() -> Case:
    """Shaw and BERT's relative_key: an embedding of distances multiplied with the queries, added to the scores."""

    def forward(net: Any, x: Tensor) -> Tensor:
        q, k = net.q(x), net.k(x)
        distance = torch.einsum("bld,lmd->blm", q, net.table(near(6)))
        return (((q @ k.transpose(1, 2)) + distance) / 3).softmax(-1) @ x

    parts = {"q": nn.Linear(8, 8, bias=False), "k": nn.Linear(8, 8, bias=False), "table": nn.Embedding(11, 8)}
    return Net(forward, **parts), TOKENS, {"q.weight": R.WEIGHT, "k.weight": R.WEIGHT, "table.weight": R.RELATIVE_POSITION}


@case
def _relative_table_behind_a_projection_and_a_gather() -> Case:
    """DeBERTa: the table is normalized and projected, multiplied with queries and keys, gathered, and added to the scores."""

    def forward(net: Any, x: Tensor) -> Tensor:
        q, k = net.q(x), net.k(x)
        table = net.norm(net.table.weight)
        index = near(6)[None].expand(2, -1, -1)
        to_position = torch.gather(q @ net.k(table).transpose(-1, -2), -1, index)
        from_position = torch.gather(k @ net.q(table).transpose(-1, -2), -1, index).transpose(-1, -2)
        return ((q @ k.transpose(-1, -2)) + (to_position + from_position) / 3).softmax(-1) @ x

    parts = {"q": nn.Linear(8, 8, bias=False), "k": nn.Linear(8, 8, bias=False), "table": nn.Embedding(11, 8), "norm": nn.LayerNorm(8)}
    roles = {"q.weight": R.WEIGHT, "k.weight": R.WEIGHT, "table.weight": R.RELATIVE_POSITION}
    return Net(forward, **parts), TOKENS, {**roles, "norm.weight": R.GAMMA_TRUNK, "norm.bias": R.BETA}


@case
def _relative_table_copied_in_place() -> Case:
    """MViT: the scores between patches get the table's products in place, those of the class token do not."""

    def forward(net: Any, x: Tensor) -> Tensor:
        q = net.q(x)
        scores = q @ net.k(x).transpose(-1, -2)
        scores[:, 1:, 1:] += torch.einsum("bld,lmd->blm", q[:, 1:], net.table[near(5)])
        return scores.softmax(-1) @ x

    parts = {"q": nn.Linear(8, 8, bias=False), "k": nn.Linear(8, 8, bias=False), "table": p(9, 8)}
    return Net(forward, **parts), TOKENS, {"q.weight": R.WEIGHT, "k.weight": R.WEIGHT, "table": R.RELATIVE_POSITION}


@case
def _shifts_by_head() -> Case:
    """DeBERTa's and Transformer-XL's shifts of the queries: one per head and channel, the same at every position."""

    def forward(net: Any, x: Tensor) -> Tensor:
        q, k, v = (m(x).view(2, 6, 2, 4).transpose(1, 2) for m in (net.q, net.k, net.v))
        q = q + net.bq.view(1, 2, 1, 4)
        v = v + net.bv.view(1, 2, 1, 4)
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).reshape(2, 6, 8)

    parts = {name: nn.Linear(8, 8, bias=False) for name in "qkv"}
    return Net(forward, **parts, bq=p(8), bv=p(8)), TOKENS, {**{f"{n}.weight": R.WEIGHT for n in "qkv"}, "bq": R.BIAS, "bv": R.BIAS}


@case
def _axial_positions_and_fourier_features() -> Case:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.stem(x) + net.rows + net.columns
        return y + torch.sin(net.frequency[:, None, None] * torch.arange(4.0))

    parts = {"stem": nn.Conv2d(3, 8, 1, bias=False), "rows": p(1, 8, 5, 1), "columns": p(1, 8, 1, 4), "frequency": p(8)}
    roles = {"stem.weight": R.WEIGHT, "rows": R.POSITION, "columns": R.POSITION}
    return Net(forward, **parts), torch.zeros(2, 3, 5, 4), {**roles, "frequency": R.POSITION}


def cross(net: Any, x: Tensor, latents: Tensor) -> Tensor:
    return attend(net, net.q(latents), net.k(x), net.v(x))


QKV = {f"{name}.weight": R.WEIGHT for name in "qkv"}


def qkv() -> dict[str, nn.Module]:
    return {name: nn.Linear(8, 8, bias=False) for name in "qkv"}


@case
def _probe_of_an_attention_head() -> Case:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.attention(net.probe.repeat(x.shape[0], 1, 1), x, x)[0][:, 0]

    roles = {"in_proj_weight": R.WEIGHT, "in_proj_bias": R.BIAS, "out_proj.weight": R.WEIGHT, "out_proj.bias": R.BIAS}
    parts = {"probe": p(1, 1, 8), "attention": nn.MultiheadAttention(8, 2, batch_first=True)}
    return Net(forward, **parts), TOKENS, {"probe": R.TOKEN, **{f"attention.{n}": role for n, role in roles.items()}}


@case
def _latents_that_ask_and_are_added_to_the_answer() -> Case:
    def forward(net: Any, x: Tensor) -> Tensor:
        latents = net.latents.expand(2, -1, -1)
        return latents + cross(net, x, net.norm(latents))

    roles = {"latents": R.TOKEN, "norm.weight": R.GAMMA_TRUNK, "norm.bias": R.BETA, **QKV}
    return Net(forward, latents=p(1, 3, 8), norm=nn.LayerNorm(8), **qkv()), TOKENS, roles


@case
def _latents_that_ask_by_heads() -> Case:
    def forward(net: Any, x: Tensor) -> Tensor:
        q, k, v = (net.q(net.norm(net.latents)), net.k(x), net.v(x))
        scores = heads(q.expand(2, -1, -1)) @ heads(k).transpose(-1, -2) / 2
        return net.latents + (scores.softmax(-1) @ heads(v)).transpose(1, 2).flatten(2)

    roles = {"latents": R.TOKEN, "norm.weight": R.GAMMA_TRUNK, "norm.bias": R.BETA, **QKV}
    return Net(forward, latents=p(1, 3, 8), norm=nn.LayerNorm(8), **qkv()), TOKENS, roles


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


@case
def _tables_looked_up_by_a_product() -> Case:
    """By one-hot vectors, and by weights that the sizes of images give; a layer of measured numbers is none."""

    def forward(net: Any, words: Tensor, sizes: Tensor, x: Tensor) -> Tensor:
        weights = (1 - (torch.arange(5) - sizes[:, None, None] / 6 * torch.arange(6)[:, None]).abs()).clamp(min=0)
        return F.one_hot(words, 7).float() @ net.words + weights @ net.places + x @ net.layer

    roles = {"words": R.EMBEDDING, "places": R.EMBEDDING, "layer": R.WEIGHT}
    inputs = (torch.zeros(2, 6, dtype=torch.long), torch.ones(2, dtype=torch.long), TOKENS)
    return Net(forward, words=p(7, 8), places=p(5, 8), layer=p(8, 8)), inputs, roles


@case
def _queries_of_a_decoder_through_the_fused_kernel() -> Case:
    def forward(net: Any, x: Tensor) -> Tensor:
        q = net.q(net.queries.weight)[None].expand(2, -1, -1)
        return F.scaled_dot_product_attention(q, net.k(x), net.v(x))

    return Net(forward, queries=nn.Embedding(3, 8), **qkv()), TOKENS, {"queries.weight": R.TOKEN, **QKV}


@case
def _prefixes_and_prompts() -> Case:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = torch.cat([net.prompt.expand(2, -1, -1), x], 1)
        k = torch.cat([net.prefix_k.expand(2, -1, -1), net.k(x)], 1)
        v = torch.cat([net.prefix_v.expand(2, -1, -1), net.v(x)], 1)
        return attend(net, net.q(x), k, v)

    roles = {"prompt": R.TOKEN, "prefix_k": R.TOKEN, "prefix_v": R.TOKEN, **QKV}
    return Net(forward, prompt=p(1, 2, 8), prefix_k=p(1, 2, 8), prefix_v=p(1, 2, 8), **qkv()), TOKENS, roles


@case
def _class_token_with_its_share_of_the_positions() -> Case:
    """The slice of the positions that meets the class token never meets activations alone; the rest is added to patches."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.q(x) + net.position[:, 1:]
        x = torch.cat([(net.cls + net.position[:, :1]).expand(2, -1, -1), x], 1)
        return attend(net, x, net.k(x), net.v(x))

    return Net(forward, position=p(1, 7, 8), cls=p(1, 1, 8), **qkv()), TOKENS, {"position": R.POSITION, "cls": R.TOKEN, **QKV}


@case
def _low_rank_factors() -> Case:
    """LoRA in the weight and beside it, LoHa, LoKr."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = F.linear(x, net.w.weight + net.b1 @ net.a1 * 0.5)
        x = net.w(x) + (x @ net.a2 @ net.b2) * 0.5
        x = F.linear(x, net.w.weight + (net.ha @ net.hb) * (net.hc @ net.hd))
        return F.linear(x, net.w.weight + torch.kron(net.ka, net.kb))

    factors = {"a1": p(2, 8), "b1": p(8, 2), "a2": p(8, 2), "b2": p(2, 8), "ha": p(8, 2), "hb": p(2, 8), "hc": p(8, 2), "hd": p(2, 8)}
    factors |= {"ka": p(2, 2), "kb": p(4, 4)}
    return Net(forward, w=nn.Linear(8, 8, bias=False), **factors), TOKENS, dict.fromkeys(["w.weight", *factors], R.WEIGHT)


@case
def _weights_with_a_magnitude() -> Case:
    """DoRA in both orders of its product, a standardized weight with a gain, three weights side by side."""

    def forward(net: Any, x: Tensor) -> Tensor:
        w = net.w.weight + net.b @ net.a
        x = F.linear(x, net.m * w / w.norm(dim=1, keepdim=True))
        x = F.linear(x, net.m2 / w.norm(dim=1, keepdim=True) * w)
        v = net.v.weight
        x = F.linear(x, (v - v.mean(1, keepdim=True)) * v.var(1, keepdim=True).rsqrt() * net.gain, net.v.bias)
        return F.linear(x, torch.cat([net.w1, net.w2, net.w3]))

    parts = {"w": nn.Linear(8, 8, bias=False), "v": nn.Linear(8, 8), "a": p(2, 8), "b": p(8, 2), "m": p(8, 1), "m2": p(8, 1)}
    parts |= {"gain": p(8, 1), "w1": p(2, 8), "w2": p(2, 8), "w3": p(4, 8)}
    gains = {"m": R.GAIN, "m2": R.GAIN, "gain": R.GAIN, "v.bias": R.BIAS}
    weights = dict.fromkeys(["w.weight", "v.weight", "a", "b", "w1", "w2", "w3"], R.WEIGHT)
    return Net(forward, **parts), TOKENS, gains | weights


@case
def _factors_on_activations() -> Case:
    """(IA)^3 on keys and between layers, a temperature by head, one at the output, a whole branch's scale, a gate with too many axes."""

    def forward(net: Any, x: Tensor) -> Tensor:
        q, k, v = net.q(x), net.k(x) * net.on_keys, net.v(x)
        x = x + net.scale * (((q @ k.transpose(1, 2)) * net.temperature).softmax(-1) @ v)
        x = net.k(net.q(x) * net.between) * net.field
        return (net.v(x).mean(1) + net.shift) * net.out.exp()

    parts = {"on_keys": p(8), "temperature": p(1, 1, 1), "scale": p(8), "between": p(8), "field": p(1, 6, 8), "out": p(), "shift": p()}
    roles = {"on_keys": R.GAIN, "temperature": R.TEMPERATURE, "scale": R.LAYER_SCALE, "between": R.GAIN, "field": R.UNKNOWN}
    return Net(forward, **parts, **qkv()), TOKENS, {**roles, "out": R.TEMPERATURE, "shift": R.BIAS, **QKV}


@case
def _heads_spectra_and_noise() -> Case:
    """A shift of queries by head, a mixer of scores, a kernel in the frequency domain, and the strengths of a matrix and of noise."""

    def forward(net: Any, x: Tensor) -> Tensor:
        q, k, v = ((layer(x).view(2, 6, 2, 4) + shift) for layer, shift in ((net.q, net.asked), (net.k, 0), (net.v, 0)))
        scores = torch.einsum("bhlm,hg->bglm", torch.einsum("blhd,bmhd->bhlm", q, k), net.heads)
        x = x + torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v).flatten(2)
        x = x + torch.fft.irfft(torch.fft.rfft(net.q(x), dim=1) * torch.fft.rfft(net.kernel.exp(), dim=0), n=6, dim=1)
        return x @ (net.matrix * net.gain) + net.strength * torch.randn(x.shape)

    parts = {"asked": p(2, 4), "heads": p(2, 2), "kernel": p(6, 8), "matrix": p(8, 8), "gain": p(), "strength": p(1)}
    roles = {"asked": R.BIAS, "heads": R.WEIGHT, "kernel": R.UNKNOWN, "matrix": R.WEIGHT, "gain": R.GAIN, "strength": R.GAIN}
    return Net(forward, **parts, **qkv()), TOKENS, {**roles, **QKV}


@case
def _modulated_kernels() -> Case:
    """StyleGAN's convolution: the kernel is scaled by a style, and divided by its own length."""

    def forward(net: Any, x: Tensor) -> Tensor:
        kernel = net.kernel * (net.style(x.mean(1))[:, None, :, None] + 1)
        kernel = kernel * torch.rsqrt(kernel.pow(2).sum((2, 3), keepdim=True) + 1e-8)
        y = F.conv1d(x.transpose(1, 2).reshape(1, -1, x.shape[1]), kernel.flatten(0, 1), padding=1, groups=len(x))
        return net.out(y.view(*x.shape[::2], -1).transpose(1, 2))

    parts = {"kernel": p(8, 8, 3), "style": nn.Linear(8, 8), "out": nn.Linear(8, 8)}
    return (
        Net(forward, **parts),
        TOKENS,
        {"kernel": R.WEIGHT, **{f"{name}.{leaf}": role for name in ("style", "out") for leaf, role in _BOTH}},
    )


@case
def _what_the_forward_pass_does_not_read() -> Case:
    parts = {"used": nn.Linear(8, 8), "spare": nn.Linear(8, 8), "cell": nn.GRUCell(8, 8), "norm": nn.LayerNorm(8), "bare": p(8)}
    roles = {f"{layer}.{leaf}": role for layer in ("used", "spare") for leaf, role in _BOTH}
    roles |= {f"cell.{leaf}_{end}": role for leaf, role in _BOTH for end in ("ih", "hh")}
    return Net(lambda net, x: net.used(x), **parts), TOKENS, {**roles, "norm.weight": R.UNKNOWN, "norm.bias": R.BETA, "bare": R.UNKNOWN}


@pytest.mark.parametrize("name", CASES)
def test_the_role_is_what_the_code_does_with_it(name: str) -> None:
    model, inputs, expected = CASES[name]()

    assert {key: str(role) for key, role in expected.items()} == {key: str(role) for key, role in parameter_roles(model, inputs).items()}
