"""The dropout of a head: of the same p in front of the pool it is weaker, and of another p as strong."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_normkit import audit, place_dropout
from pl_normkit.errors import ConfigError
from pl_normkit.findings import FixSafety, Severity
from pl_normkit.methods.dropout_placement.measure import equal_strength


class Features(nn.Module):
    """A block with batch norm, and a head that drops behind its pool, as a module or as a function call."""

    def __init__(self, p: float, is_pool_module: bool = True) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1) if is_pool_module else None
        self.drop, self.head = nn.Dropout(p), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        return self.head(self.drop(x.mean((2, 3)) if self.pool is None else self.pool(x).flatten(1)))


def noise_at_classifier(model: nn.Module, x: Tensor, draws: int) -> float:
    """Variance that dropout adds to the classifier's input, counted over many passes."""
    seen: list[Tensor] = []
    model.eval()
    model.head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    with torch.no_grad():
        for _ in range(draws):
            model(x)
    return float(torch.stack(seen).double().var(0).mean())


@pytest.mark.parametrize("is_pool_module", [True, False], ids=["pool module", "pool call"])
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_equal_strength_is_what_many_passes_count(p: float, is_pool_module: bool) -> None:
    torch.manual_seed(0)
    model, x = Features(p, is_pool_module), torch.randn(16, 3, 6, 6)
    behind = noise_at_classifier(model, x, 3000)
    evaluated = model.eval()(x)
    changes = place_dropout(model, x, head_p="equal_strength")
    assert torch.equal(model.eval()(x), evaluated)
    assert noise_at_classifier(model, x, 3000) == pytest.approx(behind, rel=0.05)
    changes.undo()
    place_dropout(model, x)
    assert noise_at_classifier(model, x, 300) < behind / 4


@pytest.mark.parametrize(
    ("maps", "expected"),
    [(torch.ones(2, 3, 4, 4), 16 / 17), (torch.zeros(2, 3, 4, 4), 0.5), (torch.rand(2, 3, 1, 1), 0.5)],
    ids=["constant maps", "nothing there", "one position"],
)
def test_equal_strength_by_hand(maps: Tensor, expected: float) -> None:
    assert equal_strength(0.5, maps) == pytest.approx(expected, abs=1e-12)


def test_an_unknown_head_p_is_refused_and_nothing_moves() -> None:
    model = Features(0.5)
    with pytest.raises(ConfigError, match="head_p"):
        place_dropout(model, torch.rand(2, 3, 8, 8), head_p="stronger")  # type: ignore[arg-type]
    assert isinstance(model.drop, nn.Dropout)


def test_the_head_is_a_note_that_no_safe_fix_moves() -> None:
    model, x = Features(0.5), torch.rand(2, 3, 8, 8)
    (found,) = audit(model, x, select=["NK104"]).findings
    assert (found.severity, found.fix_safety) == (Severity.NOTE, FixSafety.UNSAFE)
    assert "equal_strength" in found.advice


def test_pooled_noise_counted_on_tensors() -> None:
    """The formula without a network: half-normal features of 49 positions."""
    torch.manual_seed(1)
    maps = torch.relu(torch.randn(4000, 1, 7, 7))
    pooled = maps.mean((2, 3))
    behind = (F.dropout(pooled, 0.3) - pooled).var()
    before = (F.dropout(maps, equal_strength(0.3, maps)).mean((2, 3)) - pooled).var()
    assert float(before / behind) == pytest.approx(1.0, rel=0.06)
