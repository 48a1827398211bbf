"""The callback in real fits."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit.callbacks import ModelAudit, PositionalVariance
from pl_normkit.errors import ConfigError, NormkitWarning
from pl_normkit.methods.positional_variance import measure_positional_variance


class TinyViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.where = nn.Parameter(torch.randn(1, 16, 16) * 0.02)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(images).flatten(2).transpose(1, 2) + self.where).mean(1))


class Module(L.LightningModule):
    """`contrast` stands for an augmentation: it acts on training batches after the loader."""

    def __init__(self, net: nn.Module | None = None, contrast: float = 1.0) -> None:
        super().__init__()
        self.net = TinyViT() if net is None else net
        self.contrast = contrast

    def on_after_batch_transfer(self, batch: Any, _: int) -> Any:
        images, labels = batch
        return images * (self.contrast if self.trainer.training else 1.0), labels

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def step(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(count: int = 64) -> Any:
    return DataLoader(TensorDataset(torch.randn(count, 3, 16, 16), torch.randint(0, 4, (count,))), batch_size=8)


def fit(module: L.LightningModule, callback: PositionalVariance, **options: Any) -> list[str]:
    """Train; the warnings that were given."""
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **options}
    options = {"enable_model_summary": False, "accelerator": "cpu", **options}
    trainer = L.Trainer(callbacks=[callback], **options)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.fit(module, loader(), loader())
    return [str(warning.message) for warning in seen if issubclass(warning.category, NormkitWarning)]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_sanity_val_steps": 0}, {"num_sanity_val_steps": 0, "max_epochs": 2}, {"limit_train_batches": 2, "max_epochs": 2}],
    ids=["sanity check", "one epoch", "two epochs", "short epochs"],
)
@pytest.mark.parametrize("has_example", [True, False])
def test_a_shift_is_seen_and_warned_of_once(options: dict[str, Any], has_example: bool) -> None:
    module, callback = Module(contrast=0.7), PositionalVariance(batches=4)
    if has_example:
        module.example_input_array = torch.zeros(2, 3, 16, 16)
    given = fit(module, callback, **options)
    assert callback.rho == pytest.approx(0.5, abs=0.06)  # 0.49, and the bias of the projection
    assert len(given) == 1
    assert "is 0." in given[0]


def test_quiet_where_training_is_like_validation() -> None:
    callback = PositionalVariance(batches=8)
    assert fit(Module(), callback, num_sanity_val_steps=8) == []
    assert callback.rho == pytest.approx(1.0, abs=0.05)


def test_it_says_what_the_probe_says() -> None:
    torch.manual_seed(1)
    module, callback = Module(contrast=0.5), PositionalVariance(batches=8)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    train, validation = loader(), loader()
    trainer = L.Trainer(
        callbacks=[callback],
        max_epochs=1,
        num_sanity_val_steps=8,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    with pytest.warns(NormkitWarning, match="augmentation changes how much positions weigh"):
        trainer.fit(module, train, validation)
    report = measure_positional_variance(module.net, ((images * 0.5, y) for images, y in train), validation)
    assert callback.rho == pytest.approx(report.rho, rel=1e-5)


def test_rho_is_logged(tmp_path: Any) -> None:
    logger = CSVLogger(tmp_path)
    callback = PositionalVariance(batches=2)
    fit(Module(contrast=0.5), callback, logger=logger)
    logger.save()
    assert "normkit/positional_rho" in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()


def _draw(*_: Any) -> None:
    """A model that draws numbers."""
    torch.rand(())


def test_training_is_the_same_with_and_without() -> None:
    weights = []
    for callbacks in ([], [PositionalVariance(batches=2)]):
        L.seed_everything(0, verbose=False)
        module, data = Module(), loader()
        module.net.embed.register_forward_hook(_draw)
        options: dict[str, Any] = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        L.Trainer(callbacks=callbacks, enable_model_summary=False, accelerator="cpu", **options).fit(module, data, data)
        weights.append({name: value.clone() for name, value in module.state_dict().items()})
        assert len(module.net.embed._forward_hooks) == 1
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


class Convolutions(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))


class Unreadable(TinyViT):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) if float(images.sum()) < 1e9 else images


@pytest.mark.parametrize("build", [Convolutions, Unreadable])
def test_a_model_that_cannot_be_measured_is_one_warning(build: Any) -> None:
    callback = PositionalVariance(batches=2)
    (warning,) = fit(Module(build()), callback)
    assert warning.startswith("PositionalVariance measures nothing")
    assert callback.rho is None


@pytest.mark.parametrize(("build", "count"), [(Convolutions, 0), (Unreadable, 1)])
def test_a_network_without_positions_may_pass_in_silence(build: Any, count: int) -> None:
    assert len(fit(Module(build()), PositionalVariance(batches=2, required=False))) == count


def test_a_compiled_network_is_measured_in_front_of_its_graph() -> None:
    """Also where it was compiled before: it then runs without asking for hooks."""
    callback, net = PositionalVariance(batches=4), torch.compile(TinyViT(), backend="eager")
    assert isinstance(net, nn.Module)
    for training in (True, False):
        nn.functional.cross_entropy(net.train(training)(torch.randn(8, 3, 16, 16)), torch.zeros(8, dtype=torch.long)).backward()
        with torch.no_grad():
            net(torch.randn(8, 3, 16, 16))
    (warning,) = fit(Module(net, contrast=0.5), callback)
    assert "is 0.2" in warning


def test_ranks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks like this one change nothing; the reduction runs once, on the sums."""
    calls: list[Tensor] = []

    def reduce(_: Any, sums: Tensor, **__: Any) -> Tensor:
        calls.extend([sums] if sums.dim() else [])  # Lightning's own metrics come here too
        return sums * 3

    callback = PositionalVariance(batches=2)
    monkeypatch.setattr("lightning.pytorch.strategies.SingleDeviceStrategy.reduce", reduce)
    fit(Module(contrast=0.5), callback)
    assert callback.rho == pytest.approx(0.26, abs=0.04)
    assert [sums.shape for sums in calls] == [(2, 8)]


