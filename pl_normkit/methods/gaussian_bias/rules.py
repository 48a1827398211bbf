"""NK6xx: attention without a local preference, and biases that never reach the logits."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pl_normkit.errors import TraceError
from pl_normkit.findings import Evidence, FixSafety, Place, Severity
from pl_normkit.graph import Attention, Kind, ModelGraph, Node, call_arguments
from pl_normkit.methods.gaussian_bias.find import TracedAttention, read_traced
from pl_normkit.methods.gaussian_bias.fix import add_gaussian_bias
from pl_normkit.methods.gaussian_bias.masks import CausalDeparture, departure_from_causal, lets_all_pass
from pl_normkit.methods.gaussian_bias.modules import Grid
from pl_normkit.preserve import preserved
from pl_normkit.rules import Mark, Observation, Subject, rule
from pl_normkit.surgery import Changes, Filter

UNTRAINED = 0.2
"""Mean cosine of neighbouring position embeddings, their mean taken off, below which they are as they were drawn."""


def _add(model: nn.Module, example_inputs: Any, *, filter_fn: Filter | None = None) -> Changes:
    return add_gaussian_bias(model, example_inputs=example_inputs, filter_fn=filter_fn)


@rule(
    "NK601",
    "attention-without-local-prior",
    mark=Mark.DERIVED,
    source="arXiv 2305.04722 for the bias; the criterion is derived here",
    severity=Severity.NOTE,
    fix=_add,
    fix_safety=FixSafety.UNSAFE,
    preview=True,
)
def attention_without_local_prior(subject: Subject) -> Iterator[Observation]:
    """What it does
    Notes a vision transformer that is to be trained from scratch and knows where its patches are by learned absolute position
    embeddings alone: no relative position bias, no rotary embedding, no mask in any layer, and one grid of patches throughout. Nothing
    is wrong with it; a Gaussian attention bias is one cheap way to give it a preference for near patches.

    Why it hurts
    Such a network starts without any preference for near patches and has to learn it from the data. How much a prior helps depends on
    the amount of data and the length of training.

    Evidence
    The mean cosine between the position embeddings of horizontal neighbours (their common mean taken off), measured on this model:
    about 0 as drawn, high once trained. At 0.2 and above the rule is silent, since the weights are pretrained (or the embeddings were
    built smooth). On the meta device there are no weights to measure, and none are loaded.

    Example
    ```python
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32)  # before its first step
    ```

    Use instead
    ```python
    import torch

    from pl_normkit import add_gaussian_bias

    add_gaussian_bias(model, example_inputs=torch.zeros(2, 3, 32, 32))  # or the GaussianBias callback, before the optimizer is built
    ```

    Fix and its safety
    add_gaussian_bias adds two parameters per layer; unsafe: it changes the function and what is trained.

    Source
    Derived: arXiv 2305.04722 adds the bias to networks that have a relative position bias already, with pretrained weights; that a network
    with absolute positions alone and no pretraining is where a prior has most to offer is our own conclusion, hence a preview.
    """
    assert subject.graph is not None
    assert subject.model is not None
    traced = list(read_traced(subject.model, subject.graph).values())
    layers = [seen for seen in traced if seen.patches is not None and seen.num_queries == seen.num_keys]
    if len(layers) < 2 or len({seen.patches for seen in layers}) != 1 or any(map(_knows_positions, subject.graph.attentions)):
        return
    position, grid = _absolute_position(subject.graph, layers[0]), _grid(layers[0])
    if position is None:
        return
    similarity = _neighbour_similarity(subject.model.get_parameter(position), grid)
    if similarity is not None and similarity >= UNTRAINED:
        return
    rows, columns = grid
    yield Observation(
        message=f"{len(layers)} attention layers on {rows} x {columns} patches know positions by {position} alone",
        places=[Place(seen.path) for seen in layers],
        evidence=[Evidence(f"cosine of neighbours in {position}", similarity, expected="about 0 as drawn")]
        if similarity is not None
        else [],
        advice="try add_gaussian_bias(model) before the optimizer is built",
    )


def _grid(seen: TracedAttention) -> Grid:
    assert seen.patches is not None
    return seen.patches[1]


def _knows_positions(attention: Attention) -> bool:
    """Whether a bias or mask enters its logits, or its queries are turned by a rotary embedding."""
    node = attention.node
    if attention.fused:
        mask = node.argument("attn_mask", 3, None)
        return (mask is not None and not lets_all_pass(mask)) or any(_is_rotated(operand) for operand in node.inputs[:2])
    if _weights_are_added_to(node):
        return True
    while node.kind is not Kind.MATMUL and node.inputs:
        if node.kind is Kind.ADD or node.op in ("masked_fill", "where"):
            return True
        node = node.inputs[0]
    return any(_is_rotated(operand) for operand in node.inputs[:2])


def _weights_are_added_to(softmax: Node) -> bool:
    """Whether the weights of positions join those of content behind the softmax (ConViT)."""
    node = softmax
    while len(node.users) == 1 and node.users[0].kind is not Kind.MATMUL:
        node = node.users[0]
        if node.kind is Kind.ADD:
            return True
    return False


def _is_rotated(node: Node) -> bool:
    """Whether parts of a query or key are joined or added between its projection and the attention."""
    while node.kind is not Kind.WEIGHT and node.inputs:
        if node.kind in (Kind.ADD, Kind.CAT):
            return True
        node = node.inputs[0]
    return False


def _absolute_position(graph: ModelGraph, layer: TracedAttention) -> str | None:
    """The parameter that is added to the tokens before the first attention, one row for each patch or token."""
    patches = math.prod(_grid(layer))
    for node in graph.nodes[: graph.attentions[0].node.index]:
        for read in node.reads if node.kind is Kind.ADD else ():
            if len(read.path[-1].shape) >= 2 and read.path[-1].shape[-2] in (patches, layer.num_queries):
                return read.parameter
    return None


def _neighbour_similarity(position: Tensor, grid: Grid) -> float | None:
    """Mean cosine of horizontal neighbours, their mean taken off; None where there are no values or no neighbours."""
    rows, columns = grid
    values = position.detach().flatten(0, -2)[-rows * columns :]
    if position.is_meta or columns < 2 or len(values) != rows * columns or values.device.type not in ("cpu", "cuda"):
        return None
    values = values.float()
    values = (values - values.mean(0)).reshape(rows, columns, -1)
    return float(nn.functional.cosine_similarity(values[:, 1:], values[:, :-1], dim=-1).mean())


@rule(
    "NK602",
    "attention-bias-never-reached",
    mark=Mark.DERIVED,
    source="derived here: tests/methods/gaussian_bias/test_rules.py",
)
def attention_bias_never_reached(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds a bias or mask that was given to attention and does not reach its logits: a relative position module whose forward gives
    another bias than the get_bias() that fused attention calls; parameters that act with fused attention off and not on; a mask
    that is not the causal one and that `is_causal=True` replaces (a window, a bias).

    Why it hurts
    Nothing fails: the network trains without the bias or attends where it must not, and parameters of the bias get no gradient.

    Evidence
    The largest difference between the two biases, the parameters that only a second trace with fused attention off reads, or the largest
    finite value in the mask that was replaced, or the share of pairs that it and the causal one treat differently, each measured on
    this model.

    Example
    ```python
    import torch
    from torch import nn

    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 16, 8)
    future = torch.ones(16, 16, dtype=torch.bool).triu(1)
    window = future | torch.ones(16, 16, dtype=torch.bool).tril(-4)  # the last four tokens alone
    seen, _ = attention(x, x, x, attn_mask=window, is_causal=True, need_weights=False)  # sees all tokens before
    ```

    Use instead
    ```python
    seen, _ = attention(x, x, x, attn_mask=window, need_weights=False)
    ```

    In a subclass of timm's RelPosMlp override `get_bias()`, which the fused path (the default) calls, and not `forward`; or let
    add_gaussian_bias do it.

    Fix and its safety
    None is made: it takes a change of code.

    Source
    Derived: which calls timm's attention makes on its fused path, and that `is_causal` takes precedence over a mask in timm and in
    `nn.MultiheadAttention`, is read from their sources; the measurements are our own. The authors' script for arXiv 2305.04722 overrides
    the forward, which the timm of its day called.
    """
    assert subject.graph is not None
    assert subject.model is not None
    yield from _two_biases(subject.model, subject)
    yield from _idle_parameters(subject.model, subject.graph, subject.example_inputs)
    yield from _replaced_masks(subject.model, subject.graph, subject)


