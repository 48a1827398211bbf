"""What networks are called with, found by a rehearsed step: in batches of any form, and leaving nothing behind."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pl_normkit.callbacks._fit import after, current_fit
from pl_normkit.callbacks._network_calls import NetworkCalls, rehearse
from pl_normkit.graph import ModelGraph
from pl_normkit.graph.sharing import TraceStore, shared_traces

X = torch.arange(12.0).reshape(4, 3)


@dataclass
class Pair:
    image: Tensor
    label: int


class Tally:
    """No module, no tensor: a counter of the user's own."""

    def __init__(self) -> None:
        self.steps = 0
        self.log: list[int] = []
        self.rng = np.random.default_rng(0)


class Module(pl.LightningModule):
    """Counts, logs, draws random numbers and writes buffers in its step, before and after it calls its networks."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.teacher = nn.Linear(3, 2)
        self.call = call
        self.tally = Tally()
        self.losses: list[float] = []
        self.register_buffer("mean", torch.zeros(2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.tally.steps += 1
        self.tally.log.append(batch_idx)
        self.tally.rng.random()
        random.random()
        np.random.rand()  # noqa: NPY002
        self.losses.append(float(torch.rand(())))
        out = self.call(self, batch)
        self.mean = self.mean + 1
        self.log("loss", out.mean())
        self.logger.log_metrics({"a": 1.0}) if self.logger is not None else None
        return out.mean()


def trainer_of(module: pl.LightningModule) -> pl.Trainer:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    module.trainer = trainer
    return trainer


FORMS: dict[str, tuple[Any, Any]] = {
    "unknown key": ({"image": X, "index": 3}, lambda m, b: m.net(b["image"])),
    "dataclass": (Pair(X, 1), lambda m, b: m.net(b.image)),
    "nested lists": ([[X, 1], [2, [3]]], lambda m, b: m.net(b[0][0])),
    "keyword": ((X,), lambda m, b: m.net(input=b[0])),
    "changed on the way": ((X - 1,), lambda m, b: m.net(b[0] + 1)),
}


@pytest.mark.parametrize("form", FORMS)
def test_inputs_are_what_the_step_passes(form: str) -> None:
    batch, call = FORMS[form]
    module = Module(call)
    (found,) = rehearse(trainer_of(module), module, batch)
    assert found.network is module.net
    inputs = found.inputs["input"] if isinstance(found.inputs, dict) else found.inputs[0]
    assert torch.equal(inputs, X)


class Whole(Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)


class Unpacking(Module):
    def forward(self, **batch: Any) -> Any:
        return self.net(batch["image"])


@pytest.mark.parametrize(
    ("kind", "call", "inputs"),
    [
        (Whole, lambda m, b: m(b["image"]), (X,)),
        (Whole, lambda m, b: m(input=b["image"]), {"input": X}),
        (Unpacking, lambda m, b: m(**b), {"image": X, "index": 3}),
    ],
)
def test_a_forward_of_the_users_own(kind: type[Module], call: Any, inputs: Any) -> None:
    module = kind(call)
    (found,) = rehearse(trainer_of(module), module, {"image": X, "index": 3})
    assert found.network is module
    assert repr(found.inputs) == repr(inputs)


def test_student_and_teacher_are_both_found() -> None:
    module = Module(lambda m, b: m.net(b) - m.teacher(2 * b).detach())
    first, second = rehearse(trainer_of(module), module, X)
    assert (first.network, second.network) == (module.net, module.teacher)
    assert torch.equal(second.inputs[0], 2 * X)


def test_a_call_that_mixes_positional_and_keyword_arguments_of_a_passing_forward_is_read_one_level_down() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor, scale: float) -> Tensor:
            return scale * self.fc(x)

    module = Whole(lambda m, b: m(b, scale=2.0))
    module.net = Scaled()  # type: ignore[assignment]
    calls = rehearse(trainer_of(module), module, X)
    assert [(call.network, set(call.inputs)) for call in calls if call.network is module.net] == [(module.net, {"x", "scale"})]


class Steps(Module):
    """Optimizes by hand with three optimizers."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        a, b, c = self.optimizers()  # type: ignore[misc]
        for optimizer, network in ((a, self.net), (b, self.teacher), (c, self.net)):
            optimizer.zero_grad()
            with self.toggled_optimizer(optimizer):
                self.manual_backward(network(batch).mean())
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 1.0


