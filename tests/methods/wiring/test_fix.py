"""The two fixes: norms that stay in eval mode, biases out of training."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pl_normkit import audit, fix_findings
from pl_normkit.errors import EditError
from pl_normkit.graph import ModelGraph
from pl_normkit.methods.wiring import freeze_biases_before_norms, keep_norms_in_eval
from pl_normkit.methods.wiring.find import find_biases_before_norms
from tests.methods.wiring.mistakes import MISTAKES
from tests.methods.wiring.setups import classes


def test_the_fix_stops_the_statistics_and_the_finding() -> None:
    setup = MISTAKES["frozen_backbone_in_training_mode"][1]()
    model, x = setup.model, setup.inputs
    findings = setup.report().findings
    before = copy.deepcopy(model.state_dict())
    changes = fix_findings(model, x, findings)
    assert [change.module for change in changes.made] == ["backbone.1"]
    model.train()
    setup.loss(model(x)).backward()
    after = model.state_dict()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert setup.report().findings == []


def test_norms_are_kept_over_train_copies_and_pickles_and_given_back() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).train()
    model[1].requires_grad_(False)
    changes = keep_norms_in_eval(model)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        one.train()
        assert [part.training for part in one] == [True, False, True, True]
    assert not keep_norms_in_eval(model)
    changes.undo()
    assert [type(part) for part in model] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.BatchNorm2d]
    assert model.train()[1].training


def test_a_filter_chooses_the_norms() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)).requires_grad_(False)
    keep_norms_in_eval(model, filter_fn=lambda _, path: path == "1")
    assert [part.training for part in model.train()] == [True, False]


BIASED = nn.Sequential(
    nn.Conv2d(3, 4, 3),
    nn.BatchNorm2d(4),
    nn.ReLU(),
    nn.Conv2d(4, 4, 3, bias=False),
    nn.BatchNorm2d(4),
    nn.Conv2d(4, 4, 3),
    nn.GroupNorm(2, 4),
)


def test_the_biases_that_a_norm_removes_are_found() -> None:
    """By brute force: those that can be changed without changing the output."""
    model, x = copy.deepcopy(BIASED), torch.randn(4, 3, 12, 12)
    output = model(x)
    without_effect = []
    for name, parameter in model.named_parameters():
        if name in ("0.bias", "5.bias"):
            with torch.no_grad():
                parameter += torch.tensor([1.0, -2.0, 3.0, 0.5])
                if torch.allclose(model(x), output, atol=1e-4):
                    without_effect.append(name)
                parameter -= torch.tensor([1.0, -2.0, 3.0, 0.5])
    found = find_biases_before_norms(model, ModelGraph.from_model(model, x))
    assert [bias.parameter for bias in found] == without_effect == ["0.bias"]


def test_the_bias_is_frozen_and_given_back() -> None:
    model, x = copy.deepcopy(BIASED), torch.randn(4, 3, 12, 12)
    report = audit(model, x, select=["NK015"])
    assert [[place.module for place in finding.places] for finding in report.findings] == [["0.bias"]]
    changes = fix_findings(model, x, report.findings)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert (frozen, audit(model, x, select=["NK015"]).findings) == (["0.bias"], [])
    changes.undo()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_norm_with_a_train_of_its_own_is_refused_whole() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)).requires_grad_(False)
    vars(model[1])["train"] = lambda mode=True: model[1]
    with pytest.raises(EditError):
        keep_norms_in_eval(model)
    assert type(model[0]) is nn.BatchNorm1d


def test_freezing_again_changes_nothing() -> None:
    model, x = copy.deepcopy(BIASED), torch.randn(4, 3, 12, 12)
    assert freeze_biases_before_norms(model, x)
    assert not freeze_biases_before_norms(model, x)
    F.cross_entropy(model(x).mean((2, 3)), classes(4, 4)).backward()
    assert model[0].bias.grad is None