def _can_measure(subject: Subject) -> bool:
    tensors = [leaf for leaf in tree_leaves(subject.example_inputs) if isinstance(leaf, Tensor)]
    parameters = [] if subject.model is None else list(subject.model.parameters())
    return subject.measure and not any(tensor.is_meta for tensor in (*tensors, *parameters))


def _two_biases(model: nn.Module, subject: Subject) -> Iterator[Observation]:
    """Relative position modules under fused attention whose forward adds another bias than `get_bias()` gives."""
    if not _can_measure(subject):
        return
    differences: dict[str, float] = {}
    for path, module in model.named_modules():
        inner = getattr(module, "rel_pos", None)
        if isinstance(inner, nn.Module) and getattr(module, "fused_attn", False) and hasattr(inner, "get_bias"):
            difference = _difference(inner)
            if difference > 0:
                differences[f"{path}.rel_pos" if path else "rel_pos"] = difference
    if differences:
        worst = max(differences, key=lambda path: differences[path])
        yield Observation(
            message="the forward of a relative position module gives another bias than get_bias(), the one that fused attention calls",
            places=[Place(path) for path in differences],
            evidence=[Evidence(f"largest difference of the two biases at {worst}", differences[worst], expected="0")],
            advice="override get_bias() instead of forward; add_gaussian_bias does so",
            cause="forward overridden",
        )


