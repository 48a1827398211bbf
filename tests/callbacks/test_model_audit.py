from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pl_normkit.auditing import fix_findings
from pl_normkit.callbacks import DropoutPlacement, ModelAudit
from pl_normkit.errors import AuditFailedError, ConfigError, NormkitWarning
from pl_normkit.findings import FixSafety
from pl_normkit.rules import Rule
from pl_normkit.surgery import Changes
from tests.methods.residual_networks import BlockSpec, Net, NetSpec

WRONG = NetSpec((BlockSpec("pre-basic", (2,)),))
RIGHT = NetSpec((BlockSpec("pre-basic", (5,)),))


class Module(pl.LightningModule):
    """The network is an attribute; `style` says how the user wrote the rest."""

    def __init__(self, spec: NetSpec = WRONG, style: str = "attribute", example: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.style = style
        if style != "configure_model":
            net: nn.Module = Net(spec)
            if style == "compiled":
                net = torch.compile(net, backend="eager")  # type: ignore[assignment]
            if style == "list":
                self.nets = nn.ModuleList([net])
            else:
                self.net = net
        if example:
            self.example_input_array = torch.zeros(2, 3, 8, 8)

    def configure_model(self) -> None:
        if self.style == "configure_model" and not hasattr(self, "net"):
            self.net = Net(self.spec)

    def forward(self, x: Tensor) -> Tensor:
        return self.nets[0](x) if self.style == "list" else self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        if self.style == "forward":
            logits = self(x)
        elif self.style == "keyword":
            logits = self.net(x=x)
        else:
            logits = (self.nets[0] if self.style == "list" else self.net)(x)
        return nn.functional.cross_entropy(logits, y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(module: pl.LightningModule, *callbacks: pl.Callback, steps: int = 2, loader: Any = None, **options: Any) -> pl.Trainer:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(16, 3, 8, 8, generator=generator), torch.randint(5, (16,), generator=generator))
    defaults: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(**{**defaults, **options}, max_steps=steps, callbacks=list(callbacks), enable_model_summary=False)
    trainer.fit(module, DataLoader(data, batch_size=4) if loader is None else loader)
    return trainer


@pytest.mark.parametrize(
    ("style", "example", "path"),
    [
        ("attribute", True, "net.blocks.0.drop2"),
        ("attribute", False, "net.blocks.0.drop2"),
        ("forward", False, "net.blocks.0.drop2"),
        ("keyword", False, "net.blocks.0.drop2"),
        ("list", False, "nets.0.blocks.0.drop2"),
        ("configure_model", True, "net.blocks.0.drop2"),
        ("configure_model", False, "net.blocks.0.drop2"),
        ("compiled", False, "net._orig_mod.blocks.0.drop2"),
        ("compiled", True, "net._orig_mod.blocks.0.drop2"),
    ],
)
def test_finds_the_mistake_however_the_module_is_written(style: str, example: bool, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    audit = ModelAudit()
    fit(Module(style=style, example=example), audit)
    assert audit.report is not None
    assert [(finding.code, [place.module for place in finding.places]) for finding in audit.report.findings] == [("NK101", [path])]
    assert capsys.readouterr().out.count("pl_normkit: Module") == 1  # the table, once


def test_an_example_array_that_does_not_fit_gives_way_to_the_first_batch() -> None:
    module, audit = Module(example=True), ModelAudit()
    module.example_input_array = torch.zeros(2, 7, 8, 8)
    fit(module, audit)
    assert audit.report is not None
    assert ([finding.code for finding in audit.report.findings], list(audit.report.notes)) == (["NK101"], [])


def test_a_clean_network_warns_of_nothing() -> None:
    audit = ModelAudit()
    fit(Module(RIGHT), audit)
    assert audit.report is not None
    assert (list(audit.report.findings), list(audit.report.notes)) == ([], [])


@pytest.mark.parametrize("example", [True, False])
def test_training_is_bit_equal_with_and_without(example: bool) -> None:
    def weights(*callbacks: pl.Callback) -> dict[str, Tensor]:
        pl.seed_everything(3, verbose=False)
        module = Module(RIGHT, example=example)
        fit(module, *callbacks, steps=4)
        return module.state_dict()

    plain, audited = weights(), weights(ModelAudit())
    assert list(plain) == list(audited)
    assert all(torch.equal(plain[key], audited[key]) for key in plain)


@pytest.mark.parametrize("example", [True, False])
def test_fail_on_stops_before_the_first_step(example: bool) -> None:
    module = Module(example=example)
    before = {key: value.clone() for key, value in module.state_dict().items() if "num_batches" not in key and "running" not in key}
    with pytest.raises(AuditFailedError, match="NK101"):
        fit(module, ModelAudit(fail_on="warning"))
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())


def test_fail_on_a_higher_severity_goes_on() -> None:
    trainer = fit(Module(example=True), ModelAudit(fail_on="error"))
    assert trainer.global_step == 2


@pytest.mark.parametrize("callback", [ModelAudit(fix="safe"), DropoutPlacement()])
def test_safe_fix_is_made_in_setup_and_reported(callback: ModelAudit) -> None:
    module = Module(example=True)
    keys = list(module.state_dict())
    fit(module, callback)
    assert callback.report is not None
    assert list(callback.report.findings) == []
    assert any("net.blocks.0.op5" in change for change in callback.report.fixed)
    assert list(module.state_dict()) == keys


class WithoutForward(Module):
    forward = pl.LightningModule.forward


@pytest.mark.parametrize("kind", [Module, WithoutForward])
@pytest.mark.parametrize("style", ["attribute", "configure_model", "compiled"])
def test_a_fix_without_inputs_reads_two_training_samples(kind: type[Module], style: str) -> None:
    module, callback = kind(style=style), DropoutPlacement()
    fit(module, callback)
    prefix = "net._orig_mod" if style == "compiled" else "net"
    assert callback.report is not None
    assert (list(callback.report.findings), list(callback.report.notes)) == ([], [])
    assert [change.split(":")[1].strip() for change in callback.report.fixed] == [f"{prefix}.blocks.0.drop2", f"{prefix}.blocks.0.op5"]


def test_fix_without_inputs_in_setup_says_what_it_needs() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([(torch.randn(3, 8, 8), 1)] * 8)

    with pytest.warns(NormkitWarning) as caught:
        fit(Module(), DropoutPlacement(), loader=DataLoader(Stream(), batch_size=4))
    (need,) = [str(warning.message) for warning in caught if issubclass(warning.category, NormkitWarning)]
    assert "needs inputs when the fit is set up: give example_inputs=" in need
    fit(Module(RIGHT), ModelAudit(fix="safe"), loader=DataLoader(Stream(), batch_size=4))  # with nothing to fix it asks for nothing


def test_a_fix_leaves_what_is_silenced() -> None:
    module = Module(example=True)
    callback = ModelAudit(ignore=["NK101"], fix="safe")
    before = {name: type(part) for name, part in module.named_modules()}
    fit(module, callback)
    assert {name: type(part) for name, part in module.named_modules()} == before


def test_a_fix_that_breaks_is_a_note_and_training_goes_on(make_rule: Any) -> None:
    def break_down(model: nn.Module, _: Any, *, filter_fn: Any = None) -> Changes:
        raise RuntimeError("a bug")

    make_rule("NK990", fix=break_down, fix_safety=FixSafety.SAFE)
    with pytest.warns(NormkitWarning) as caught:
        trainer = fit(Module(example=True), ModelAudit(select=["NK990"], fix="safe"), steps=2)
    assert trainer.global_step == 2
    assert any("a fix failed with RuntimeError: a bug" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("measure", [True, False])
def test_findings_have_numbers_when_asked_to(measure: bool) -> None:
    callback = ModelAudit(torch.randn(4, 3, 8, 8), select=["NK101"], measure=measure)
    fit(Module(), callback)
    assert callback.report is not None
    assert bool(callback.report.findings[0].evidence) is measure


@pytest.mark.parametrize("options", [{"fix": "all"}, {"fail_on": "warn"}])
def test_unknown_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options.values()))):
        ModelAudit(**options)


