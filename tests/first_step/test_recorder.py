"""The facts of a step: what `read_step` and `StepRecorder` tell, and that both leave everything as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim import SGD, Optimizer
from torch.utils.checkpoint import checkpoint

from pl_normkit import audit
from pl_normkit.first_step import EvaluationRecorder, StepFacts, StepRecorder, read_step
from tests.methods.wiring.clean import CLEAN
from tests.methods.wiring.mistakes import MISTAKES
from tests.methods.wiring.setups import Setup, classes, cnn, mlp

BOTH: dict[str, Callable[[], Setup]] = {**CLEAN, **{name: build for name, (_, build) in MISTAKES.items()}}


def state_of(model: nn.Module) -> list[object]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    flags = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return [tensors, gradients, flags, hooks, torch.get_rng_state().clone()]


@pytest.mark.parametrize(
    "name", ["frozen_backbone_in_training_mode", "encoder_trained_in_eval_mode", "gradient_accumulation", "packed_sequences"]
)
def test_an_audit_leaves_everything_as_it_was(name: str) -> None:
    setup = BOTH[name]()
    inputs = setup.inputs
    output = setup.model(**inputs) if isinstance(inputs, dict) else setup.model(inputs)
    loss = setup.loss(output)
    before = state_of(setup.model)
    audit(setup.model, inputs, loss=loss, optimizers=SGD(setup.model.parameters(), 0.1), select=["NK0"])
    torch.testing.assert_close(state_of(setup.model), before, rtol=0, atol=0)
    assert not torch_module._global_forward_hooks
    loss.backward()  # the graph is still there


def test_gradients_are_those_of_the_backward() -> None:
    model, x, y = cnn(), torch.randn(8, 3, 16, 16), classes(8)
    loss = F.cross_entropy(model(x), y)
    facts = read_step(model, x, loss)
    loss.backward()
    assert facts is not None
    assert facts.gradients == {name: float(p.grad.abs().amax()) for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["no graph", "freed"])
def test_a_loss_that_cannot_be_walked_gives_no_facts(how: str) -> None:
    model, x = mlp(), torch.randn(4, 32)
    loss = model(x).sum()
    if how == "freed":
        loss.backward()
    assert read_step(model, x, loss.detach() if how == "no graph" else loss) is None


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.body, self.last, self.reentrant = mlp(out=16), nn.Linear(16, 10), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_hides_nothing_and_accuses_nobody(reentrant: bool) -> None:
    """Parameters inside a reentrant checkpoint get their gradients in a real backward alone."""
    model, x = Checkpointed(reentrant=reentrant), torch.randn(4, 32, requires_grad=True)
    loss = F.cross_entropy(model(x), classes(4))
    facts = read_step(model, x, loss)
    findings = audit(model, x, loss=loss, optimizers=SGD(model.parameters(), 0.1), select=["NK0"]).findings
    loss.backward()
    real = {name: float(p.grad.abs().amax()) for name, p in model.named_parameters() if p.grad is not None}
    assert facts is not None
    assert facts.gradients == {name: size for name, size in real.items() if not reentrant or name.startswith("last")}
    assert findings == []


def run(model: nn.Module, optimizer: Optimizer, step: Callable[[int], Tensor], steps: int = 3) -> StepRecorder:
    """A training loop as the documentation of `StepRecorder` shows it."""
    recorder = StepRecorder(model, optimizers=[optimizer])
    for number in range(steps):
        with recorder.forward():
            loss = step(number)
        recorder.before_backward(loss)
        loss.backward()
        recorder.after_backward()
        optimizer.step()
        optimizer.zero_grad()
    return recorder


@pytest.mark.parametrize(
    "name", ["result_thrown_away", "encoder_under_no_grad", "dead_convolution", "mse_loss_of_column_and_row", "plain_mlp"]
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_loop_records_what_reading_a_loss_tells(name: str) -> None:
    setup = BOTH[name]()
    recorded = run(setup.model, SGD(setup.model.parameters(), 0.0), lambda _: setup.loss(setup.model(setup.inputs))).facts
    model = copy.deepcopy(setup.model)
    read = read_step(model, setup.inputs, setup.loss(model(setup.inputs)))
    assert isinstance(recorded, StepFacts)
    assert isinstance(read, StepFacts)
    assert recorded.forward is not None
    assert read.forward is not None
    assert (recorded.gradients.keys(), recorded.broadcasts, recorded.silenced) == (read.gradients.keys(), read.broadcasts, read.silenced)
    assert (recorded.forward.read, recorded.forward.reached) == (read.forward.read, read.forward.reached)
    assert [(cut.how, cut.parameters) for cut in recorded.forward.cuts] == [(cut.how, cut.parameters) for cut in read.forward.cuts]


def test_nothing_is_hooked_after_the_second_step() -> None:
    model = mlp()
    x, y = torch.randn(16, 32), classes(16)
    optimizer = SGD(model.parameters(), 0.1)
    run(model, optimizer, lambda _: F.cross_entropy(model(x), y))
    assert not torch_module._global_forward_hooks
    assert not torch_module._global_forward_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_recorded_run_trains_as_an_unwatched_one() -> None:
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10))
    watched = copy.deepcopy(plain)
    x, y = torch.randn(16, 32), classes(16)
    torch.manual_seed(2)
    run(watched, SGD(watched.parameters(), 0.1), lambda _: F.cross_entropy(watched(x), y))
    torch.manual_seed(2)
    optimizer = SGD(plain.parameters(), 0.1)
    for _ in range(3):
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(watched.state_dict(), plain.state_dict(), rtol=0, atol=0)


# Whether gradients are cleared between steps.

Loop = Callable[[nn.Module, Optimizer, Callable[[], Tensor]], None]


def cleared_before(model: nn.Module, optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def cleared_after(model: nn.Module, optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    loss().backward()
    optimizer.step()
    model.zero_grad(set_to_none=False)


def accumulated(model: nn.Module, optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    optimizer.zero_grad()
    for _ in range(3):
        (loss() / 3).backward()
    optimizer.step()


def visited_by_another_loss(model: nn.Module, optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    """As a discriminator, which the generator's backward leaves gradients in."""
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
    loss().backward()


