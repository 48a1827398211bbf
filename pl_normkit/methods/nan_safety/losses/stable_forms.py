"""From the operation that first gave something not finite to the rule that explains it and the form to use instead. Derived here."""

from __future__ import annotations

__all__ = ["Explanation", "explain"]

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pl_normkit.methods.nan_safety.diagnosis.first_bad import Diagnosis, Record
from pl_normkit.methods.nan_safety.losses.loss_graph import adds_constant, saturating_source

ROOT, LOG_OF_SIGMOID, FEW, DIVISION, HALF, LOST_EPSILON, BORDER, NOTHING, OVERFLOW, OTHER = (f"NK{number}" for number in range(401, 411))
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Explanation:
    """The rule, the operation in a reader's words and what to write instead."""

    code: str
    operation: str
    advice: str


_EPSILON = "add an epsilon, clamp, or select the valid elements before the operation, not after it"
_EMPTY = "divide a sum by the count clamped to at least 1, or skip the term where nothing is selected (prediction.sum() * 0)"
_CLAMP = "clamp its argument inside the open interval (by 1e-6 in float32), which a clamp to the border itself does not do"
_LEAVE_OUT = "keep the arguments of this operation away from the witness, or leave such samples out"
_FLOAT32 = "cast to float32 before it (.float()), or leave the cast to autocast"
_SIGMOIDS = (
    "use the fused form: torch.sigmoid(z) for 1 / (1 + exp(-z)), F.softplus(z) for log(1 + exp(z)), F.log_softmax or torch.logsumexp for "
    "sums of exp; else clamp the argument from above"
)

# Operation -> rule and stable form. Those that depend on the operands are told apart in `_by_operands`.
ENTRIES: Mapping[str, tuple[str, str]] = {
    "sqrt": (ROOT, "drop the root, or add an epsilon or a clamp under it, or use pl_normkit.nn.safe_sqrt"),
    "rsqrt": (ROOT, "add an epsilon under the root: torch.rsqrt(x + 1e-6)"),
    "hypot": (ROOT, "use torch.sqrt(x * x + y * y + 1e-12)"),
    "log": (DIVISION, "add an epsilon or a clamp under the logarithm, or use pl_normkit.nn.safe_log; work on logits where there are some"),
    "log1p": (DIVISION, "clamp the argument above -1"),
    "xlogy": (DIVISION, "clamp the second argument from below, or use log_softmax of the logits"),
    "div": (DIVISION, _EPSILON),
    "reciprocal": (DIVISION, _EPSILON),
    "var": (FEW, "use correction=0 and at least one element, or pl_normkit.nn.stable_variance(x, mask)"),
    "acos": (BORDER, f"{_CLAMP}; or use torch.atan2(sine, cosine)"),
    "asin": (BORDER, _CLAMP),
    "acosh": (BORDER, "clamp its argument above 1: torch.acosh(x.clamp_min(1 + 1e-6))"),
    "atanh": (BORDER, _CLAMP),
    "logit": (BORDER, "give eps=1e-6, or use the logits that the probability came from"),
    "erfinv": (BORDER, _CLAMP),
    "atan2": (BORDER, "keep both arguments from being 0 at once"),
    "exp": (OVERFLOW, _SIGMOIDS),
    "softmax": (NOTHING, "a row of -inf alone has no softmax: mask with a large finite number, or leave such rows out"),
    "prod": (OTHER, "add logarithms instead, or keep the factors away from 0 and from large numbers"),
    "svd": (OTHER, "its gradient needs distinct singular values: use torch.linalg.svdvals, or add small noise to the matrix"),
    "eigh": (OTHER, "its gradient needs distinct eigenvalues: use torch.linalg.eigvalsh, or add small noise to the diagonal"),
    "inv": (OTHER, "add a small multiple of the identity before inverting, or use torch.linalg.lstsq"),
    "slogdet": (OTHER, "add a small multiple of the identity to the matrix"),
    "cdist": (OTHER, "use p=2, or add an epsilon under the root of squared distances"),
    "ctc_loss": (OTHER, "give zero_infinity=True: a target longer than its input has no alignment"),
    "kl_div": (OTHER, "give log-probabilities by log_softmax on both sides (log_target=True)"),
}
SAME: Mapping[str, str] = {
    "log2": "log", "log10": "log", "true_divide": "div", "divide": "div", "__truediv__": "div", "__rtruediv__": "div", "__rdiv__": "div",
    "__div__": "div", "itruediv": "div", "std": "var", "var_mean": "var", "std_mean": "var", "arccos": "acos", "arcsin": "asin",
    "arccosh": "acosh", "arctanh": "atanh", "exp2": "exp", "expm1": "exp", "cosh": "exp", "sinh": "exp", "log_softmax": "softmax",
    "softmin": "softmax", "cumprod": "prod", "pinv": "inv", "solve": "inv", "cholesky": "inv", "det": "slogdet", "logdet": "slogdet",
    "eig": "eigh", "scaled_dot_product_attention": "softmax", "xlog1py": "xlogy", "special_logit": "logit", "svdvals": "svd", "qr": "svd",
    "atan2_": "atan2", "arctan2": "atan2", "nuclear_norm": "svd",
}  # fmt: skip
POWERS = ("pow", "__pow__", "float_power", "__rpow__")
MEANS = ("mean", "nanmean", "median", "quantile", "var")
GROWING = ("mul", "__mul__", "__rmul__", "add", "__add__", "sub", "__sub__", "sum", "square", "matmul", "__matmul__", "bmm", "mm", "einsum",
           "norm", "cumsum", "prod", "linear", "dot", "half", "to", "type")  # fmt: skip


