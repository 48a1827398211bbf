"""Which parameters will not learn, and why: the judgements of NK001 and NK003."""

from __future__ import annotations

__all__ = ["has_trained_twin", "not_updated", "without_gradient"]

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from pl_normkit.findings import Evidence, Place
from pl_normkit.first_step import StepFacts
from pl_normkit.methods.wiring.code_names import is_never_read
from pl_normkit.methods.wiring.code_paths import left_out
from pl_normkit.methods.wiring.step_cuts import StepCut, cuts_in_step
from pl_normkit.rules import Observation, Subject

_TEACHER = re.compile(r"teacher|target|ema|average|momentum|slow|shadow|key")
"""Names of single layers that are copies of a trained one; larger parts are told by their shapes alone."""


def without_gradient(subject: Subject, step: StepFacts) -> Iterator[Observation]:
    """NK001: parameters without a gradient, by cause."""
    model = subject.model
    assert model is not None
    cuts = cuts_in_step(subject.root if subject.root is not None else model)
    if step.is_loss_cut:
        yield from _loss_cut(model, step, cuts)
        return
    missing = _missing(model, step, subject.optimizers)
    if not missing or len(missing) == len(step.gradients):
        return  # a loss of another network
    if step.needs_all_gradients:
        yield _observation(
            model, missing, "no gradient reaches these parameters, and DistributedDataParallel waits for all of them",
            "remove them or freeze them, or pass find_unused_parameters=True", "ddp",
        )  # fmt: skip
        return
    roots = (subject.root,) if subject.root is not None else ()
    unread = [name for name in missing if not _is_read(step, name) and is_never_read(model, name, roots)]
    if unread:
        yield _observation(
            model, unread, "forward never reads these parameters", "call the module in forward, or take it out of the model", "never read"
        )
    yield from _left_out(model, step, [name for name in missing if name not in unread], roots)
    yield from _cut_off(model, step, missing)
    yield from _cut_outside(model, step, missing, cuts, subject.root if subject.root is not None else model)


def _loss_cut(model: nn.Module, step: StepFacts, cuts: Sequence[StepCut]) -> Iterator[Observation]:
    """A loss that was made anew before its backward."""
    where = f" at {cuts[-1].source}" if cuts else ", outside the network"
    names = [name for name, size in step.gradients.items() if size is None]
    if names:
        yield _observation(
            model, names, f"the loss is a new tensor, cut off from the network{where}: its backward reaches no parameter",
            "run backward on the loss itself, not on one made of loss.item(), loss.data or loss.detach()", "loss cut",
        )  # fmt: skip


def _cut_outside(
    model: nn.Module, step: StepFacts, missing: Sequence[str], cuts: Sequence[StepCut], root: nn.Module
) -> Iterator[Observation]:
    """Whole modules whose results training_step cuts."""
    forward = step.forward
    if forward is None or not cuts:
        return
    names = {id(p): name for name, p in model.named_parameters()}
    lost = {name for name in missing if name in forward.read & forward.reached and not has_trained_twin(model, name, step.gradients)}
    told: set[str] = set()
    for cut in cuts:
        own: list[str] = []
        for path in sorted(cut.modules):
            inner = [names[id(p)] for p in root.get_submodule(path).parameters() if p.requires_grad and id(p) in names]
            own += inner if lost.issuperset(inner) else []
        own = [name for name in dict.fromkeys(own) if name not in told]
        told.update(own)
        if own:
            yield _observation(
                model, own, f"{cut.how} in training_step cuts the gradient of these parameters at {cut.source}",
                f"take {cut.how} out of the path to the loss, or freeze the parameters with requires_grad_(False)", f"cut by {cut.how}",
            )  # fmt: skip


def _left_out(model: nn.Module, step: StepFacts, missing: Sequence[str], roots: tuple[nn.Module, ...]) -> Iterator[Observation]:
    """What the code names, and no step can call."""
    if step.forward is None:
        return
    by_cause = left_out(model, [name for name in missing if not _is_read(step, name)], step.forward.called, roots)
    for cause, names in by_cause.items():
        yield _observation(
            model, names, f"forward never calls these modules: the {cause} leaves them out",
            "call them in forward, or build no more modules than it calls", cause,
        )  # fmt: skip


def _is_read(step: StepFacts, name: str) -> bool:
    return step.forward is not None and name in step.forward.read


def _missing(model: nn.Module, step: StepFacts, optimizers: Sequence[Optimizer]) -> list[str]:
    """Names without a gradient that some optimizer means to move in this step."""
    names = [name for name, size in step.gradients.items() if size is None]
    parameters = dict(model.named_parameters())
    held = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    acting = [ids for ids in held if any(size is not None and id(parameters[name]) in ids for name, size in step.gradients.items())]
    return [name for name in names if not held or any(id(parameters[name]) in ids for ids in acting)]


