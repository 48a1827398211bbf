"""Every operator survives what runs do to modules: autocast, copies, averaged weights, checkpoints, pickling, export, compile, layouts.

Ranks are in test_norm_ranks.py.
"""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tests.methods.norm_operators.operator_nets import ALL, IMAGES, ROWS, WIDTH, given, made, random
from tests.methods.norm_operators.test_operators import swapped_row


def train(model: nn.Module, x: Tensor, steps: int = 2) -> float:
    """The last loss of steps in bfloat16."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with given(model, len(x)), torch.autocast("cpu", torch.bfloat16):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(x).float().square().mean()
            loss.backward()
            optimizer.step()
    return loss.item()


def both_modes(model: nn.Module, x: Tensor) -> list[Tensor]:
    with given(model, len(x)):
        return [model.train()(x), model.eval()(x)]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's RMS norm under autocast
@pytest.mark.parametrize("to", ALL)
def test_copies_checkpoints_averages_autocast_and_export(to: str) -> None:
    model, x = made(to)
    averaged = AveragedModel(model, use_buffers=True)
    assert math.isfinite(train(model, x))
    averaged.update_parameters(model)
    twin, (fresh, _) = copy.deepcopy(model), made(to)
    fresh.load_state_dict(model.state_dict(), strict=True)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    expected = both_modes(model, x)
    for other in (twin, fresh, loaded, averaged.module):  # training moves buffers alike
        for theirs, mine in zip(both_modes(other, x), expected, strict=True):
            assert torch.equal(theirs, mine)
    with given(model, len(x)):
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to", ALL)
def test_a_resumed_run_is_the_run(to: str) -> None:
    """Weights, buffers and momentum after two steps, a checkpoint, and two more: those of four steps."""
    model, x = made(to)
    (fresh, _), results = made(to), []
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    with given(model, len(x)), given(fresh, len(x)):
        for number in range(4):
            if number == 2:
                fresh.load_state_dict(copy.deepcopy(model.state_dict()))
                later = torch.optim.SGD(fresh.parameters(), 0.01, momentum=0.9)
                later.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for net, each in ((model, optimizer), (fresh, later)) if number >= 2 else ((model, optimizer),):
                each.zero_grad()
                net.train()(x).square().mean().backward()
                each.step()
        results = [net.state_dict() for net in (model, fresh)]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # asked by torch._dynamo
@pytest.mark.parametrize("to", ALL)
def test_compiled_training_and_evaluation_equal_eager(to: str) -> None:
    model, x = made(to)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager" if to in ("prepbn", "powernorm", "sigma_reparam") else "eager")
    with given(model, len(x)), given(twin, len(x)):
        for _ in range(2):
            for net, call in ((model, model), (twin, compiled)):
                net.zero_grad()
                call(x).square().mean().backward()
            for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("to", sorted(ROWS))
def test_channels_in_front_are_channels_behind(to: str) -> None:
    """Values, gradients and what training leaves in the buffers."""
    last, first = swapped_row(to), swapped_row(to, axis=1)
    first.load_state_dict(last.state_dict())
    x = random(2, 3, 5, WIDTH).requires_grad_()
    y = random(2, 3, 5, WIDTH).movedim(-1, 1).contiguous().requires_grad_()
    for model, leaf in ((last, x), (first, y)):
        with given(model, 2):
            for _ in range(2):
                out = model(leaf)
            (out.movedim(1, -1) if model is first else out).mul(torch.arange(WIDTH)).square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(y.grad.movedim(1, -1), x.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(first.state_dict(), last.state_dict(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("to", sorted(IMAGES))
def test_images_in_channels_last_memory(to: str) -> None:
    model, x = made(to)
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for net, image in ((model, x), (twin, x.to(memory_format=torch.channels_last))):
        net.train()(image).square().mean().backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-4, atol=1e-6)
