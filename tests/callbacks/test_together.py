"""Subsets and orders of our callbacks with Lightning's own, on modules as people write them: the run goes on, and is audited."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import BaseFinetuning, EMAWeightAveraging, GradientAccumulationScheduler, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pl_normkit.callbacks import (
    AtrousRates,
    DropoutPlacement,
    GammaDecay,
    GaussianBias,
    ModelAudit,
    NaNGuard,
    PositionalVariance,
    ScaleEqualization,
    StochasticPooling,
)
from pl_normkit.errors import ConfigError, NormkitWarning

pytestmark = pytest.mark.filterwarnings("ignore")

OURS = (
    AtrousRates,
    DropoutPlacement,
    GammaDecay,
    GaussianBias,
    ModelAudit,
    NaNGuard,
    PositionalVariance,
    ScaleEqualization,
    StochasticPooling,
)


@dataclass
class Sample:
    image: Tensor
    label: Tensor


class Images(Dataset[Any]):
    """Eight images with labels, in the form that `style` asks for."""

    def __init__(self, form: str) -> None:
        self.form = form

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, 8, 8, generator=generator), torch.randint(4, (), generator=generator)

    def collate(self, samples: list[tuple[Tensor, Tensor]]) -> Any:
        images, labels = (torch.stack(part) for part in zip(*samples, strict=True))
        forms = {
            "tuple": (images, labels),
            "dict": {"picture": images, "truth": labels},
            "dataclass": Sample(images, labels),
            "nested": [{"views": [images, images + 1]}, (labels,)],
        }
        return forms[self.form]


def parts_of(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Sample):
        return batch.image, batch.label
    if isinstance(batch, dict):
        return batch["picture"], batch["truth"]
    if isinstance(batch[0], dict):
        return batch[0]["views"][0], batch[1][0]
    return batch[0], batch[1]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    )


class Module(pl.LightningModule):
    """The network is an attribute; nobody wrote a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.counted: list[int] = []

    def logits(self, images: Tensor) -> Tensor:
        out: Tensor = self.net(images)
        return out

    def training_step(self, batch: Any, index: int) -> Any:
        self.counted.append(index)
        images, labels = parts_of(batch)
        return F.cross_entropy(self.logits(images), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-3, weight_decay=0.01)


class WithForward(Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)

    def logits(self, images: Tensor) -> Tensor:
        out: Tensor = self(input=images)
        return out


class Late(Module):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = network()


class BuiltInSetup(Late):
    configure_model = pl.LightningModule.configure_model

    def setup(self, stage: str) -> None:
        Late.configure_model(self)


class NoneFirst(Module):
    def training_step(self, batch: Any, index: int) -> Any:
        loss = super().training_step(batch, index)
        return None if index == 0 else loss


class Manual(Module):
    """Two optimizers by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.judge = nn.Linear(4, 1)

    def training_step(self, batch: Any, index: int) -> Any:
        self.counted.append(index)
        first, second = self.optimizers()  # type: ignore[misc]
        images, labels = parts_of(batch)
        logits = self.net(images)
        first.zero_grad()
        self.manual_backward(F.cross_entropy(logits, labels))
        first.step()
        second.zero_grad()
        self.manual_backward(self.judge(logits.detach()).square().mean())
        second.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(part.parameters(), 1e-3, weight_decay=0.01) for part in (self.net, self.judge)]


STYLES: tuple[type[Module], ...] = (Module, WithForward, Late, BuiltInSetup, NoneFirst, Manual)


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        if hasattr(pl_module, "net"):
            self.freeze(pl_module.net[0], train_bn=True)  # type: ignore[index]

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Any) -> None:
        return


LIGHTNINGS: dict[str, Any] = {
    "ema": lambda: EMAWeightAveraging(decay=0.5),
    "swa": lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=1),
    "finetuning": Unfreeze,
    "accumulation": lambda: GradientAccumulationScheduler({0: 2}),
}


def suits(name: str, style: type[Module]) -> bool:
    """Lightning's own limits: accumulation and averages of the weights want automatic optimization, averages a network that is there."""
    if style is Manual:
        return False
    return name not in ("ema", "swa") or style not in (Late, BuiltInSetup)


