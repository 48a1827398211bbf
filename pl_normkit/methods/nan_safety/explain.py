"""From the operation that first gave something not finite to the rule that explains it and the form to use instead. Derived here."""

from __future__ import annotations

__all__ = ["Explanation", "explain"]

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pl_normkit.methods.nan_safety.diagnosis import Diagnosis, Record
from pl_normkit.methods.nan_safety.loss_graph import adds_constant, saturating_source

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
MEANS = ("mean", "nanmean", "cross_entropy", "median", "quantile", "std", "var", "nll_loss")
GROWING = ("mul", "__mul__", "__rmul__", "add", "__add__", "sub", "__sub__", "sum", "square", "matmul", "__matmul__", "bmm", "mm", "einsum",
           "norm", "cumsum", "prod", "linear", "dot", "half", "to", "type")  # fmt: skip


def explain(diagnosis: Diagnosis, record: Record | None) -> Explanation:
    """The rule whose claim the diagnosis bears out, by the operation that was first not finite and by what it was given."""
    if record is not None and (origin := _origin(record)) is not record:
        record, diagnosis = origin, Diagnosis("forward", origin.module, origin.name, origin.source)
    full = diagnosis.op.rsplit(".", 1)[-1]
    name = full if full.startswith("__") else full.rstrip("_").lower()
    key = SAME.get(name, name)
    operands = [value for value in (record.args if record is not None else ()) if isinstance(value, Tensor)]
    found = _by_operands(key, name, operands, record.args if record is not None else (), diagnosis.kind)
    code, advice = found or ENTRIES.get(
        key, (OTHER, "keep the arguments of this operation away from the witness, or leave such samples out")
    )
    return Explanation(code, key.strip("_") or "a sum of gradients", advice)


def _origin(record: Record) -> Record:
    """The operation that made what is not finite among the record's inputs: a value hidden later still spoils the gradient."""
    while record.bad_inputs and isinstance(record.bad_inputs[0], Record):
        record = record.bad_inputs[0]
    return record


def _by_operands(key: str, name: str, operands: list[Tensor], args: tuple[Any, ...], kind: str) -> tuple[str, str] | None:
    if not operands:
        return None
    if key in ("log", "sqrt", "rsqrt", "div", "reciprocal", *POWERS) and _epsilon_is_lost(operands[-1]):
        return LOST_EPSILON, "compute it in float32 (.float() before it), or use an epsilon that float16 can hold (1e-4)"
    if key == "log" and operands[0].grad_fn is not None and saturating_source(operands[0].grad_fn) is not None:
        return LOG_OF_SIGMOID, "use F.logsigmoid(z), F.logsigmoid(-z) or F.log_softmax(z, dim) on the logits"
    if key in POWERS:
        return _power(args, operands)
    if key == "div" and kind == "forward" and not _has_small(operands[-1] if name != "__rtruediv__" else operands[0]):
        return _overflow(operands)
    if kind == "forward" and (key in MEANS or name in MEANS or "loss" in key or "entropy" in key or key.startswith("kl_")):
        return _reduction(key, name, operands)
    if key in GROWING or (key == "exp" and _is_half(operands)):
        return _overflow(operands) if key != "exp" else (HALF, _FLOAT32)
    return None


def _epsilon_is_lost(argument: Tensor) -> bool:
    node = argument.grad_fn
    return node is not None and argument.dtype in HALVES and adds_constant(node) and bool((argument.detach() == 0).any())


def _power(args: tuple[Any, ...], operands: list[Tensor]) -> tuple[str, str]:
    exponent = next((value for value in args[1:2] if isinstance(value, (int, float))), None)
    if exponent is None:
        return DIVISION, "clamp the base of a power whose exponent is a tensor away from 0"
    if 0 < exponent < 1:
        return ENTRIES["sqrt"]
    return (DIVISION, _EPSILON) if exponent < 0 else _overflow(operands)


def _has_small(denominator: Tensor) -> bool:
    values = denominator.detach()
    return (
        bool((values.abs() < math.sqrt(torch.finfo(values.dtype).tiny)).any()) if values.is_floating_point() else bool((values == 0).any())
    )


def _reduction(key: str, name: str, operands: list[Tensor]) -> tuple[str, str] | None:
    is_variance = key == "var"
    if operands[0].numel() == 0 and not is_variance:
        return NOTHING, _EMPTY
    if is_variance:
        return ENTRIES["var"]
    if any(not operand.is_floating_point() for operand in operands[1:]) or "cross_entropy" in name or name == "nll_loss":
        return NOTHING, f"every label is ignored or weighs 0: {_EMPTY}; for cross entropy use reduction='sum' over the count"
    return _overflow(operands)


def _is_half(operands: list[Tensor]) -> bool:
    return any(operand.dtype in HALVES for operand in operands)


def _overflow(operands: list[Tensor]) -> tuple[str, str]:
    if _is_half(operands):
        return HALF, _FLOAT32
    return OVERFLOW, "keep the argument bounded (clamp it, or normalize), or compute in float64"
