"""What one training step shows of a model's wiring, as plain data that rules judge.

facts.py            StepFacts and its parts
autograd_nodes.py   nodes of the autograd graph: names, what they keep, what lies behind them
backward_graph.py   what the graph of a loss shows: stacked activations, dead units, zero-initialised layers
broadcasts.py       what broadcasts in a loss
divergences.py      what goes into a kl_div
drop_masks.py       dropout written by hand
operations.py       what the functions of torch do, by name
tensor_notes.py     what is known of tensors while they live
watch.py            sees the operations of one forward pass
recorder.py         takes the facts of a step: `read_step` for a loss in hand, `StepRecorder` and `EvaluationRecorder` for a loop
"""

from __future__ import annotations

__all__ = [
    "Broadcast",
    "Cut",
    "Dropout",
    "EvaluationRecorder",
    "FirstInput",
    "ForwardFacts",
    "ForwardWatch",
    "InitialLoss",
    "NormCall",
    "ReverseRead",
    "Seen",
    "Silenced",
    "StackedActivation",
    "StepFacts",
    "StepRecorder",
    "read_step",
]

from pl_normkit.first_step.facts import (
    Broadcast,
    Cut,
    Dropout,
    FirstInput,
    ForwardFacts,
    InitialLoss,
    NormCall,
    ReverseRead,
    Silenced,
    StackedActivation,
    StepFacts,
)
from pl_normkit.first_step.recorder import EvaluationRecorder, StepRecorder, read_step
from pl_normkit.first_step.watch import ForwardWatch, Seen
