"""Roles of real models, and of what they lack."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pl_normkit.errors import TraceError
from pl_normkit.methods.weight_decay import ModelRoles, Role, parameter_roles, read_model
from tests.methods.weight_decay.models import build
from tests.methods.weight_decay.tables import TABLES, Table

R = Role


def expected_roles(table: Table, names: list[str]) -> dict[str, Role]:
    """Every name must fit exactly one row, every row as many names as it says."""
    fits = {name: [row for row in table if re.fullmatch(row[0], name)] for name in names}
    assert {name: len(rows) for name, rows in fits.items()} == dict.fromkeys(names, 1)
    counts = Counter(rows[0][0] for rows in fits.values())
    assert counts == Counter({pattern: count for pattern, _, count in table})
    return {name: rows[0][1] for name, rows in fits.items()}


@functools.cache
def read_real_model(spec: str) -> ModelRoles:
    return read_model(*build(spec))


@pytest.mark.parametrize("spec", TABLES)
def test_roles_are_those_of_the_source(spec: str) -> None:
    known = read_real_model(spec)

    assert expected_roles(TABLES[spec], list(known.roles)) == known.roles


class Small(nn.Module):
    """One parameter of each kind that the models above lack."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 2, 8))
        self.temperature = nn.Parameter(torch.ones(1, 1, 1))
        self.logit_scale = nn.Parameter(torch.ones(()))
        self.slope = nn.PReLU(8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.tokens = nn.Embedding(10, 8)
        self.shift = nn.Parameter(torch.zeros(8))
        self.unread = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slope(self.normed(x).transpose(1, 2)).transpose(1, 2) + self.shift
        attention = ((x @ x.transpose(1, 2)) * self.temperature).softmax(-1)
        x = self.recurrent(attention @ x)[0]
        x = nn.functional.scaled_dot_product_attention(self.query.expand(x.shape[0], -1, -1), x, x)
        return x.mean(1) * self.logit_scale.exp()


def test_rarer_roles() -> None:
    expected = {
        "query": R.TOKEN,
        "temperature": R.TEMPERATURE,
        "logit_scale": R.TEMPERATURE,
        "shift": R.BIAS,
        "slope.weight": R.SLOPE,
        "normed.bias": R.BIAS,
        "normed.parametrizations.weight.original0": R.GAIN,
        "normed.parametrizations.weight.original1": R.WEIGHT,
        "recurrent.weight_ih_l0": R.WEIGHT,
        "recurrent.weight_hh_l0": R.WEIGHT,
        "recurrent.bias_ih_l0": R.BIAS,
        "recurrent.bias_hh_l0": R.BIAS,
        "tokens.weight": R.UNKNOWN,
        "unread.weight": R.WEIGHT,
        "unread.bias": R.BIAS,
    }
    assert expected == parameter_roles(Small(), torch.zeros(2, 5, 8))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            "hf:roberta",  # positions are counted from the input ids
            {
                "embeddings.word_embeddings.weight": R.EMBEDDING,
                "embeddings.token_type_embeddings.weight": R.EMBEDDING,
                "embeddings.position_embeddings.weight": R.POSITION,
            },
        ),
        (
            "hf:t5",  # a table of relative positions kept in an nn.Embedding
            {
                "shared.weight": R.EMBEDDING,
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": R.RELATIVE_POSITION,
            },
        ),
    ],
)
def test_tables_go_by_what_looks_them_up(spec: str, expected: dict[str, Role]) -> None:
    model = build(spec)[0]
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in tables}

    assert expected == {name: role for name, role in read_real_model(spec).roles.items() if name in names}


def test_without_inputs_only_module_types_are_read() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(), nn.Embedding(4, 8), nn.MultiheadAttention(8, 2), nn.GRU(8, 8))
    model.register_parameter("bare", nn.Parameter(torch.zeros(8)))
    expected = {
        "bare": R.UNKNOWN,
        "0.weight": R.WEIGHT,
        "0.bias": R.BIAS,
        "1.weight": R.UNKNOWN,
        "1.bias": R.BETA,
        "2.weight": R.SLOPE,
        "3.weight": R.UNKNOWN,
        "4.in_proj_weight": R.WEIGHT,
        "4.in_proj_bias": R.BIAS,
        "4.out_proj.weight": R.WEIGHT,
        "4.out_proj.bias": R.BIAS,
        "5.weight_ih_l0": R.WEIGHT,
        "5.weight_hh_l0": R.WEIGHT,
        "5.bias_ih_l0": R.BIAS,
        "5.bias_hh_l0": R.BIAS,
    }
    assert expected == parameter_roles(model)


def test_module_types_and_graph_agree_where_both_know() -> None:
    traced = read_real_model("timm:vit_base_patch16_224").roles
    by_type = {name: role for name, role in parameter_roles(build("timm:vit_base_patch16_224")[0]).items() if role is not R.UNKNOWN}

    assert by_type == {name: traced[name] for name in by_type}
    assert len(by_type) == 12 * (4 * 2 + 2) + 5


def test_names_do_not_decide() -> None:
    class Misnamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_embed = nn.Linear(8, 8)
            self.bias = nn.Parameter(torch.ones(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.pos_embed(x) @ self.bias

    expected = {"bias": R.WEIGHT, "pos_embed.weight": R.WEIGHT, "pos_embed.bias": R.BIAS}
    assert expected == parameter_roles(Misnamed(), torch.zeros(2, 8))


def test_reading_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    parameter_roles(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))

    assert not model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_model_that_cannot_be_traced_raises() -> None:
    class Jumpy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum().item() > 0 else x

    with pytest.raises(TraceError, match="Jumpy cannot be read"):
        parameter_roles(Jumpy(4, 4), torch.zeros(2, 4))


def test_compiled_parts_keep_their_names() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), torch.compile(nn.BatchNorm2d(4)))
    expected = {"0.weight": R.WEIGHT, "0.bias": R.BIAS, "1._orig_mod.weight": R.GAMMA_TRUNK, "1._orig_mod.bias": R.BETA}

    assert expected == parameter_roles(model, torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_a_wrapped_model_has_the_roles_of_the_original(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.zeros(2, 3, 8, 8)
    wrapped = wrap(model)
    assert list(parameter_roles(wrapped, x)) == [name for name, _ in wrapped.named_parameters()]
    assert list(parameter_roles(wrapped, x).values()) == [R.WEIGHT, R.BIAS, R.GAMMA_TRUNK, R.BETA]


CORE = {"tv:wide_resnet50_2": 53, "timm:regnety_032": 68, "smp:Unet": 36, "tv:efficientnet_b0": 0, "timm:resnetv2_50": 0, "tv:swin_t": 0}


@pytest.mark.parametrize(("spec", "core"), CORE.items())
def test_the_derivation_speaks_with_confidence_of_post_activation_networks_alone(spec: str, core: int) -> None:
    assert core == len(read_real_model(spec).core_gammas)