def _cut_off(model: nn.Module, step: StepFacts, missing: Sequence[str]) -> Iterator[Observation]:
    forward = step.forward
    if forward is None:
        return
    dropped = [name for name in missing if name in step.dropped_by_backward - forward.written]
    if dropped:
        yield _observation(
            model, dropped, "a custom autograd function returns None as the gradient of these parameters",
            "return their gradient from its backward, or freeze them with requires_grad_(False)", "custom function",
        )  # fmt: skip
    lost = [name for name in missing if name in forward.read and name not in forward.reached | forward.written]
    lost = [name for name in lost if not has_trained_twin(model, name, step.gradients)]
    by_cut: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in lost:
        ends = [(cut.how, cut.place.source) for cut in forward.cuts if name in cut.parameters]
        by_cut[ends[0] if ends else ("", "")].append(name)
    for (how, line), names in by_cut.items():
        if not how and not forward.draws_numbers:  # else a number may have decided so in this step
            yield _observation(
                model, names, "the result of these parameters is thrown away", "use it, or take the module out of the model", "thrown away"
            )
        elif how:
            yield _observation(
                model, names, f"{how} cuts the gradient of these parameters{f' at {line}' if line else ''}",
                f"take {how} out of the path to the loss, or freeze the parameters with requires_grad_(False)", f"cut by {how}",
            )  # fmt: skip


def has_trained_twin(model: nn.Module, name: str, gradients: Mapping[str, float | None]) -> bool:
    """Whether a part of the same shape beside the parameter's own is trained: a teacher, or a target network, next to its student."""
    path = name.split(".")
    for depth in range(len(path) - 1):
        holder, part = model.get_submodule(".".join(path[:depth])), path[depth]
        own = holder.get_submodule(part)
        is_single = not any(True for _ in own.children())
        if part.isdigit() or (is_single and not _TEACHER.search(part.lower())):
            continue
        shapes = [(inner, p.shape) for inner, p in own.named_parameters()]
        for other, module in holder.named_children():
            if other == part or [(inner, p.shape) for inner, p in module.named_parameters()] != shapes:
                continue
            if any(gradients.get(".".join((*path[:depth], other, inner))) is not None for inner, _ in shapes):
                return True
    return False


def not_updated(subject: Subject, step: StepFacts) -> Iterator[Observation]:
    """NK003: parameters with a gradient that the optimizers will leave where they are."""
    model = subject.model
    assert model is not None
    parameters = {name: p for name, p in model.named_parameters() if step.gradients.get(name)}
    groups = [group for optimizer in subject.optimizers for group in optimizer.param_groups]
    resting = {id(p) for group in groups if _rests(group) for p in group["params"]}
    moving = {id(p) for group in groups if not _rests(group) for p in group["params"]}
    names = [name for name, p in parameters.items() if id(p) in resting - moving]
    if names:
        yield _observation(
            model, names, "the learning rate of these parameters is 0",
            "give their group a learning rate, or freeze them with requires_grad_(False)", "learning rate 0",
        )  # fmt: skip
    lost = {name: p for name, p in parameters.items() if id(p) not in resting | moving}
    if lost and _are_elsewhere(lost.values(), groups, subject.root if subject.root is not None else model):
        yield _observation(
            model, list(lost), "the optimizer holds other tensors in the place of these parameters",
            "build the optimizer after the model is complete: after copying it, replacing layers or loading it anew", "another copy",
        )  # fmt: skip


def _rests(group: Mapping[str, object]) -> bool:
    """Whether the group's learning rate is 0 and no scheduler is going to raise it."""
    rate, start = group.get("lr"), group.get("initial_lr", 0.0)
    return isinstance(rate, (int, float, Tensor)) and float(rate) == 0.0 and isinstance(start, (int, float, Tensor)) and float(start) == 0.0


def _are_elsewhere(lost: object, groups: Sequence[Mapping[str, object]], root: nn.Module) -> bool:
    """Whether the optimizers hold tensors of all these shapes that are not the model's."""
    own = {id(p) for p in root.parameters()}
    foreign = Counter(tuple(p.shape) for group in groups for p in group["params"] if id(p) not in own)  # type: ignore[attr-defined]
    wanted = Counter(tuple(p.shape) for p in lost)  # type: ignore[attr-defined]
    holds_own = any(id(p) in own for group in groups for p in group["params"])  # type: ignore[attr-defined]
    if wanted == foreign or (wanted <= foreign and not holds_own):  # beside the model's own, others may be another network's
        return True
    return _are_replaced(lost, groups, own, root)


def _are_replaced(lost: object, groups: Sequence[Mapping[str, object]], own: set[int], root: nn.Module) -> bool:
    """Whether the optimizers hold the model's parameters in their order, with other tensors where the lost ones should stand."""
    held = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    ids = {id(p) for p in lost}  # type: ignore[attr-defined]
    before = _gaps(held, lambda p: id(p) not in own)
    now = _gaps([p for p in root.parameters() if p.requires_grad], lambda p: id(p) in ids)
    if len(before) == 1 or len(before) != len(now):
        return False
    return all(_ranks(old) == _ranks(new) for old, new in zip(before, now, strict=True))


def _gaps(parameters: Sequence[Tensor], is_apart: Callable[[Tensor], bool]) -> list[list[Tensor]]:
    """The parameters that are apart, between those that are not."""
    found: list[list[Tensor]] = [[]]
    for parameter in parameters:
        if is_apart(parameter):
            found[-1].append(parameter)
        else:
            found.append([])
    return found


def _ranks(parameters: Sequence[Tensor]) -> list[int]:
    """Biases aside: a layer may have come with one or without."""
    return [p.dim() for p in parameters if p.dim() > 1]


def _observation(model: nn.Module, names: Sequence[str], message: str, advice: str, cause: str) -> Observation:
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    share = sum(sizes[name] for name in names) / max(1, sum(sizes.values()))
    evidence = Evidence("share of all trainable elements", share, "0", is_measured=False)
    return Observation(message, [Place(name) for name in names], advice, (evidence,), cause=cause)
