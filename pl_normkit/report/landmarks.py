"""What stands where along the depth of a network, and what a training run came to: plain data that a page shows beside the findings."""

from __future__ import annotations

__all__ = ["Landmark", "RunResult", "Score", "Table"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Landmark:
    """One structure of the traced network.

    Attributes:
        kind: "residual addition", "norm", "dropout", "fusion", "attention" or "head".
        module: path of the module it runs in.
        source: `file.py:line`, "" where unknown.
        depth: number of the operation in execution order.
    """

    kind: str
    module: str
    source: str
    depth: int


@dataclass(frozen=True)
class Score:
    """A number of a run, and which state of the network it belongs to ("best checkpoint, epoch 3", "last state")."""

    name: str
    value: float
    state: str


@dataclass(frozen=True)
class Table:
    """Rows of text under a title."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class RunResult:
    """What a training run came to.

    Attributes:
        scores: the most important first.
        checkpoint: path of the best checkpoint, "" where none was written.
        curves: metric -> (step, value) pairs in order.
        tables: such as the scores of each class.
        configuration: the run's configuration as text.
    """

    scores: Sequence[Score] = ()
    checkpoint: str = ""
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    configuration: str = ""
