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
from pl_normkit.methods.weight_decay.find import read_graph
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


class Experts(nn.Module):
    """Runs the experts that were hit alone, so that which ones depends on values; returns more than a tensor."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(8, count)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(count))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, str]:
        tokens = x.flatten(0, 1)
        chosen = self.router(tokens).argmax(-1)
        y = torch.zeros_like(tokens)
        for index in chosen.unique():
            rows = torch.where(chosen == index)[0]
            y.index_add_(0, rows, self.experts[int(index)](tokens[rows]))
        return y.view_as(x), chosen, "top 1"


class Counted(nn.Module):
    """Cuts the input to a length that is among the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        seen = x[:, : int(length.max())]
        return self.mix(nn.functional.pad(seen, (0, 0, 0, x.shape[1] - seen.shape[1]))).relu()


class Sparse(nn.Module):
    """Blocks of two, of which some modules cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))
        self.mixers = nn.ModuleList(Counted() for _ in range(2))
        self.experts = nn.ModuleList(Experts() for _ in range(2))
        self.last, self.drop = nn.LayerNorm(8), nn.Dropout(0.1)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        for index in range(2):
            x = x + self.drop(self.mixers[index](self.norms[2 * index](x), length))
            x = x + self.experts[index](self.norms[2 * index + 1](x))[0]
        return self.last(x)


SPARSE_INPUTS = torch.randn(2, 5, 8), torch.tensor([5, 3])


def test_modules_that_cannot_be_exported_are_one_operation_each_in_a_graph_that_is_whole() -> None:
    torch.manual_seed(0)
    model = Sparse()
    before = state_of(model)
    graph = ModelGraph.from_model(model, SPARSE_INPUTS, partly=True)

    assert state_of(model) == before
    assert [add.kind for add in graph.residual_adds] == ["identity"] * 4
    assert [dropout.p for dropout in graph.dropouts] == [0.1, 0.1]  # as in training
    assert [node.index for node in graph.nodes] == list(range(len(graph.nodes)))
    assert all(name in graph.unseen for name in ("mixers.0", "experts.1"))


def test_their_parts_have_roles_and_norms_before_them_stand_within_a_branch() -> None:
    torch.manual_seed(0)
    model = Sparse()
    roles = read_graph(model, ModelGraph.from_model(model, SPARSE_INPUTS, partly=True)).roles

    assert {roles[f"norms.{index}.weight"] for index in range(4)} == {"gamma_branch"}
    assert roles["last.weight"] == "gamma_trunk"
    assert {str(role) for name, role in roles.items() if "experts" in name or "mix" in name} == {"weight", "bias"}


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