def explain(diagnosis: Diagnosis, record: Record | None, autocast: torch.dtype | None = None) -> Explanation:
    """The rule whose claim the diagnosis bears out, by the operation that was first not finite and by what it was given.

    Under autocast an operation on float32 may have run in half precision.
    """
    operation = _Operation.read(diagnosis, record, autocast)
    code, advice = _by_operands(operation) or ENTRIES.get(operation.key, (OTHER, _LEAVE_OUT))
    return Explanation(code, operation.key.strip("_") or "a sum of gradients", advice)


@dataclass(frozen=True)
class _Operation:
    """What was first not finite: its name as called and as listed, whether its value or its gradient, and its operands."""

    name: str
    key: str
    is_value: bool
    args: tuple[Any, ...]
    is_half: bool

    @classmethod
    def read(cls, diagnosis: Diagnosis, record: Record | None, autocast: torch.dtype | None) -> _Operation:
        full, is_value = diagnosis.op, diagnosis.kind == "forward"
        while record is not None and record.bad_inputs and isinstance(record.bad_inputs[0], Record):
            record = record.bad_inputs[0]  # what was not finite before and hidden later spoils the gradient all the same
            full, is_value = record.name, True
        last = full.rsplit(".", 1)[-1]
        name = last if last.startswith("__") else last.rstrip("_").lower()
        args = record.args if record is not None else ()
        is_half = autocast is not None or any(isinstance(arg, Tensor) and arg.dtype in HALVES for arg in args)
        return cls(name, SAME.get(name, name), is_value, args, is_half)

    @property
    def tensors(self) -> list[Tensor]:
        return [arg for arg in self.args if isinstance(arg, Tensor)]

    @property
    def overflow(self) -> tuple[str, str]:
        return (HALF, _FLOAT32) if self.is_half else (OVERFLOW, "keep the argument bounded (clamp it, or normalize)")

    @property
    def is_reduction(self) -> bool:
        return self.is_value and (self.key in MEANS or "loss" in self.key or "entropy" in self.key or self.key.startswith("kl_"))


def _by_operands(operation: _Operation) -> tuple[str, str] | None:
    """What the name alone does not tell; None where it does."""
    key, tensors = operation.key, operation.tensors
    if not tensors:
        return None
    if key in ("log", "sqrt", "rsqrt", "div", "reciprocal", *POWERS) and _epsilon_is_lost(tensors[-1]):
        return LOST_EPSILON, "compute it in float32 (.float() before it), or use an epsilon that float16 can hold (1e-4)"
    if key == "log" and tensors[0].grad_fn is not None and saturating_source(tensors[0].grad_fn) is not None:
        return LOG_OF_SIGMOID, "use F.logsigmoid(z), F.logsigmoid(-z) or F.log_softmax(z, dim) on the logits"
    if key in POWERS:
        return _power(operation)
    divisor = tensors[0] if operation.name == "__rtruediv__" else tensors[-1]
    if key == "div" and operation.is_value and not _has_small(divisor):
        return operation.overflow
    if operation.is_reduction:
        return _reduction(operation)
    return operation.overflow if key in GROWING or (key == "exp" and operation.is_half) else None


def _epsilon_is_lost(argument: Tensor) -> bool:
    node = argument.grad_fn
    return node is not None and argument.dtype in HALVES and adds_constant(node) and bool((argument.detach() == 0).any())


def _power(operation: _Operation) -> tuple[str, str]:
    exponent = next((value for value in operation.args[1:2] if isinstance(value, (int, float))), None)
    if exponent is None:
        return DIVISION, "clamp the base of a power whose exponent is a tensor away from 0"
    if 0 < exponent < 1:
        return ENTRIES["sqrt"]
    return (DIVISION, _EPSILON) if exponent < 0 else operation.overflow


def _has_small(divisor: Tensor) -> bool:
    values = divisor.detach()
    return (
        bool((values.abs() < math.sqrt(torch.finfo(values.dtype).tiny)).any()) if values.is_floating_point() else bool((values == 0).any())
    )


def _reduction(operation: _Operation) -> tuple[str, str]:
    if operation.key == "var":
        return ENTRIES["var"]
    first, *others = operation.tensors
    if first.numel() == 0:
        return NOTHING, _EMPTY
    if "nll" in operation.key or "cross_entropy" in operation.key or any(not other.is_floating_point() for other in others):
        return NOTHING, f"{_EMPTY}; every label is ignored or weighs 0: for cross entropy that is reduction='sum' over the count"
    return operation.overflow
