"""One operation of the traced model, in the field's words."""

from __future__ import annotations

__all__ = ["Kind", "Node", "Read", "Step", "kind_of", "shape_of"]

import math
import os
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from pl_normkit.graph.masks import Mask


class Kind(StrEnum):
    """What an operation does to its input, as far as rules care."""

    INPUT = "input"
    WEIGHT = "weight"
    NORM = "norm"
    DROPOUT = "dropout"
    ACTIVATION = "activation"
    ADD = "add"
    MUL = "mul"
    CAT = "cat"
    POOL = "pool"
    RESIZE = "resize"
    VIEW = "view"
    MATMUL = "matmul"
    SOFTMAX = "softmax"
    ATTENTION = "attention"
    OTHER = "other"


_OPERATIONS = {
    Kind.WEIGHT: """
        conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d
        linear addmm bilinear embedding embedding_bag lstm gru rnn_tanh rnn_relu""",
    Kind.ACTIVATION: """
        relu relu6 gelu silu hardswish hardtanh elu selu celu leaky_relu prelu rrelu mish softplus softsign sigmoid hardsigmoid
        tanh log_sigmoid glu threshold clamp clamp_min clamp_max hardshrink softshrink erf""",
    Kind.VIEW: """
        view view_as _unsafe_view reshape reshape_as flatten unflatten transpose permute movedim swapaxes t contiguous clone expand
        expand_as squeeze unsqueeze slice select getitem to _to_copy alias detach chunk split split_with_sizes tensor_split unbind
        swapdims moveaxis ravel numpy_T mT mH matrix_H adjoint narrow narrow_copy roll flip type_as float half bfloat16
        constant_pad_nd pad""",
    Kind.POOL: """
        avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d max_pool1d max_pool2d
        max_pool3d max_pool2d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d mean amax stochastic_pool""",
    Kind.RESIZE: """
        upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
        upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa
        _upsample_bicubic2d_aa grid_sampler grid_sampler_2d pixel_shuffle max_unpool2d""",
    Kind.NORM: "batch_norm layer_norm native_layer_norm group_norm instance_norm rms_norm",
    Kind.DROPOUT: "dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout",
    Kind.MATMUL: "matmul mm bmm einsum baddbmm",
    Kind.SOFTMAX: "softmax _softmax",
    Kind.ATTENTION: "scaled_dot_product_attention",
    Kind.ADD: "add",
    Kind.MUL: "mul",
    Kind.CAT: "cat concat stack",
}
KINDS = {op: kind for kind, ops in _OPERATIONS.items() for op in ops.split()}

_SHAPE_ONLY = """
    new_empty new_zeros new_ones new_full empty_like zeros_like ones_like full_like rand_like randn_like randint_like sym_size size"""
