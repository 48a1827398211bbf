"""Shapes that broadcast in a loss, against what torch itself does with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.first_step.autograd_nodes import GraphView
from pl_normkit.first_step.broadcasts import broadcasts

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "square": lambda o, y: ((o - y) ** 2).mean(),
    "square turned round": lambda o, y: ((y - o) ** 2).mean(),
    "torch.square": lambda o, y: torch.square(o - y).sum(),
    "times itself": lambda o, y: ((o - y) * (o - y)).mean(),
    "abs": lambda o, y: (o - y).abs().mean(),
    "root": lambda o, y: torch.sqrt(((o - y) ** 2).mean()),
    "relative": lambda o, y: ((o - y) / (y + 3)).abs().mean(),
    "mse_loss": F.mse_loss,
    "l1_loss": F.l1_loss,
    "smooth_l1_loss": F.smooth_l1_loss,
    "huber_loss": F.huber_loss,
    "product": lambda o, y: (o * y).mean(),
    "quotient": lambda o, y: (o / (y + 3)).mean(),
}
UNASKED = {
    "column and row": ((6, 1), (6,)),
    "row and column": ((6,), (6, 1)),
    "maps and maps with a channel": ((4, 1, 5, 5), (4, 5, 5)),
}
MEANT = {
    "equal": ((6, 1), (6, 1)),
    "scalar": ((6, 1), ()),
    "one row": ((6, 3), (3,)),
    "weights of classes": ((6, 3), (1, 3)),
    "another size": ((6, 1), (4,)),
}


def seen(loss: Loss, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    output = nn.Linear(8, 1)(torch.randn(*shapes[0], 8)).squeeze(-1)
    value = loss(output, torch.rand(shapes[1]))
    return [(found.left, found.right, found.result) for found in broadcasts(GraphView.of([value], {}))]


@pytest.mark.filterwarnings("ignore:Using a (target|input) size")
@pytest.mark.parametrize("shapes", UNASKED.values(), ids=UNASKED)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_unasked_shapes_are_told_with_both_operands(loss: Loss, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    found = seen(loss, shapes)
    assert len(found) == 1
    left, right, result = found[0]
    assert {left, right} == set(shapes)
    assert result == tuple(torch.broadcast_shapes(*shapes))


@pytest.mark.filterwarnings("ignore:Using a (target|input) size")
@pytest.mark.parametrize("shapes", MEANT.values(), ids=MEANT)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_what_is_meant_is_left_alone(loss: Loss, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    assert seen(loss, shapes) == []


def test_a_matrix_of_targets_is_no_row() -> None:
    """Only the values tell (6, 6) targets from (6,): each column of these has its own."""
    assert seen(LOSSES["square"], ((6, 1), (6, 6))) == []


@pytest.mark.parametrize("pair", [lambda o: o[:, None] - o[None, :], lambda o: o.unsqueeze(1) - o, lambda o: o - o[:, None]])
def test_pairs_asked_for(pair: Callable[[Tensor], Tensor]) -> None:
    output = nn.Linear(8, 1)(torch.randn(6, 8)).squeeze(-1)
    assert broadcasts(GraphView.of([(pair(output) ** 2).mean()], {})) == ()
