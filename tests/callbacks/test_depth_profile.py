"""The callback in real fits."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import DepthProfile
from pl_normkit.errors import ConfigError, NormkitWarning
from pl_normkit.methods.depth_profile import measure_depth_profile
from pl_normkit.nn import CausalTransformer


class Blocks(nn.Module):
    """Four blocks; `leak` scales the gradient that the first one gets."""

    def __init__(self, leak: float = 1.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4))
        self.leak = leak

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            branch = block(x)
            if index == 0:
                branch = self.leak * branch + (1.0 - self.leak) * branch.detach()
            x = x + branch
        return x


class Module(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(net: nn.Module, callback: DepthProfile | None, folder: Path, steps: int = 8, **options: Any) -> Module:
    torch.manual_seed(0)
    module = Module(net)
    data = DataLoader(TensorDataset(torch.randn(steps * 4, 5, 8)), batch_size=4)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        log_every_n_steps=1,
        logger=CSVLogger(folder, flush_logs_every_n_steps=1),
        callbacks=[] if callback is None else [callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, data)
    return module


def logged(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.rglob("metrics.csv")
    return [row for row in csv.DictReader(path.read_text().splitlines()) if row.get("depth/variance_last")]


def of_ours(caught: pytest.WarningsRecorder) -> int:
    return sum(issubclass(warning.category, NormkitWarning) for warning in caught)


def build(leak: float = 1.0) -> Blocks:
    torch.manual_seed(3)
    return Blocks(leak)


def test_the_numbers_are_logged_and_training_is_as_without(tmp_path: Path) -> None:
    callback = DepthProfile(every_n_steps=4, gradient_every=2)
    module = fit(build(), callback, tmp_path / "with")
    plain = fit(build(), None, tmp_path / "without")
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    rows = logged(tmp_path / "with")
    assert [row["step"] for row in rows] == ["1", "5"]
    assert callback.profile is not None
    assert float(rows[-1]["depth/variance_last"]) == pytest.approx(callback.profile.additions[-1].variance)
    assert float(rows[-1]["depth/largest"]) == pytest.approx(max(row.largest for row in callback.profile.additions))
    assert (rows[0]["depth/gradient_ratio"], callback.is_stuck) == ("", False)
    assert float(rows[1]["depth/gradient_ratio"]) > 0.05
    assert not any(child._forward_pre_hooks for child in module.modules())


def test_the_profile_is_that_of_the_plain_function(tmp_path: Path) -> None:
    callback = DepthProfile(every_n_steps=100)
    module = fit(build(), callback, tmp_path, steps=1)
    torch.manual_seed(0)
    assert callback.profile == measure_depth_profile(module.net, torch.randn(4, 5, 8))


def test_a_stuck_run_is_named_once(tmp_path: Path) -> None:
    callback = DepthProfile(gradient_every=1)
    with pytest.warns(NormkitWarning, match="NK901") as caught:
        fit(build(leak=1e-3), callback, tmp_path)
    assert (of_ours(caught), callback.is_stuck) == (1, True)


class Attending(L.LightningModule):
    """A decoder whose queries are multiplied by a thousand at a step: its attention collapses; the loss with it, where it `spikes`."""

    def __init__(self, spikes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = CausalTransformer(16, width=8, depth=2, heads=2, length=8)
        self.spikes = spikes

    def training_step(self, batch: Any, index: int) -> Tensor:
        if index == 6:
            for block in self.net.blocks:
                block.attn.query.weight.data *= 1000.0
        scale = 50.0 if self.spikes and index == 6 else 1.0
        return scale * self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


@pytest.mark.parametrize("spikes", [True, False])
def test_collapsed_attention_is_named_once_where_the_loss_spikes(spikes: bool, tmp_path: Path) -> None:
    callback = DepthProfile(every_n_steps=1, panels=("entropy",), gradient_every=1)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    data = DataLoader(TensorDataset(torch.arange(8 * 8).reshape(8, 8) % 16))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Attending(spikes), data)
    ours = [str(warning.message) for warning in caught if issubclass(warning.category, NormkitWarning)]
    assert (["Attention in blocks.0, blocks.1 has collapsed" in text for text in ours], callback.has_collapsed) == ([True] * spikes, spikes)


def test_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    fit(build(), DepthProfile(every_n_steps=2), tmp_path, accumulate_grad_batches=2)
    assert [row["step"] for row in logged(tmp_path)] == ["0", "2"]


def test_a_network_without_additions_is_one_warning(tmp_path: Path) -> None:
    with pytest.warns(NormkitWarning, match="no residual addition") as caught:
        fit(nn.Linear(8, 8), DepthProfile(every_n_steps=1), tmp_path)
    assert of_ours(caught) == 1


def test_autocast_is_that_of_the_run(tmp_path: Path) -> None:
    callback = DepthProfile()
    fit(build(), callback, tmp_path, steps=1, precision="bf16-mixed")
    exact = DepthProfile()
    fit(build(), exact, tmp_path / "exact", steps=1)
    assert callback.profile is not None
    assert exact.profile is not None
    assert callback.profile.additions[-1].variance != exact.profile.additions[-1].variance
    assert callback.profile.additions[-1].variance == pytest.approx(exact.profile.additions[-1].variance, rel=0.02)


@pytest.mark.parametrize(("options", "message"), [({"every_n_steps": 0}, "at least 1"), ({"panels": ["angel"]}, "did you mean 'angle'")])
def test_bad_arguments_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with warnings.catch_warnings(), pytest.raises(ConfigError, match=message):
        DepthProfile(**options)