def _difference(rel_pos: Any) -> float:
    with torch.no_grad(), preserved(rel_pos):
        rel_pos.eval()
        bias = rel_pos.get_bias()
        found = rel_pos(torch.zeros_like(bias))
    return float((found - bias).abs().max())


def _idle_parameters(model: nn.Module, graph: ModelGraph, example_inputs: Any) -> Iterator[Observation]:
    """Parameters of fused attention that no operation reads in this trace, and that one reads when it is not fused."""
    attention = {path: module for path, module in model.named_modules() if getattr(module, "fused_attn", False) is True}
    inside = {f"{path}.{name}" if path else name for path, module in attention.items() for name, _ in module.named_parameters()}
    idle = inside - _read_by(graph)
    if not idle:
        return
    with preserved(model):
        for module in attention.values():
            module.fused_attn = False
        try:
            unfused = ModelGraph.from_model(model, example_inputs)
        except TraceError:  # the model does not run this way, so nothing is hidden from its fused path
            return
    hidden = sorted(idle & _read_by(unfused))
    if hidden:
        shown = ", ".join(hidden[:4]) + (f" and {len(hidden) - 4} more" if len(hidden) > 4 else "")
        yield Observation(
            message=f"{len(hidden)} parameters act on unfused attention only, and fused attention runs here: {shown}",
            places=[Place(path) for path in dict.fromkeys(name.rpartition(".")[0] for name in hidden)],
            evidence=[Evidence("parameters that the fused path never reads", float(len(hidden)), expected="0")],
            advice="give fused attention the bias too (timm's relative position modules: override get_bias()), or set fused_attn to False",
            cause="unfused only",
        )


def _read_by(graph: ModelGraph) -> set[str]:
    return {read.parameter for node in graph.nodes for read in node.reads}


def _replaced_masks(model: nn.Module, graph: ModelGraph, subject: Subject) -> Iterator[Observation]:
    """Masks that come along with `is_causal=True` and hold something else than the causal pattern."""
    suspects = [path for path in dict.fromkeys(_causal_modules(model, graph)) if "attn_mask" in _arguments(model.get_submodule(path))]
    if not suspects or not _can_measure(subject):
        return
    found = _masks_under_causal(model, suspects, subject.example_inputs)
    if found:
        worst = max(found, key=lambda path: found[path])
        largest, share = found[worst]
        yield Observation(
            message="an attention mask with values of its own comes along with is_causal=True, which replaces it",
            places=[Place(path) for path in found],
            evidence=[
                Evidence(f"largest finite value in the mask of {worst}", largest, expected="0")
                if largest > 0
                else Evidence(f"share of pairs that the mask of {worst} and the causal one treat differently", share, expected="0")
            ],
            advice="put the causal part into the mask and pass is_causal=False",
            cause="is_causal",
        )


def _causal_modules(model: nn.Module, graph: ModelGraph) -> Iterable[str]:
    for attention in graph.attentions:
        path = attention.module
        is_off = getattr(model.get_submodule(path), "fused_attn", True) is False
        if attention.node.argument("is_causal", 5, False) if attention.fused else is_off:
            yield path


def _arguments(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)


def _masks_under_causal(model: nn.Module, paths: list[str], example_inputs: Any) -> dict[str, CausalDeparture]:
    """How far each mask that was replaced is from the causal one, from one pass in eval mode."""
    found: dict[str, CausalDeparture] = {}

    def watch(path: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = {**dict(zip(_arguments(module), args, strict=False)), **kwargs}
            mask = call.get("attn_mask")
            departure = departure_from_causal(mask, module) if call.get("is_causal") and isinstance(mask, Tensor) else None
            if departure is not None:
                found[path] = departure

        return look

    args, kwargs = call_arguments(example_inputs)
    with preserved(model, buffers=True), torch.no_grad(), ExitStack() as stack:
        model.eval()
        for path in paths:
            handle = model.get_submodule(path).register_forward_pre_hook(watch(path), with_kwargs=True)
            stack.callback(handle.remove)
        model(*args, **kwargs)
    return found