def test_steps_by_hand_run_without_their_optimizers() -> None:
    module = Steps(None)
    weights = {key: value.clone() for key, value in module.state_dict().items()}
    assert [call.network for call in rehearse(trainer_of(module), module, X)] == [module.net, module.teacher]
    assert all(torch.equal(weights[key], value) for key, value in module.state_dict().items())


def test_a_rehearsal_leaves_what_instances_share() -> None:
    class Noting(Module):
        seen: ClassVar[list[Any]] = []
        counts: ClassVar[dict[str, int]] = {"steps": 0}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen.append(batch_idx)
            self.counts["steps"] += 1
            return super().training_step(batch, batch_idx)

    module = Noting(lambda m, b: m.net(b))
    assert rehearse(trainer_of(module), module, X) != []
    assert (Noting.seen, Noting.counts) == ([], {"steps": 0})


def test_a_rehearsal_leaves_nothing() -> None:
    module = Module(lambda m, b: m.net(b))
    trainer = trainer_of(module)

    def states() -> Any:
        own = module.tally.rng.bit_generator.state
        return random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), own  # noqa: NPY002

    attributes, before = dict(vars(module)), states()
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    assert rehearse(trainer, module, X) != []
    assert states() == before
    assert {name: id(value) for name, value in vars(module).items()} == {name: id(value) for name, value in attributes.items()}
    assert (module.tally.steps, module.tally.log, module.losses) == (0, [], [])
    assert all(torch.equal(buffers[name], value) for name, value in module.named_buffers())
    assert [hook for part in module.modules() for hook in (*part._forward_pre_hooks, *part._forward_hooks)] == []


class Drawing(Dataset[Tensor]):
    """Augments with a generator of its own, and counts what it gave."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(1)
        self.generator = torch.Generator().manual_seed(2)
        self.given = 0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        self.given += 1
        return X[index] + float(self.rng.random()) + torch.rand(3, generator=self.generator)


class Looking(pl.Callback):
    """Asks for the inputs when the fit is set up."""

    def __init__(self, data: Drawing) -> None:
        self.data = data

    def state(self) -> Any:
        return self.data.rng.bit_generator.state, self.data.generator.get_state().tolist(), self.data.given

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        before = self.state()
        fit = current_fit(trainer, pl_module)
        (call,) = fit.rehearsed()
        assert call.inputs[0].shape == (2, 3)
        assert fit.rehearsed() is fit.rehearsed()
        assert self.state() == before


def test_the_data_are_as_they_were() -> None:
    data = Drawing()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        max_steps=0, callbacks=[Looking(data)],
    )  # fmt: skip
    module = Module(lambda m, b: m.net(b))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)  # type: ignore[method-assign]
    trainer.fit(module, DataLoader(data, batch_size=2))
    assert data.given == 0


def test_wrappers_come_off_in_any_order() -> None:
    class Owner:
        def method(self) -> str:
            return "own"

    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)):
        owner = Owner()
        offs = [after(owner, "method", lambda: pytest.fail("its wrapper was taken off")) for _ in range(3)]
        for k in order:
            offs[k]()
        assert (vars(owner), owner.method()) == ({}, "own")
    owner = Owner()
    called: list[int] = []
    for k in range(3):
        after(owner, "method", lambda k=k: called.append(k))
    assert (owner.method(), owner.method(), called, vars(owner)) == ("own", "own", [0, 1, 2], {})


def test_one_trace_until_the_network_changes() -> None:
    net, store = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Dropout(0.5)), TraceStore()
    x = torch.zeros(2, 3, 8, 8)

    def read(inputs: Any) -> ModelGraph:
        with shared_traces(store):
            return ModelGraph.from_model(net, inputs)

    first = read(x)
    watching = NetworkCalls(net)
    assert read(torch.ones_like(x)) is first
    watching.finish()
    assert store.traces == 1
    changes = [lambda: setattr(net[1], "p", 0.1), lambda: setattr(net[0], "padding", (1, 1)), net[1].eval]
    for count, change in enumerate(changes, start=2):
        change()
        assert read(x) is not first
        assert store.traces == count
    assert read(torch.zeros(2, 3, 9, 9)) is not first
    assert ModelGraph.from_model(net, x) is not read(x)  # nothing is kept outside of a fit
