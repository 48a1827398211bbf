"""Which operations treat the rows along the last dimension alike, and the layers that write or read such rows."""

from __future__ import annotations

__all__ = ["Layer", "averages_rows", "factor_of", "keeps_rows", "layer_of", "readers_by_parameter", "scales_rows", "sums_rows"]

from collections import defaultdict
from dataclasses import dataclass

from pl_normkit.graph import Kind, ModelGraph, Node, Read

_RESHAPE_NAMES = """
    view _unsafe_view reshape flatten unflatten contiguous clone expand squeeze unsqueeze to _to_copy alias detach type_as float half
    bfloat16"""
_RESHAPES = frozenset(_RESHAPE_NAMES.split())
_ALONG_ONE_DIM = frozenset(("slice", "select", "narrow", "index_select"))


@dataclass(frozen=True)
class Layer:
    """A linear map of rows. `outputs` is the dimension of the outputs in its weight: 0 in torch's layout, 1 in GPT-2's Conv1D."""

    node: Node
    weight: str
    bias: str
    outputs: int


def keeps_rows(node: Node) -> bool:
    """Whether each row of `node` is a row of its only input, unchanged in eval mode."""
    if not _has_one_input_as_wide(node):
        return False
    if node.kind is Kind.DROPOUT:
        return not node.op.startswith("alpha") and node.drop_probability == 0
    if node.op in _RESHAPES:
        return True
    last = len(node.inputs[0].shape) - 1
    if node.op in _ALONG_ONE_DIM:
        return int(node.argument("dim", 1, 0)) % (last + 1) != last
    if node.op in ("transpose", "swapaxes"):
        return last not in {int(node.argument(f"dim{i}", 1 + i, i)) % (last + 1) for i in (0, 1)}
    if node.op == "permute":
        return bool(int(node.argument("dims", 1, [0])[-1]) % (last + 1) == last)
    return False


def averages_rows(node: Node) -> bool:
    """Whether each row of `node` is the mean of rows of its only input."""
    dims = node.argument("dim", 1, None)
    dims = [dims] if isinstance(dims, int) else dims
    if node.op != "mean" or not dims or not _has_one_input_as_wide(node):
        return False
    last = len(node.inputs[0].shape) - 1
    return all(dim % (last + 1) != last for dim in dims)


def sums_rows(node: Node) -> bool:
    """Whether `node` adds or joins rows of several inputs of its width, and nothing else."""
    if len(node.inputs) < 2 or node.reads or any(source.shape[-1:] != node.shape[-1:] for source in node.inputs):
        return False
    if node.kind is Kind.ADD:
        return len(node.inputs) == 2
    joined = node.target.args[0] if node.target.args else ()
    is_all_known = isinstance(joined, (list, tuple)) and len(joined) == len(node.inputs)  # constants are no inputs
    return node.op in ("cat", "concat") and is_all_known and int(node.argument("dim", 1, 0)) % len(node.shape) != len(node.shape) - 1


def scales_rows(node: Node) -> bool:
    """Whether `node` multiplies or divides its only input by a number."""
    return node.op in ("mul", "div") and _has_one_input_as_wide(node) and isinstance(node.argument("other", 1, None), (int, float))


def _has_one_input_as_wide(node: Node) -> bool:
    return len(node.inputs) == 1 and not node.reads and len(node.shape) > 0 and node.shape[-1:] == node.inputs[0].shape[-1:] != (1,)


def factor_of(node: Node) -> str:
    """The name of the parameter, one value a column, that `node` multiplies its rows by (a LayerScale); "" for any other operation."""
    if node.op != "mul" or len(node.inputs) != 1 or node.shape != node.inputs[0].shape or len(node.reads) != 1:
        return ""
    return node.reads[0].parameter if _is_read_as_it_is(node.reads[0], node.shape[-1:]) else ""


def layer_of(node: Node) -> Layer | None:
    """The linear map that `node` is, where it reads its weight and bias as they are stored."""
    names = {"linear": ("weight", "bias", 0), "addmm": ("mat2", "self", 1)}.get(node.op)
    if names is None or len(node.inputs) != 1:
        return None
    weight, bias, outputs = names
    reads = {read.path[-1].argument: read for read in node.reads}
    if weight not in reads or not set(reads) <= {weight, bias} or any(len(read.path) != 1 for read in node.reads):
        return None
    has_bias = node.op == "addmm" or node.argument("bias", 2, None) is not None
    if has_bias is not (bias in reads) or any(node.target.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        return None
    return Layer(node, reads[weight].parameter, reads[bias].parameter if bias in reads else "", outputs)


def readers_by_parameter(graph: ModelGraph) -> dict[str, set[Node]]:
    """The operations that read each parameter, those through other parameters included."""
    found: defaultdict[str, set[Node]] = defaultdict(set)
    for node in graph.nodes:
        for name in node.parameters:
            found[name].add(node)
    return found


def _is_read_as_it_is(read: Read, shape: tuple[int, ...]) -> bool:
    return len(read.path) == 1 and read.path[0].shape == shape
