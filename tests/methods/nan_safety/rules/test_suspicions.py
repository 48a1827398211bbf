"""What the graph of one call alone suggests: losses that make a rule suspicious and losses that must not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit.findings import Finding, Place, Severity
from pl_normkit.methods.nan_safety.losses.loss_call import read_loss_call
from pl_normkit.nn import BinaryFocalLoss, BinaryLogLoss, RMSELoss, SILogLoss, safe_log, safe_sqrt, stable_variance
from pl_normkit.rules import load_rules
from pl_normkit.subject import Subject

RULES = load_rules()
CODES = ("NK401", "NK402", "NK403", "NK404", "NK405", "NK406", "NK408")


def judge(loss: Tensor) -> list[Finding]:
    subject = Subject(loss=loss)
    return [finding for code in CODES for finding in RULES[code].judge(subject)]


def codes(loss: Tensor) -> list[str]:
    return [finding.code for finding in judge(loss)]


def leaf(dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.1 + torch.rand(4, 6, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()


MASK = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) > 0.3
GT = 0.1 + torch.rand(4, 6, generator=torch.Generator().manual_seed(2))

FIRING: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "NK401": [
        lambda x: F.mse_loss(x, GT).sqrt(),
        lambda x: ((x - GT) ** 2).mean() ** 0.5,
        lambda x: (x * x).sum().sqrt(),
        lambda x: x.var(correction=0).sqrt(),
        lambda x: 10 * torch.sqrt(((x - GT) ** 2).mean() - 0.85 * (x - GT).mean() ** 2),
        lambda x: torch.where(((x - GT) ** 2) > 0, ((x - GT) ** 2).sqrt(), 0.0).sum(),
        lambda x: torch.hypot(x - GT, x - GT).sum(),
        lambda x: (x - GT).square().mean().rsqrt(),
        lambda x: (1 - x.tanh() ** 2).sqrt().sum(),
        lambda x: F.relu(x).sqrt().sum(),
        lambda x: (x - GT).abs().clamp(min=0).sqrt().mean(),
        lambda x: torch.sqrt(4 * x**2).mean(),
        lambda x: torch.sqrt(MASK * (x - GT) ** 2).mean(),
    ],
    "NK402": [
        lambda x: torch.log(torch.sigmoid(x)).mean(),
        lambda x: -torch.log(1 - torch.sigmoid(x)).mean(),
        lambda x: (torch.log(80 * torch.sigmoid(x))[MASK] - GT[MASK].log()).abs().mean(),
        lambda x: F.interpolate(80 * torch.sigmoid(x)[None, None], scale_factor=2, mode="bilinear").log().mean(),
        lambda x: F.nll_loss(torch.log(F.softmax(x, 1)), torch.tensor([0, 1, 2, 3])),
        lambda x: torch.log10(torch.sigmoid(x)).mean(),
        lambda x: torch.log((80 * torch.sigmoid(x.half())).float() + 1e-3).mean(),
        lambda x: F.binary_cross_entropy(torch.sigmoid(x), MASK.float()),
    ],
    "NK403": [
        lambda x: torch.var(x[MASK]),
        lambda x: torch.var((x[MASK].log() - GT[MASK].log()) * 2),
        lambda x: x.masked_select(MASK).std(),
        lambda x: torch.var_mean(x[MASK])[0],
        lambda x: ((x**2).mean() - x.mean() ** 2 + 1e-12).sqrt(),
        lambda x: ((x * x).mean() - 1.0 * x.mean() ** 2 + 1e-12).log(),
    ],
    "NK404": [
        lambda x: (x / x.norm()).sum(),
        lambda x: torch.log(F.relu(x)).mean(),
        lambda x: (x * GT).sum() / (x - GT).abs().sum(),
        lambda x: (x - GT).abs().reciprocal().mean(),
        lambda x: ((x - GT) ** 2).pow(-1).mean(),
        lambda x: torch.log2(x - 0.05).mean(),
        lambda x: x.sum() / torch.zeros_like(MASK).sum(),
        lambda x: torch.log(torch.clamp(x, max=1.0) * 0.0).sum(),
        lambda x: torch.log(F.softplus(x)).mean(),
        lambda x: (x.exp() / x.exp().sum(1, keepdim=True)).sum(),
        lambda x: (1 / torch.sigmoid(x)).mean(),
    ],
    "NK408": [
        lambda x: x[torch.zeros_like(MASK)].mean(),
        lambda x: F.cross_entropy(x, torch.full((4,), -100)),
    ],
    "NK405": [
        lambda x: x.half().exp().mean(),
        lambda x: (x.half() ** 2).mean(),
        lambda x: x.half().square().mean(),
        lambda x: (x.half() - GT.half()).sum(),
        lambda x: (x.half() * 2 - 1).mul(3).exp().mean(),
    ],
    "NK406": [
        lambda x: torch.log(x.half().clamp_min(1e-8)).mean(),
        lambda x: torch.sqrt(F.relu(x.half() - 3) + 1e-8).mean(),
        lambda x: torch.log(F.relu(x.half() - 3) + 1e-8).mean(),
        lambda x: (x.half() / (F.relu(x.half() - 3) + 1e-8)).mean(),
    ],
}

QUIET: list[Callable[[Tensor], Tensor]] = [
    lambda x: F.logsigmoid(x).mean(),
    lambda x: F.nll_loss(F.log_softmax(x, 1), torch.tensor([0, 1, 2, 3])),
    lambda x: F.cross_entropy(x, torch.tensor([0, 1, 2, 3])),
    lambda x: F.binary_cross_entropy_with_logits(x, MASK.float()),
    lambda x: torch.sqrt(F.mse_loss(x, GT) + 1e-8),
    lambda x: F.mse_loss(x, GT).clamp_min(1e-8).sqrt(),
    lambda x: torch.sqrt(torch.where((x - GT) ** 2 > 1e-8, (x - GT) ** 2, 1.0)).sum(),
    lambda x: torch.sqrt(((x - GT) ** 2).masked_fill(~MASK, 1.0)).sum(),
    lambda x: torch.maximum((x - GT).abs(), torch.tensor(1e-6)).log().mean(),
    lambda x: torch.sqrt(1 + (x - GT) ** 2).mean(),
    lambda x: x.norm() + torch.linalg.vector_norm(x - GT, 3) + torch.cdist(x, x).sum(),
    lambda x: x.std() + x.var(),
    lambda x: x[MASK].var(correction=0),
    lambda x: x[MASK].mean(),
    lambda x: ((x * x).mean() - 0.85 * x.mean() ** 2 + 1e-6).sqrt(),
    lambda x: F.normalize(x, dim=1).sum(),
    lambda x: F.cosine_similarity(x, GT).sum(),
    lambda x: ((x - x.amax(1, keepdim=True)).exp() / (x - x.amax(1, keepdim=True)).exp().sum(1, keepdim=True)).sum(),
    lambda x: torch.log(x).mean(),
    lambda x: (2 * (x.sigmoid() * GT).sum() + 1) / (x.sigmoid().sum() + GT.sum() + 1),
    lambda x: x.sum() / MASK.sum(),
    lambda x: torch.log(80 * torch.sigmoid(x) + 1e-3).mean(),
    lambda x: torch.log((80 * torch.sigmoid(x)).clamp_min(1e-3)).mean(),
    lambda x: F.layer_norm(x, (6,)).mean(),
    lambda x: (x / (x.std() + 1e-6)).sum(),
    lambda x: (x / 3.0).mean(),
    lambda x: torch.exp(-(x.half().abs())).mean(),
    lambda x: (x.half() - x.half().amax(1, keepdim=True)).float().exp().sum(),
    lambda x: x.half().tanh().square().mean(),
    lambda x: (x.half().float() ** 2).sum(),
    lambda x: x.half().tanh().sum(),
    lambda x: torch.sqrt(x.half().abs() + 1e-3).mean(),
    lambda x: torch.log(x.half().clamp_min(1e-4)).mean(),
    lambda x: (x.bfloat16().abs() + 1e-8).sqrt().mean(),
    lambda x: safe_sqrt(F.mse_loss(x, GT)),
    lambda x: safe_log(x, 1e-6).mean(),
    lambda x: safe_sqrt(stable_variance(x - GT, MASK)),
    lambda x: SILogLoss(root=True)(x, GT, MASK),
    lambda x: SILogLoss("adabins", max_depth=80.0, root=True)(x.half(), GT.half(), MASK),
    lambda x: RMSELoss()(x, GT),
    lambda x: BinaryLogLoss()(x.half(), MASK),
    lambda x: BinaryFocalLoss()(x, MASK),
    lambda x: F.cross_entropy(x, F.one_hot(torch.tensor([0, 1, 2, 3]), 6).float(), label_smoothing=0.1),
]


@pytest.mark.parametrize(("code", "index"), [(code, index) for code in CODES for index in range(len(FIRING[code]))])
def test_firing(code: str, index: int) -> None:
    assert code in codes(FIRING[code][index](leaf()))


@pytest.mark.parametrize("index", range(len(QUIET)))
def test_quiet(index: int) -> None:
    assert codes(QUIET[index](leaf())) == []


@pytest.mark.parametrize("code", CODES)
def test_one_finding_per_cause(code: str) -> None:
    for build in FIRING[code]:
        causes = [(finding.code, finding.cause) for finding in judge(build(leaf()))]
        assert len(causes) == len(set(causes))


def test_evidence_is_the_smallest_argument_seen() -> None:
    x = torch.tensor([3.0, 1e-3], requires_grad=True)
    (finding,) = judge((x * x).sqrt().sum())
    assert finding.evidence[0].value == pytest.approx(1e-6, rel=1e-5)
    assert finding.severity is Severity.WARNING  # an error would carry a witness
    (finding,) = judge((x * 0).abs().sqrt().sum())
    assert finding.severity is Severity.WARNING
    assert finding.evidence[0].value == 0.0


def test_a_real_network_stays_quiet_under_a_sound_loss_and_fires_under_an_unsound_one() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    logits = net(torch.randn(4, 3, 8, 8))
    target = torch.tensor([0, 1, 2, 3])
    assert codes(F.cross_entropy(logits, target)) == []
    assert codes(F.nll_loss(logits.softmax(1).log(), target)) == ["NK402"]


def test_timm_networks_stay_quiet() -> None:
    timm = pytest.importorskip("timm")
    for name in ("resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"):
        size = 224 if "swin" in name else 64
        model = timm.create_model(name, num_classes=4)
        assert codes(F.cross_entropy(model(torch.randn(2, 3, size, size)), torch.tensor([0, 1]))) == []


def test_reading_changes_nothing_and_backward_still_works() -> None:
    x = leaf()
    loss = F.mse_loss(x, GT).sqrt()
    before = torch.get_rng_state()
    judge(loss)
    assert torch.equal(before, torch.get_rng_state())
    loss.backward()
    assert x.grad is not None
    assert "NK401" in codes(loss)  # freed saved values are no reason to fail


def test_a_loss_without_a_graph_gives_nothing() -> None:
    assert codes(torch.tensor(1.0)) == []


RECORDED: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("NK404", lambda x: ((x - GT).abs() / (x.abs() + GT.abs())).mean()),
    ("NK404", lambda x: 1 - 2 * (x.sigmoid() * GT).sum() / (x.sigmoid().sum() + GT.sum())),
    ("NK404", lambda x: torch.log(F.relu(x) + 0).mean()),
    ("NK404", lambda x: torch.where(x > 0, x, 0.0).log().mean()),
    ("NK404", lambda x: F.relu(x).masked_fill(MASK, 0.0).log().mean()),
    ("NK406", lambda x: torch.sqrt(x.half().abs() + 1e-8).mean()),
    ("", lambda x: torch.log(F.relu(x) + 1e-6).mean()),
    ("", lambda x: torch.where(x > 0.05, F.relu(x), 1.0).log().mean()),
    ("", lambda x: F.relu(x).masked_fill(x < 0.05, 1.0).log().mean()),
]


@pytest.mark.parametrize("index", range(len(RECORDED)))
def test_what_was_added_or_filled_in_is_known_where_it_was_recorded(index: int) -> None:
    """Only a positive number keeps what it is added to away from 0; a tensor without a gradient need not."""
    code, loss = RECORDED[index]
    assert codes(read_loss_call(loss, (leaf(),)).recorded()) == ([code] if code else [])


def test_spectral_norm_stays_quiet() -> None:
    """Its divisor is u' W v, which power iteration keeps positive."""
    layer = nn.utils.spectral_norm(nn.Linear(6, 3))
    assert codes(layer(leaf()).square().mean()) == []
    assert codes(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3))(leaf()).square().mean()) == []


def test_places_without_recording() -> None:
    (finding,) = judge(F.mse_loss(leaf(), GT).sqrt())
    assert finding.places == (Place("loss"),)
