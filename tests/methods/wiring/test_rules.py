"""Every mistake is named by its rule and no other of the room; every clean twin is left alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pl_normkit import audit
from pl_normkit.auditing import audit_subject
from pl_normkit.findings import Finding
from pl_normkit.first_step import read_step
from pl_normkit.graph.autograd import tensors_in
from pl_normkit.preserve import global_generators
from pl_normkit.report import Report
from pl_normkit.rules import Subject
from pl_normkit.selection import Selection
from tests.methods.wiring import chance
from tests.methods.wiring.clean import CLEAN
from tests.methods.wiring.mistakes import MISTAKES, gradients
from tests.methods.wiring.setups import classes


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_mistake_is_named_once(name: str) -> None:
    rule, build = MISTAKES[name]
    report = build().report()
    assert ([finding.name for finding in report.findings], report.notes) == ([rule], [])


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_twin_is_left_alone(name: str) -> None:
    report = CLEAN[name]().report()
    assert ([str(finding) for finding in report.findings], report.notes) == ([], [])


# The previews.


def findings(model: nn.Module, x: Tensor, loss: Tensor, code: str) -> list[Finding]:
    return list(audit(model, x, loss=loss, select=[code]).findings)


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 0), (60.0, 1)])
def test_a_confident_start(scale: float, expected: int) -> None:
    model, x = nn.Linear(32, 10), torch.randn(64, 32)
    with torch.no_grad():
        model.weight *= scale
    assert len(findings(model, x, F.cross_entropy(model(x), classes(64)), "NK014")) == expected


@pytest.mark.parametrize(("offset", "expected"), [(0.0, 0), (30.0, 1)])
def test_targets_far_from_the_start(offset: float, expected: int) -> None:
    model, x = nn.Linear(32, 1), torch.randn(64, 32)
    assert len(findings(model, x, F.mse_loss(model(x)[:, 0], torch.randn(64) + offset), "NK014")) == expected


class Bidirectional(nn.Module):
    def __init__(self, *, batch_first: bool, bidirectional: bool, index: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 16, batch_first=batch_first, bidirectional=bidirectional)
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.rnn(x)[0]
        return output[:, self.index] if self.rnn.batch_first else output[self.index]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("bidirectional", "index", "expected"), [(True, -1, 1), (True, 4, 1), (True, 0, 0), (False, -1, 0)])
def test_the_last_step_of_a_reverse_direction(batch_first: bool, bidirectional: bool, index: int, expected: int) -> None:
    model = Bidirectional(batch_first=batch_first, bidirectional=bidirectional, index=index)
    x = torch.randn(5, 5, 8)
    found = findings(model, x, model(x).square().mean(), "NK016")
    assert len(found) == expected
    assert all("test_rules.py" in place.source for finding in found for place in finding.places)


# What a finding says.


@pytest.mark.parametrize(
    ("name", "words", "file"),
    [
        ("data_of_the_features", [".data cuts", "gradients.py:"], ""),
        ("encoder_under_no_grad", ["torch.no_grad() cuts", "gradients.py:"], ""),
        ("smooth_l1_of_maps", ["(4, 1, 16, 16) and (4, 16, 16) to (4, 4, 16, 16)"], ""),
        ("lengths_never_read", ["lengths"], ""),
        ("view_after_permute", ["reshape"], "inputs.py:"),
        ("attention_dropout_always", ["dropout"], "modes.py:"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_message_names_the_cause_and_the_line(name: str, words: list[str], file: str) -> None:
    (finding,) = MISTAKES[name][1]().report().findings
    assert all(word.lower() in finding.message.lower() for word in words)
    assert all(file in place.source for place in finding.places)


def test_the_line_is_that_of_the_cut() -> None:
    (finding,) = MISTAKES["data_of_the_features"][1]().report().findings
    line = int(finding.message.rpartition(":")[2])
    assert ".data" in Path(gradients.__file__).read_text().splitlines()[line - 1]


def test_ddp_is_told_every_name_before_it_fails() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "later": nn.Linear(4, 4)})
    loss = model["used"](torch.randn(2, 4)).sum()
    step = read_step(model, None, loss)
    assert step is not None
    for needs_all, expected in ((True, [["later.weight", "later.bias"]]), (False, [])):
        subject = Subject(model=model, loss=loss, step=replace(step, needs_all_gradients=needs_all))
        report = audit_subject(subject, Selection(["NK001"]))
        assert [[place.module for place in finding.places] for finding in report.findings] == expected


def test_the_numbers_for_a_logger() -> None:
    report = MISTAKES["dead_convolution"][1]().report()
    assert report.summary() == {"notes": 0.0, "warnings": 1.0, "errors": 0.0, "NK002": 1.0, "unused_parameters": 0.0, "dead_share": 1.0}
    assert report.curves == {"Share of dead units": {"1.weight": 1.0}}


# Models of the libraries: a sample of benchmarks/zoo_step.py.


def step_of(model: nn.Module, inputs: dict[str, Tensor] | Tensor) -> Report:
    model.train()
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    loss = output.loss if hasattr(output, "loss") else sum(tensor.square().mean() for tensor in tensors_in(output))
    return audit(model, inputs, loss=loss, optimizers=torch.optim.AdamW(model.parameters()), select=["NK0"])


@pytest.mark.parametrize(
    "name", ["resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto", "regnetx_002", "efficientvit_b0"]
)
def test_timm_models_are_left_alone(name: str) -> None:
    timm = pytest.importorskip("timm")
    arguments, side = ({"img_size": 32}, 32) if name.startswith("vit") else ({}, 64)
    report = step_of(timm.create_model(name, **arguments), torch.randn(4, 3, side, side))
    assert (report.findings, report.notes) == ([], [])


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "shufflenet_v2_x0_5"])
def test_torchvision_models_are_left_alone(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    arguments = {"weights_backbone": None} if "lraspp" in name else {}
    report = step_of(models.get_model(name, weights=None, **arguments), torch.randn(4, 3, 64, 64))
    assert (report.findings, report.notes) == ([], [])


@pytest.mark.parametrize("name", ["Unet", "DeepLabV3Plus"])
def test_smp_models_are_left_alone(name: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    report = step_of(smp.create_model(name, "mobilenet_v2", encoder_weights=None, classes=3), torch.randn(4, 3, 64, 64))
    assert (report.findings, report.notes) == ([], [])


@pytest.mark.parametrize("name", ["optimizer_of_a_copy", "head_of_another_size_replaced_after_the_optimizer"])
def test_parameters_that_have_been_replaced_are_told_once(name: str) -> None:
    setup = MISTAKES[name][1]()
    setup.select = ["NK003", "NK204"]
    assert [finding.code for finding in setup.report().findings] == ["NK003"]
    setup.select = ["NK204"]
    assert [finding.code for finding in setup.report().findings] == ["NK204"]


@pytest.mark.parametrize("name", chance.DRAWS)
def test_comparing_two_runs_leaves_every_generator_as_it_was(name: str) -> None:
    setup = chance.stack(chance.Block, chance.DRAWS[name])
    blocks = [block for block in setup.model.modules() if isinstance(block, chance.Block)]

    def states() -> list[str]:
        own = [(block.own.getstate(), block.own_numpy.bit_generator.state) for block in blocks]
        return [repr(state) for state in (global_generators(), torch.get_rng_state().tolist(), own)]

    loss = setup.loss(setup.model(setup.inputs))
    before = states()
    assert [finding.code for finding in audit(setup.model, setup.inputs, loss=loss, select=["NK006"]).findings] == ["NK006"]
    assert states() == before