def test_fix_applies_once_over_two_fits() -> None:
    module, callback = Module(example=True), DropoutPlacement()
    fit(module, callback)
    fit(module, callback)
    assert callback.report is not None
    assert list(callback.report.fixed) == []


def test_silenced_by_pattern_and_by_code() -> None:
    for audit in (ModelAudit(ignore=["NK101"]), ModelAudit(per_module_ignore={"net.blocks.*": ["NK1"]})):
        fit(Module(example=True), audit)
        assert audit.report is not None
        assert list(audit.report.findings) == []


def test_unknown_rule_is_an_error_at_once() -> None:
    with pytest.raises(ConfigError, match="did you mean 'dropout-before-batch-norm'"):
        ModelAudit(ignore=["dropout-before-batchnorm"])


def test_configuration_of_the_project_applies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.pl-normkit]\nignore = ["dropout-before-batch-norm"]\n')
    monkeypatch.chdir(tmp_path)
    audit = ModelAudit()
    fit(Module(example=True), audit)
    assert audit.report is not None
    assert list(audit.report.findings) == []
    assert ModelAudit(config=False).selection.ignore == ()


def test_counts_are_logged(tmp_path: Path) -> None:
    fit(Module(example=True), ModelAudit(), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    (metrics,) = tmp_path.rglob("metrics.csv")
    header, row = metrics.read_text().splitlines()[:2]
    assert dict(zip(header.split(","), row.split(","), strict=True))["normkit/warnings"] == "1.0"


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.fc(x) if x.sum() > -1e9 else x[:, :5]


@pytest.mark.parametrize("example", [True, False])
def test_a_network_that_cannot_be_traced_trains_with_one_warning(example: bool) -> None:
    module = Module(example=example)
    module.net = DataDependent()
    with pytest.warns(NormkitWarning, match="read in parts instead") as caught:
        trainer = fit(module, ModelAudit())
    assert trainer.global_step == 2
    assert len([warning for warning in caught if issubclass(warning.category, NormkitWarning)]) == 1


def test_an_internal_error_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(self: Rule, subject: object) -> None:
        raise RuntimeError("boom")

    audit = ModelAudit(select=["NK101"])
    monkeypatch.setattr(Rule, "judge", explode)
    with pytest.warns(NormkitWarning, match="boom"):
        trainer = fit(Module(example=True), audit)
    assert trainer.global_step == 2


def test_other_stages_are_left_alone() -> None:
    audit = ModelAudit()
    module = Module(example=True)
    module.predict_step = lambda batch, batch_idx: module(batch[0])  # type: ignore[method-assign]
    data = DataLoader(TensorDataset(torch.randn(4, 3, 8, 8)), batch_size=4)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[audit], enable_checkpointing=False)
    trainer.predict(module, data)
    assert audit.report is None