SHAPE_ONLY = frozenset(_SHAPE_ONLY.split())
"""Operations whose result has the shape of the input but none of its values."""
LIKE_ANOTHER = frozenset(("type_as", "expand_as", "view_as", "reshape_as"))
"""Operations whose argument `other` gives a type or a shape and no values."""
TRANSPOSED = frozenset(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"))


def kind_of(op: str, parameters: Iterable[str]) -> Kind:
    """The kind of the aten operation `op`; a product with a parameter is a weight layer."""
    kind = KINDS.get(op, Kind.OTHER)
    return Kind.WEIGHT if kind is Kind.MATMUL and tuple(parameters) else kind


@dataclass(frozen=True)
class Step:
    """One operation that a parameter's value enters: by which argument of the aten schema, and with which shape."""

    op: str
    argument: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Read:
    """How a parameter reaches an operation on activations.

    Attributes:
        parameter: its name, as in `model.named_parameters()`.
        path: the operations its value enters, views left out: first those on parameters and constants alone (the gather of a
            table, the concatenation of biases), last the reading operation itself.
    """

    parameter: str
    path: tuple[Step, ...]


@dataclass(eq=False)
class Node:
    """One operation that works on values of the model's input.

    Attributes:
        index: position in execution order.
        op: the aten operation, without overload and in-place mark ("conv2d", "add", "batch_norm").
        kind: what the operation does.
        inputs: operations whose values it consumes, in argument order (never parameters or masks).
        arguments: for each of `inputs` the (first) argument of the aten schema that it is passed as.
        mask: for a dropout written out the random mask it multiplies by, for one in an eval graph what it does in training.
        users: operations that consume its value.
        reads: the parameters it consumes, and how they come to it.
        module: path of the innermost module that ran it.
        shape: shape of the result; () for operations with several results.
        target: the node of the exported graph.
    """

    index: int
    op: str
    kind: Kind
    inputs: tuple[Node, ...]
    arguments: tuple[str, ...]
    reads: tuple[Read, ...]
    module: str
    shape: tuple[int, ...]
    target: torch.fx.Node
    mask: Mask | None = None
    users: list[Node] = field(default_factory=list, repr=False)

    def __repr__(self) -> str:
        return f"<{self.index} {self.op} {self.module}>"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters it consumes, in argument order."""
        return tuple(dict.fromkeys(read.parameter for read in self.reads))

    @property
    def numel(self) -> int:
        """Number of elements, before any broadcasting `expand`."""
        if self.op in ("expand", "expand_as") and self.inputs:
            return self.inputs[0].numel
        return math.prod(self.shape)

    @property
    def holds_whole_numbers(self) -> bool:
        """Whether its value is indices, lengths and the like, which are no features."""
        value = self.target.meta.get("val")
        return isinstance(value, torch.Tensor) and not value.is_floating_point() and not value.is_complex()

    @property
    def source(self) -> str:
        """`package/file.py:line` of the user's or library's line that called the operation, "" where unknown."""
        return source_of(self.target.meta.get("stack_trace") or "")

    @property
    def is_transposed_convolution(self) -> bool:
        if self.op in TRANSPOSED:
            return True
        return self.op == "convolution" and bool(self.argument("transposed", 6, False))

    @property
    def drop_probability(self) -> float:
        """Probability with which a dropout drops; 0 when it is inactive or this is no dropout."""
        if self.mask is not None:
            return self.mask.p
        if self.kind is not Kind.DROPOUT or not self.argument("train", 2, True):
            return 0.0
        return float(self.argument("p", 1, 0.5) or 0.0)

    @property
    def drops_channels(self) -> bool:
        """Whether a dropout drops whole channels."""
        return self.mask.by_channel if self.mask is not None else self.op.startswith("feature")

    @property
    def is_global_pool(self) -> bool:
        """Whether every spatial (or token) position is averaged into one, be it the only one there is at these sizes."""
        is_mean = self.op == "mean" or (self.op == "sum" and len(self.users) == 1 and self.users[0].op in ("div", "mul"))
        if not (is_mean or self.kind is Kind.POOL) or len(self.inputs) != 1 or "max" in self.op:
            return False
        before = self.inputs[0].shape
        if is_mean:
            if self.op == "sum" and len(self.users[0].inputs) != 1:
                return False
            dims = self.argument("dim", 1, None)
            dims = [dims] if isinstance(dims, int) else dims
            if not dims or len(before) < 3:
                return False
            reduced = {dim % len(before) for dim in dims}
            return reduced in (set(range(2, len(before))), set(range(1, len(before) - 1)))
        pools_any_size = "adaptive" in self.op or math.prod(before[2:]) > 1
        return len(before) > 2 and len(self.shape) > 2 and math.prod(self.shape[2:]) == 1 and pools_any_size

    def argument(self, name: str, position: int, default: Any) -> Any:
        """An argument of the call by keyword name or by position."""
        if name in self.target.kwargs:
            return self.target.kwargs[name]
        return self.target.args[position] if position < len(self.target.args) else default


_FRAME = re.compile(r'File "(.+?)", line (\d+), in ')
_NOT_THE_USERS = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parent}/")
"""Code of torch, and of this folder, which calls the model while it is traced."""
_LIBRARIES = tuple(sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path(torch.__file__).parents[1])}))


def source_of(stack_trace: str) -> str:
    """The innermost frame outside torch and this library, as a path relative to the libraries' folder or the working directory."""
    for file, line in reversed(_FRAME.findall(stack_trace)):
        if not file.startswith(_NOT_THE_USERS):
            return f"{shorten(file)}:{line}"
    return ""


def shorten(file: str) -> str:
    """`file` relative to the folder of installed packages or to the working directory, unchanged elsewhere."""
    return _shortened(file, os.getcwd())  # noqa: PTH109  (asked for each operation that is watched)


@lru_cache(maxsize=1024)
def _shortened(file: str, folder: str) -> str:
    for root in (*_LIBRARIES, folder):
        if file.startswith(root + "/"):
            return file[len(root) + 1 :]
    return file


def shape_of(target: torch.fx.Node) -> tuple[int, ...]:
    """The shape of a call's result, with a number for each size that depends on values; () for several results."""
    value = target.meta.get("val")
    return tuple(map(_size, value.shape)) if isinstance(value, torch.Tensor) else ()


_ROUTED = 4
"""Stands for each size that depends on values (how many tokens a router gives to an expert)."""


def _size(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return max(int(expression.xreplace(dict.fromkeys(expression.free_symbols, _ROUTED))), 1)
