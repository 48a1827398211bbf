"""The search against a list of losses: whether each can fail is computed here, by calling it."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from pl_normkit import audit_loss
from pl_normkit.findings import Finding, Severity
from pl_normkit.methods.nan_safety.losses.loss_call import read_loss_call
from pl_normkit.methods.nan_safety.losses.search import search
from tests.methods.nan_safety.losses import dense_loss_list, loss_list
from tests.methods.nan_safety.losses.loss_cases import Case

CASES = loss_list.CASES | dense_loss_list.CASES


def is_harmed(case: Case, arguments: tuple[Tensor, ...]) -> bool:
    """Whether the loss or a gradient of a free argument is not finite."""
    given = [a.clone().requires_grad_() if position in case.free else a for position, a in enumerate(arguments)]
    try:
        loss = case.loss(*given)
    except torch.linalg.LinAlgError:
        return False
    if not torch.isfinite(loss):
        return True
    loss.backward()
    gradients = [given[position].grad for position in case.free]
    return not all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)


@cache
def findings(name: str) -> list[Finding]:
    """What is more than a note, from the ordinary arguments alone."""
    case = CASES[name]
    example = tuple(a.requires_grad_() if position in case.free else a for position, a in enumerate(case.example()))
    report = audit_loss(case.loss, example)
    assert list(report.notes) == []
    return report.at_least("warning")


def test_the_list_is_long() -> None:
    assert len(CASES) >= 200


@pytest.mark.filterwarnings("ignore:.*degrees of freedom:UserWarning", "ignore:Converting a tensor:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_each_loss(name: str) -> None:
    """Every finding has a witness that holds; a loss that one of the list's trials breaks has a finding."""
    case = CASES[name]
    assert all(finding.witness is not None and is_harmed(case, finding.witness.arguments) for finding in findings(name))
    if any(is_harmed(case, make()) for make in (case.example, *case.trials)):
        assert findings(name)


STABLE = [
    "rmse with epsilon", "charbonnier", "huber", "F.normalize", "F.cosine_similarity", "triplet margin", "log cosh, stable",
    "eigenvalues", "supervised contrastive, guarded", "nll of log_softmax", "focal by log_softmax", "exp over sum, shifted", "logsumexp",
    "entropy by Categorical", "bce by hand, clamped", "bce on logits", "bce on the sigmoid", "binary focal by logsigmoid",
    "dice with smoothing", "tversky", "logit of the sigmoid, clamped", "gaussian nll with a floor",
    "squashed gaussian log probability, stable", "where before a log", "elu by hand, clamped", "iou of boxes, guarded",
    "silog of zero or more", "masked l1 by where", "half errors squared in float", "half epsilon that holds", "half exp below 0",
    "attention masked by a large number", "kl by log_softmax",
]  # fmt: skip


@pytest.mark.parametrize("name", STABLE)
def test_stable_forms_are_left_alone(name: str) -> None:
    assert findings(name) == []


CODES = {
    "rmse": "NK401", "sine from the cosine": "NK401", "focal tversky": "NK401", "bce by hand": "NK402", "entropy by log of p": "NK402",
    "silog": "NK401 NK403 NK404", "dice": "NK404", "normalize by hand": "NK404", "recall": "NK404", "sigmoid by hand": "NK409",
    "softplus by hand": "NK409", "geodesic angle": "NK407", "atanh of tanh": "NK407", "inverse error function": "NK407",
    "logit of the sigmoid": "NK407", "masked l1 by selection": "NK408", "void pixels": "NK408", "masked attention entropy": "NK408",
    "loss of one class by selection": "NK408", "eigenvectors": "NK410", "covariance log determinant": "NK410", "half squares": "NK405",
    "half sum": "NK405", "half product": "NK405", "half epsilon": "NK406", "tensor exponent": "NK404", "where after a log": "NK404",
    "contrast by root of var": "NK401", "barlow twins": "NK403", "inverse sigmoid depth": "NK404", "xlogy": "NK404", "msle": "NK404",
}  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), CODES.items())
def test_the_rule_explains_the_operation(name: str, expected: str) -> None:
    """Only what is sure: findings of severity error."""
    found = sorted({finding.code for finding in findings(name) if finding.severity is Severity.ERROR})
    assert set(expected.split()) <= set(found), found


def test_one_finding_per_cause() -> None:
    for name in CODES:
        causes = [(finding.code, finding.cause) for finding in findings(name)]
        assert len(causes) == len(set(causes))


def pair() -> tuple[Tensor, Tensor]:
    return torch.rand(4, 6).requires_grad_(), 0.5 + torch.rand(4, 6)


def ratio(pred: Tensor, target: Tensor) -> Tensor:
    return (pred / target).mean()


def test_what_the_network_does_not_make_is_arguable_beyond_the_values_seen() -> None:
    (finding,) = audit_loss(ratio, pair()).findings
    assert (finding.severity, finding.witness.changed) == (Severity.WARNING, ("target := 0 in one element",))