def between_loss_and_backward(model: nn.Module, optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    value = loss()
    optimizer.zero_grad()
    value.backward()
    optimizer.step()


def never(model: nn.Module, optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    loss().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("loop", "expected"),
    [(cleared_before, 0), (cleared_after, 0), (accumulated, 0), (visited_by_another_loss, 0), (between_loss_and_backward, 0), (never, 4)],
)
def test_gradients_that_nobody_clears(loop: Loop, expected: int) -> None:
    model, x, y = mlp(), torch.randn(16, 32), classes(16)
    optimizer = SGD(model.parameters(), 0.1)
    recorder = StepRecorder(model, [optimizer])
    first = F.cross_entropy(model(x), y)
    recorder.before_backward(first)
    first.backward()
    recorder.after_backward()
    optimizer.zero_grad()
    for _ in range(3):
        loop(model, optimizer, lambda: F.cross_entropy(model(x), y))
    facts = recorder.late_facts()
    assert facts is not None
    assert len(facts.not_cleared) == expected


def test_close_takes_all_hooks_away() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), 0.1)
    recorder = StepRecorder(model, [optimizer])
    recorder.before_forward()
    recorder.close()
    assert not torch_module._global_forward_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(("training", "expected"), [(False, ()), (True, ("1",))])
def test_modes_in_an_evaluation(training: bool, expected: tuple[str, ...]) -> None:
    model = nn.Sequential(nn.Linear(32, 10), nn.Dropout(0.1)).train(training)
    recorder = EvaluationRecorder(model)
    recorder.start()
    with torch.inference_mode():
        model(torch.randn(4, 32)[:3])
    recorder.stop()
    assert recorder.facts is not None
    assert (recorder.facts.in_train_mode, recorder.facts.evaluation_dropouts) == (expected, ())
    assert not torch_module._global_forward_hooks