def test_two_processes_agree_and_only_rank_zero_speaks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_ddp_rank, args=(str(tmp_path),), nprocs=2)
    outputs = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)]
    assert outputs == ["NK101 True", "NK101 False"]


def _ddp_rank(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29531", WORLD_SIZE="2", LOCAL_RANK=str(rank), NODE_RANK="0")
    torch.set_num_threads(1)
    audit = ModelAudit()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        fit(Module(), audit, strategy="ddp", devices=2)
    assert audit.report is not None
    Path(folder, f"rank{rank}.txt").write_text(f"{audit.report.findings[0].code} {'NK101' in said.getvalue()}")


class RootLoss(Module):
    """Ends its loss in a square root of something that can be 0."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        return (logits * logits).mean().sqrt()


@pytest.mark.parametrize("example", [True, False])
def test_the_loss_is_read_on_the_first_step_alone(example: bool, capsys: pytest.CaptureFixture[str]) -> None:
    audit = ModelAudit(select=["NK401"])
    fit(RootLoss(RIGHT, example=example), audit, steps=3)
    assert audit.report is not None
    assert [finding.code for finding in audit.report.findings] == ["NK401"]
    assert capsys.readouterr().out.count("pl_normkit: RootLoss") == 1


def test_fix_findings_leaves_unsafe_fixes_alone() -> None:
    net, x = Net(WRONG), torch.zeros(2, 3, 8, 8)
    from pl_normkit import audit

    report = audit(net, x)
    assert fix_findings(net, x, []).made == []
    changes = fix_findings(net, x, report.findings)
    assert [change.module for change in changes.made] == ["blocks.0.drop2", "blocks.0.op5"]
    changes.undo()
    assert audit(net, x).findings == report.findings


class LateCritic(pl.LightningModule):
    """A second network, with a finding of its own, joins from one epoch on."""

    def __init__(self, joins: int) -> None:
        super().__init__()
        self.joins = joins
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: Any, index: int) -> Tensor:
        out = self.net(batch[0])
        if self.current_epoch < self.joins:
            return out.square().mean()
        return self.critic(out).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


@pytest.mark.parametrize("joins", [0, 1, 2, 9])
def test_a_network_that_joins_late_is_read_then(joins: int) -> None:
    module, audit = LateCritic(joins), ModelAudit(select=["NK015"])
    data = DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=4, accelerator="cpu", callbacks=[audit], **quiet)
    trainer.fit(module, data)
    assert audit.report is not None
    assert {finding.code for finding in audit.report.findings} == ({"NK015"} if joins < 4 else set())
    assert [hook for part in module.modules() for hook in (*part._forward_pre_hooks, *part._forward_hooks)] == []
