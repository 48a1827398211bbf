"""What the model is: one `torch.export` trace, read as residual branches, fusions, norms, dropouts, heads and attention."""

from __future__ import annotations

__all__ = [
    "Attention",
    "Branch",
    "Dropout",
    "Fusion",
    "FusionInput",
    "Head",
    "Kind",
    "ModelGraph",
    "Node",
    "Norm",
    "Read",
    "ResidualAdd",
    "Step",
    "call_arguments",
    "placeholder_name",
]

from pl_normkit.graph.export import call_arguments, placeholder_name
from pl_normkit.graph.model import ModelGraph
from pl_normkit.graph.nodes import Kind, Node, Read, Step
from pl_normkit.graph.structure import Attention, Branch, Dropout, Fusion, FusionInput, Head, Norm, ResidualAdd