def test_validation_alone_is_left_alone() -> None:
    module = Module()
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    module.net.embed.register_forward_hook(lambda *_: hooks.append(len(module.net.embed._forward_hooks)))
    hooks: list[int] = []
    L.Trainer(callbacks=[PositionalVariance()], **options).validate(module, loader(), verbose=False)
    assert set(hooks) == {1}


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"batches": 0}])
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PositionalVariance(**options)


def test_model_audit_hands_the_loaders_over() -> None:
    """Rules on data run on the first step, from settings alone: no batch is drawn."""
    from timm.data import Mixup

    class Mixing(Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixup = Mixup(0.8)

    callback = ModelAudit(select=["NK7"], config=False)
    L.Trainer(
        callbacks=[callback],
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    ).fit(Mixing(), loader(), loader())
    assert callback.report is not None
    assert [finding.code for finding in callback.report.findings] == ["NK701"]
    assert callback.report.findings[0].places[0].module == "net.where"


def test_a_resumed_run_measures_anew(tmp_path: Any) -> None:
    """It keeps nothing in the checkpoint; the data of the run that goes on are what counts."""
    options: dict[str, Any] = {"default_root_dir": tmp_path, "logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    options |= {"enable_model_summary": False, "enable_checkpointing": False}
    callback = PositionalVariance(batches=4)
    first = L.Trainer(callbacks=[callback], max_epochs=1, **options)
    with pytest.warns(NormkitWarning, match="augmentation changes"):
        first.fit(Module(contrast=0.5), loader(), loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    assert callback.rho == pytest.approx(0.26, abs=0.04)
    for again in (callback, PositionalVariance(batches=4)):
        second = L.Trainer(callbacks=[again], max_epochs=2, **options)
        with pytest.warns(NormkitWarning, match=r"is 0\.5"):
            second.fit(Module(contrast=0.7), loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
        assert again.rho == pytest.approx(0.5, abs=0.06)
    with pytest.warns(NormkitWarning, match="no validation data"):
        L.Trainer(callbacks=[callback], max_epochs=1, limit_val_batches=0, **options).fit(Module(contrast=0.5), loader(), loader())
    assert callback.rho is None  # nothing to compare with, and nothing left of the run before
