"""`SAMOnNorms` trains as a loop with two passes written out does, and says where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import SAMOnNorms
from pl_normkit.errors import ConfigError, NormkitWarning

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")
RHO, RATE = 0.4, 0.05


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 3, generator=generator) for _ in range(3)]


class Regressor(pl.LightningModule):
    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net if net is not None else network()
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
        loss: Tensor = (self.net(batch[0]) - 1).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), RATE, momentum=0.9)


def fit(module: pl.LightningModule, callbacks: list[pl.Callback], folder: Path, epochs: int = 1, **options: Any) -> pl.Trainer:
    loader = DataLoader(TensorDataset(torch.cat(batches())), batch_size=5)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", callbacks=callbacks, max_epochs=epochs, default_root_dir=folder, **quiet, **options)
    trainer.fit(module, loader)
    return trainer


def by_hand(net: nn.Sequential, clip: float = 0.0) -> list[float]:
    """The losses of the first passes of a run over the batches, which trains `net`."""
    norms = [*net[1].parameters(), *net[4].parameters()]
    optimizer, losses = torch.optim.SGD(net.parameters(), RATE, momentum=0.9), []
    for x in batches():
        loss = (net(x) - 1).square().mean()
        first = torch.autograd.grad(loss, norms)
        length = torch.cat([slope.flatten() for slope in first]).norm()
        buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
        before = [norm.detach().clone() for norm in norms]
        for norm, slope in zip(norms, first, strict=True):
            norm.data += RHO * slope / length
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        for norm, value in zip(norms, before, strict=True):
            norm.data = value
        net.load_state_dict(buffers, strict=False)
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_it_trains_as_two_passes_written_out(clip: float, tmp_path: Path) -> None:
    module, expected = Regressor(), network()
    losses = by_hand(expected, clip)
    trainer = fit(module, [SAMOnNorms(rho=RHO)], tmp_path, gradient_clip_val=clip or None)
    for name, value in module.net.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-5, atol=1e-6)
    assert module.net[1].num_batches_tracked == 3
    assert len(module.losses) == 6
    assert float(trainer.callback_metrics["loss"]) == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert "log" not in vars(module)
    assert "optimizer_step" not in vars(module)


class WrittenOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.gain, self.last = nn.Linear(3, 4), nn.Parameter(torch.ones(4)), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        result: Tensor = self.last(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain)
        return result


class WithForward(Regressor):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result


def test_norms_written_out_are_found_by_example_inputs(tmp_path: Path) -> None:
    found = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            found.extend(sam.ascent.found.all if sam.ascent is not None else [])

    sam = SAMOnNorms(example_inputs=torch.randn(2, 3))
    fit(WithForward(WrittenOut()), [sam, Look()], tmp_path)
    assert found == ["net.gain"]


class SkipsSteps(Regressor):
    def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
        return None if index == 1 else super().training_step(batch, index)

    def on_train_batch_start(self, batch: list[Tensor], index: int) -> int | None:
        return -1 if index == 2 else None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_skipped_steps_and_epochs_cut_short(tmp_path: Path) -> None:
    module = SkipsSteps()
    fit(module, [SAMOnNorms()], tmp_path, epochs=3)
    assert len(module.losses) == 3 * 2  # two passes of the first batch an epoch: none of the batch that waited in vain is added
    module.losses.clear()
    fit(module, [], tmp_path)  # where a wrapper that no step took off would still stand
    assert len(module.losses) == 1


class Manual(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


REFUSED: dict[str, tuple[Callable[[], pl.LightningModule], dict[str, Any]]] = {
    "the optimization is manual": (Manual, {}),
    "gradients are accumulated": (Regressor, {"accumulate_grad_batches": 2}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_it_cannot_do_is_refused_before_the_first_step(message: str, tmp_path: Path) -> None:
    make, options = REFUSED[message]
    module = make()
    with pytest.raises(ConfigError, match=message):
        fit(module, [SAMOnNorms()], tmp_path, **options)
    assert module.losses == []


def test_a_schedule_of_accumulation_is_refused_when_it_begins(tmp_path: Path) -> None:
    module = Regressor()
    with pytest.raises(ConfigError, match="gradients are accumulated"):
        fit(module, [GradientAccumulationScheduler({1: 2}), SAMOnNorms()], tmp_path, epochs=2)
    assert len(module.losses) == 6


def test_without_norms_it_warns_and_trains_plainly(tmp_path: Path) -> None:
    module = Regressor(nn.Linear(3, 1))
    with pytest.warns(NormkitWarning, match="SAMOnNorms changes nothing"):
        fit(module, [SAMOnNorms()], tmp_path)
    assert len(module.losses) == 3


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError):
        SAMOnNorms(rho=-1.0)
