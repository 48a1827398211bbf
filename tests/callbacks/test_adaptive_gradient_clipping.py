"""`AdaptiveGradientClipping` steps by gradients clipped by hand, leaves the head out, and says where it cannot work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import AdaptiveGradientClipping
from pl_normkit.errors import ConfigError, NormkitWarning

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")
CLIP, RATE = 0.01, 0.5


class Regressor(pl.LightningModule):
    def __init__(self, *, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.body = nn.Linear(4, 1), nn.Linear(3, 4)  # the head is no last one by name or order
        self.automatic_optimization = not manual

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.body(x)))
        return result

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = (self(batch[0]) - 5).square().mean()
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), RATE, momentum=0.9)


class BuiltInSetup(Regressor):
    def __init__(self) -> None:
        pl.LightningModule.__init__(self)

    def setup(self, stage: str) -> None:
        torch.manual_seed(0)
        self.head, self.body = nn.Linear(4, 1), nn.Linear(3, 4)


class Untraceable(Regressor):
    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(float(x.sum()), float)
        return super().forward(x)


DATA = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))


def fit(module: pl.LightningModule, callback: pl.Callback, folder: Path, **options: Any) -> None:
    loader = DataLoader(TensorDataset(DATA), batch_size=4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", callbacks=[callback], max_epochs=1, default_root_dir=folder, **quiet, **options)
    trainer.fit(module, loader)


def by_hand(module: Regressor) -> None:
    """Rows of the body's weight and its bias as units."""
    optimizer = torch.optim.SGD(module.parameters(), RATE, momentum=0.9)
    for x in DATA.split(4):
        optimizer.zero_grad()
        (module(x) - 5).square().mean().backward()
        for parameter in module.body.parameters():
            assert parameter.grad is not None
            for weight, slope in (
                zip(parameter.detach(), parameter.grad, strict=True) if parameter.ndim == 2 else [(parameter.detach(), parameter.grad)]
            ):
                limit = CLIP * max(float(weight.norm()), 1e-3)
                slope *= min(1.0, limit / max(float(slope.norm()), 1e-6))
        optimizer.step()


@pytest.mark.parametrize("make", [Regressor, lambda: Regressor(manual=True), BuiltInSetup])
def test_it_trains_as_clipping_written_out(make: Callable[[], Regressor], tmp_path: Path) -> None:
    module, expected, callback = make(), Regressor(), AdaptiveGradientClipping(CLIP)
    fit(module, callback, tmp_path)
    by_hand(expected)
    assert callback.clipping is not None
    assert callback.clipping.skipped == {"head.weight", "head.bias"}
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_an_unknown_head_is_said_and_a_named_one_is_not_looked_for(tmp_path: Path) -> None:
    with pytest.warns(NormkitWarning, match="clips the head too"):
        fit(Untraceable(), AdaptiveGradientClipping(), tmp_path)
    callback = AdaptiveGradientClipping(skip=["head.weight"])
    fit(Untraceable(), callback, tmp_path)
    assert callback.clipping is not None
    assert callback.clipping.skipped == {"head.weight"}


def test_a_second_clipping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="clipped twice"):
        fit(Regressor(), AdaptiveGradientClipping(), tmp_path, gradient_clip_val=1.0)


def test_a_fused_optimizer_under_a_scaler_is_refused() -> None:
    module, callback = Regressor(), AdaptiveGradientClipping(skip=["head"])
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    callback.setup(trainer, module, "validate")
    trainer.strategy.precision_plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    trainer.strategy.connect(module)
    callback._read(trainer, module)
    fused = torch.optim.Adam(module.parameters(), fused=True)
    with pytest.raises(ConfigError, match="Adam unscales float16 gradients in its step"):
        callback.on_before_optimizer_step(trainer, module, fused)
    callback.on_before_optimizer_step(trainer, module, torch.optim.Adam(module.parameters()))


@pytest.mark.parametrize("options", [{"clip_factor": 0.0}, {"eps": 0.0}])
def test_bad_numbers_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        AdaptiveGradientClipping(**options)  # type: ignore[arg-type]