def fit(module: pl.LightningModule, callbacks: list[Any], folder: Path, form: str = "tuple", **options: Any) -> pl.Trainer:
    data = Images(form)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(**(quiet | {"max_epochs": 2, "accelerator": "cpu", "default_root_dir": folder} | options), callbacks=callbacks)
    trainer.fit(module, DataLoader(data, batch_size=4, collate_fn=data.collate))
    return trainer


@settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate)
)
@given(
    ours=st.lists(st.sampled_from(OURS), unique=True, min_size=1, max_size=5),
    lightnings=st.lists(st.sampled_from(sorted(LIGHTNINGS)), unique=True, max_size=2),
    style=st.sampled_from(STYLES),
    form=st.sampled_from(("tuple", "dict", "dataclass", "nested")),
    order=st.randoms(use_true_random=False),
)
def test_subsets_and_orders(
    tmp_path_factory: Any, ours: list[Any], lightnings: list[str], style: type[Module], form: str, order: Any
) -> None:
    callbacks = [kind() for kind in ours] + [LIGHTNINGS[name]() for name in lightnings if suits(name, style)]
    order.shuffle(callbacks)
    module = style()
    trainer = fit(module, callbacks, tmp_path_factory.mktemp("run"), form)
    assert trainer.global_step > 0
    extra = [0, 1] if "swa" in lightnings and suits("swa", style) else []  # for the batch norms of the average
    assert module.counted == [0, 1, 0, 1, *extra]  # a rehearsed step leaves nothing
    assert [name for name, value in vars(module).items() if callable(value) and not isinstance(value, nn.Module)] == []
    for callback in callbacks:
        if isinstance(callback, ModelAudit):
            assert callback.report is not None
            assert callback.report.failures == []


def test_an_average_that_was_copied_too_early_is_refused_at_setup(tmp_path: Path) -> None:
    from tests.callbacks.biased_runs import network as attention_network

    class Attending(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = attention_network()

    ema, bias = EMAWeightAveraging(decay=0.5), GaussianBias()
    with pytest.raises(ConfigError, match="EMAWeightAveraging copied the network before GaussianBias added to it"):
        fit(Attending(), [ema, bias], tmp_path)


def test_nothing_is_found_once_for_each_remedy(tmp_path: Path) -> None:
    module = Module()
    module.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, [AtrousRates(), GaussianBias(), ScaleEqualization(), StochasticPooling()], tmp_path, form="dict", max_epochs=1)
    told = [str(warning.message) for warning in caught if issubclass(warning.category, NormkitWarning)]
    assert [text.partition(" ")[0] for text in told] == ["AtrousRates", "GaussianBias", "ScaleEqualization", "StochasticPooling"]
    assert all("changes nothing: it looked for" in text for text in told)


def test_callbacks_serve_the_other_lightning(tmp_path: Path) -> None:
    import pytorch_lightning as other

    class Other(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.counted: list[int] = []

        logits, training_step, configure_optimizers = Module.logits, Module.training_step, Module.configure_optimizers

    data = Images("dict")
    for kind in OURS:
        callback, module = kind(), Other()
        assert isinstance(callback, other.Callback)
        assert isinstance(callback, pl.Callback)
        trainer = other.Trainer(
            callbacks=callback, max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data, batch_size=4, collate_fn=data.collate))
        assert (trainer.global_step, module.counted) == (2, [0, 1])


@pytest.mark.parametrize("style", [Module, Manual, NoneFirst])
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_steps_are_audited_from_outside(style: type[Module], whole: bool, tmp_path: Path) -> None:
    module, audit = style(), ModelAudit()
    if not whole:
        module.net.compile(backend="eager")
    fit(torch.compile(module, backend="eager") if whole else module, [audit, StochasticPooling()], tmp_path, max_epochs=1)  # type: ignore[arg-type]
    assert audit.report is not None
    assert list(audit.report.notes) == []