@pytest.mark.parametrize(
    "world", [{"domain": {"target": (0.1, 80.0)}}, {"domain": {1: (0.1, 80.0)}}, {"fixed": ["target"]}, {"fixed": [1]}]
)
def test_the_users_world(world: dict[str, object]) -> None:
    assert audit_loss(ratio, pair(), **world).findings == []  # type: ignore[arg-type]


def test_a_mask_that_is_never_empty() -> None:
    def loss(pred: Tensor, mask: Tensor) -> Tensor:
        return pred[mask].mean()

    example = torch.rand(4, 6).requires_grad_(), torch.rand(4, 6) > 0.3
    assert [finding.code for finding in audit_loss(loss, example).findings] == ["NK408"]
    assert audit_loss(loss, example, domain={"mask": "not empty"}).findings == []


def test_the_ends_of_a_domain_are_tried() -> None:
    (finding,) = audit_loss(lambda pred: (1 / (3 - pred)).sum(), (torch.rand(4, requires_grad=True),), domain={"pred": (0, 3)}).findings
    assert finding.witness.changed == ("pred := 3 in one element",)
    assert (
        audit_loss(lambda pred: (1 / (3 - pred)).sum(), (torch.rand(4, requires_grad=True),), domain={"pred": (0, 2)}).at_least("warning")
        == []
    )


def test_an_operation_is_steered_through_a_network() -> None:
    """Within [-1, 1] the layer passes 3 only where each input has the sign of its weight, which no border has and its gradient finds."""
    layer = nn.Linear(6, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, 6))
        layer.bias.fill_(0.37)

    def loss(x: Tensor) -> Tensor:
        return (3 - layer(x)).log().mean()

    (finding,) = audit_loss(loss, (torch.rand(4, 6, requires_grad=True),), domain={"x": (-1, 1)}).findings
    assert finding.code == "NK404"
    assert "moved until the log" in finding.witness.changed[0]


def test_labels_stay_among_the_values_seen() -> None:
    """Labels out of range would end the process; every value the loss is called with is recorded."""
    seen: set[int] = set()

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.update(labels.unique().tolist())
        return nn.functional.cross_entropy(logits, labels, ignore_index=9)

    (finding,) = audit_loss(loss, (torch.rand(4, 5, requires_grad=True), torch.tensor([0, 1, 3, 3]))).findings
    assert seen == {0, 1, 3, 9}
    assert finding.witness.changed == ("labels := 9 (ignored)",)


def test_the_example_itself_comes_first() -> None:
    (finding,) = audit_loss(
        lambda pred, target: (pred - target).square().mean().sqrt(), (torch.ones(3, requires_grad=True), torch.ones(3))
    ).findings
    assert (finding.severity, finding.witness.changed) == (Severity.ERROR, ())
    assert "called on the example itself" in finding.message


class Centered(nn.Module):
    """Keeps a running centre, which a call at infinity would spoil for the calls after it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        loss = (x.tanh() - 0 * self.centre).square().mean()
        self.centre.mul_(0.9).add_(x.detach().exp().mean(0))
        return loss


def test_a_loss_that_remembers_its_calls_is_no_witness() -> None:
    loss, example = Centered(), (torch.rand(4, 6, requires_grad=True),)
    before = torch.get_rng_state()
    assert audit_loss(loss, example).findings == []
    assert torch.equal(loss.centre, torch.zeros(6))
    assert torch.equal(before, torch.get_rng_state())


def test_the_callers_arguments_are_left_alone() -> None:
    pred, target = torch.rand(4), torch.rand(4)
    kept = pred.clone(), target.clone()
    audit_loss(lambda pred, target: (pred - target.mul_(2)).square().mean(), lambda: (pred, target))
    assert torch.equal(pred, kept[0])
    assert torch.equal(target, kept[1])
    assert not pred.requires_grad


def test_a_large_example_is_searched_on_a_crop_and_the_witness_is_whole() -> None:
    logits = torch.rand(8, 21, 64, 64).requires_grad_()
    labels = torch.randint(0, 21, (8, 64, 64))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.nll_loss(logits.softmax(1).log(), labels, ignore_index=255)

    found = search(read_loss_call(loss, (logits, labels)))
    assert {hit.arguments.tensor(0).shape for hit in found.hits} == {logits.shape}
    assert {hit.diagnosis.op for hit in found.hits} == {"torch.Tensor.log", "torch.nn.functional.nll_loss"}
    assert found.is_complete


def test_time_is_bounded() -> None:
    def slow(x: Tensor) -> Tensor:
        for _ in range(300):
            x = x.tanh() + 1
        return x.mean()

    found = search(read_loss_call(slow, (torch.rand(100, 100, requires_grad=True),), seconds=0.05))
    assert not found.is_complete
    assert found.seconds < 0.5


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, ["NK405"]), (torch.bfloat16, [])])
def test_under_autocast(dtype: torch.dtype, expected: list[str]) -> None:
    def loss(x: Tensor) -> Tensor:
        return (x @ x.T).float().softmax(1).square().sum()

    found = audit_loss(loss, (torch.rand(4, 6, requires_grad=True),), autocast=dtype).findings
    assert [finding.code for finding in found] == expected
