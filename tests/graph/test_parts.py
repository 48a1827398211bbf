"""What is read of networks that cannot be exported in training mode, and how that is said."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pl_normkit import audit
from pl_normkit.errors import TraceError
from pl_normkit.findings import NoteKind
from pl_normkit.graph import ModelGraph
from tests.conftest import DropoutBlock
from tests.graph.networks import Block, Classifier, Counting, state_of

IMAGE = torch.zeros(2, 3, 16, 16)


class RandomDepth(nn.Module):
    """In training a block is skipped by a draw that Python decides on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 3), DropoutBlock()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.training and torch.rand([]) < 0.5:
            return x
        return self.block(x)


class Targets(nn.Module):
    """Asks for targets in training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 3), DropoutBlock()

    def forward(self, x: Tensor, targets: Any = None) -> Tensor:
        if self.training and targets is None:
            raise ValueError("targets should not be None in training mode")
        return self.block(self.stem(x))


class Checked(nn.Module):
    """Looks at the values between its parts, in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), DropoutBlock(), nn.Flatten())
        self.head = nn.Linear(4 * 14 * 14, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        if not torch.isfinite(features).all():
            features = features.clamp(-1e4, 1e4)
        return self.head(features)


@pytest.mark.parametrize(
    ("build", "said"),
    [(RandomDepth, "read in eval mode"), (Targets, "read in eval mode"), (Checked, "read in parts instead")],
    ids=["depth", "targets", "parts"],
)
def test_what_can_be_read_is_judged(build: type[nn.Module], said: str) -> None:
    torch.manual_seed(0)
    model, image = build(), torch.randn(2, 3, 16, 16)
    before = state_of(model)
    report = audit(model, image, select=["NK1"])

    assert {finding.code for finding in report.findings} == {"NK101"}
    assert [(note.kind, said in str(note)) for note in report.notes] == [(NoteKind.NOT_RUN, True)]
    assert state_of(model) == before


def test_parts_are_named_and_numbered_as_in_the_whole_model() -> None:
    model = Checked()
    graph = ModelGraph.from_model(model, torch.randn(2, 3, 16, 16), partly=True)

    assert [node.index for node in graph.nodes] == list(range(len(graph.nodes)))
    assert {read.parameter for node in graph.nodes for read in node.reads} == {name for name, _ in model.named_parameters()}
    assert {node.module for node in graph.nodes} <= set(dict(model.named_modules()))
    assert "backbone, head" in graph.unseen


def test_parts_are_not_read_unless_asked() -> None:
    with pytest.raises(TraceError):
        ModelGraph.from_model(Checked(), IMAGE)


def test_whole_reading_leaves_nothing_out() -> None:
    assert ModelGraph.from_model(Classifier(Block()), IMAGE, partly=True).unseen == ""


def test_message_shows_the_line_and_speaks_no_exporter() -> None:
    with pytest.raises(TraceError) as caught:
        ModelGraph.from_model(Checked(), IMAGE)
    text = str(caught.value)

    assert "if not torch.isfinite(features).all():" in text
    assert "test_parts.py:" in text
    assert not any(word in text for word in ("u0", "SymNode", "dict", "guard"))


class TakesDict(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["image"] * 2


def test_dict_is_mentioned_where_it_is_the_cause() -> None:
    with pytest.raises(TraceError, match=r"write \(\{\.\.\.\},\)"):
        ModelGraph.from_model(TakesDict(), {"image": IMAGE})


def test_nothing_readable_is_a_failure_that_names_the_rules() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if random.random() < 0 else x.reshape(-1, 7)

    (note,) = audit(Broken(), IMAGE, select=["NK101", "NK102"]).notes

    assert note.kind is NoteKind.FAILED
    assert "did not run (NK101, NK102)" in str(note)


def test_state_kept_in_attributes_is_no_obstacle() -> None:
    model = Counting()
    before = state_of(model)

    assert len(ModelGraph.from_model(model, torch.zeros(2, 8, 4, 4)).norms) == 2
    assert state_of(model) == before
