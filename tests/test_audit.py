from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pl_normkit import audit
from pl_normkit.auditing import audit_subject, fix_findings
from pl_normkit.errors import ConfigError, NothingMatchedError
from pl_normkit.findings import FixSafety, Note, NoteKind, Place, Severity
from pl_normkit.rules import Needs, Observation, Subject
from pl_normkit.selection import Selection
from pl_normkit.surgery import Changes, Replace, apply_edits

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Caching(nn.Module):
    """Keeps tensors, counters and containers of its own from every forward pass, and draws from every generator."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("seen", torch.zeros(()))
        self.average = torch.zeros(2)
        self.calls = 0
        self.last: Tensor | None = None
        self.history: dict[str, list[Any]] = {"shapes": []}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.average.add_(1)
        self.history["shapes"].append(x.shape)
        x = x * (1 + 0 * random.random()) + float(np.random.rand()) * 0  # noqa: NPY002
        self.last = self.net(x + torch.rand_like(x))
        return self.last


def bits(tensor: Tensor | None) -> Any:
    return None if tensor is None else (id(tensor), "meta" if tensor.is_meta else tensor.detach().contiguous().numpy().tobytes())


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return bits(value)
    if isinstance(value, dict):
        return id(value), [(key, plain(inner)) for key, inner in value.items()]
    return (id(value), [plain(inner) for inner in value]) if isinstance(value, (list, tuple)) else (id(value), repr(value))


def snapshot(model: nn.Module) -> Any:
    """Parameters, buffers, gradients, modes, hooks and plain attributes, and every random number generator."""
    tree = [(name, plain(vars(module))) for name, module in model.named_modules(remove_duplicate=False)]
    gradients = [(name, bits(parameter.grad), parameter.requires_grad) for name, parameter in model.named_parameters()]
    numpy_state = np.random.get_state()  # noqa: NPY002
    generators = (torch.get_rng_state().numpy().tobytes(), random.getstate(), numpy_state[1].tobytes(), numpy_state[2:])
    return tree, gradients, generators


def with_gradients(model: nn.Module) -> nn.Module:
    model.train()(X).sum().backward()
    return model


def shake(subject: Subject) -> Iterator[Observation]:
    """A rule with the worst manners, which fails in the end."""
    assert subject.model is not None
    random.random()
    torch.rand(3)
    np.random.rand(3)  # noqa: NPY002
    subject.model.train(not subject.model.training)
    subject.model.left_behind = True
    with torch.no_grad():
        for buffer in subject.model.buffers():
            buffer.add_(1)
    yield Observation("so far so good", [Place("")], "nothing")
    raise RuntimeError("the rule broke")


@pytest.mark.parametrize("broken", [False, True], ids=["rules", "a rule that raises"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("caching", [False, True], ids=["plain", "caching"])
def test_an_audit_changes_nothing(faulty_net: nn.Module, make_rule: Any, caching: bool, training: bool, broken: bool) -> None:
    model = with_gradients(Caching(faulty_net) if caching else faulty_net).train(training)
    faulty_net.layer1.drop.train(not training)
    if broken:
        make_rule("NK990", shake)
    before = snapshot(model)
    report = audit(model, X, select=["ALL"])
    assert snapshot(model) == before
    assert [finding.code for finding in report.findings if finding.code == "NK101"] == ["NK101"]
    assert len(report.notes) == broken


def test_an_audit_that_cannot_trace_changes_nothing(faulty_net: nn.Module) -> None:
    model = with_gradients(Caching(faulty_net))
    before = snapshot(model)
    assert len(audit(model, torch.zeros(2, 5)).notes) == 1
    assert snapshot(model) == before


def test_an_audit_of_a_meta_model_changes_nothing_and_measures_nothing(faulty_net: nn.Module) -> None:
    model = Caching(faulty_net).to("meta")
    before = snapshot(model)
    report = audit(model, X.to("meta"))
    assert snapshot(model) == before
    assert [(finding.code, finding.evidence) for finding in report.findings] == [("NK101", ())]


def test_a_model_on_meta_takes_inputs_from_anywhere(faulty_net: nn.Module) -> None:
    assert [finding.code for finding in audit(faulty_net.to("meta"), X).findings] == ["NK101"]


def test_measuring_can_be_switched_off(faulty_net: nn.Module) -> None:
    measured, unmeasured = audit(faulty_net, X).findings[0], audit(faulty_net, X, measure=False).findings[0]
    assert [item.what for item in measured.evidence] == ["variance of the input of layer1.bn2, eval over train"]
    assert (unmeasured.evidence, unmeasured.fingerprint) == ((), measured.fingerprint)


def test_two_audits_say_the_same(faulty_net: nn.Module) -> None:
    assert audit(faulty_net, X) == audit(faulty_net, X)


def test_a_rule_that_fails_becomes_a_note_and_the_others_run(faulty_net: nn.Module, make_rule: Any) -> None:
    make_rule("NK990", shake, name="shaky-rule")
    report = audit(faulty_net, X)
    assert [finding.code for finding in report.findings] == ["NK101"]
    assert len(report.notes) == 1
    for part in ("NK990 (shaky-rule)", "RuntimeError: the rule broke", "report it", 'ignore=["NK990"]'):
        assert part in str(report.notes[0])
    assert audit(faulty_net, X, ignore=["NK990"]).notes == []


def test_a_model_that_cannot_be_traced_becomes_a_note_and_other_rules_run(faulty_net: nn.Module, make_rule: Any) -> None:
    make_rule("NK990")
    report = audit(faulty_net, torch.zeros(2, 5))
    assert [finding.code for finding in report.findings] == ["NK990"]
    assert len(report.notes) == 1
    assert "FaultyNet cannot be read by torch.export with inputs (2, 5) torch.float32" in str(report.notes[0])


def test_without_inputs_only_rules_that_need_no_trace_run(faulty_net: nn.Module, make_rule: Any) -> None:
    make_rule("NK990")
    report = audit(faulty_net)
    assert [finding.code for finding in report.findings] == ["NK990"]
    assert report.notes == [Note("rules that need the traced model did not run: there are no example inputs", NoteKind.NOT_RUN)]


@pytest.mark.parametrize(
    ("need", "given"),
    [
        (Needs.LOSS, {"loss": torch.zeros(())}),
        (Needs.OPTIMIZERS, {"optimizers": torch.optim.SGD([torch.zeros(1)], lr=0.1)}),
        (Needs.OPTIMIZERS, {"optimizers": [torch.optim.SGD([torch.zeros(1)], lr=0.1)]}),
    ],
)
def test_a_rule_runs_when_what_it_needs_is_there(make_rule: Any, need: Needs, given: dict[str, Any]) -> None:
    make_rule("NK990", needs=(Needs.MODEL, need))
    model = nn.Linear(1, 1)
    assert audit(model, select=["NK990"]).findings == []
    assert [finding.code for finding in audit(model, select=["NK990"], **given).findings] == ["NK990"]


def test_a_loss_alone_is_a_subject(make_rule: Any) -> None:
    make_rule("NK990", needs=(Needs.LOSS,))
    report = audit_subject(Subject(loss=torch.zeros(())), Selection(["NK990"]))
    assert ([finding.code for finding in report.findings], report.subject) == (["NK990"], "loss")


def test_the_most_severe_findings_come_first(make_rule: Any) -> None:
    make_rule("NK990", severity=Severity.NOTE)
    make_rule("NK991", severity=Severity.ERROR)
    make_rule("NK992", severity=Severity.WARNING)
    make_rule("NK993", severity=Severity.ERROR)
    codes = [finding.code for finding in audit(nn.Linear(1, 1), select=["NK99"]).findings]
    assert codes == ["NK991", "NK993", "NK992", "NK990"]


def test_one_trace_serves_all_rules(faulty_net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[nn.Module] = []
    original = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda model, *a, **k: traced.extend(model.children()) or original(model, *a, **k))
    audit(faulty_net, X, select=["ALL"])
    assert traced == [faulty_net]


def test_selection_and_silence_reach_the_rules(faulty_net: nn.Module) -> None:
    assert audit(faulty_net, X, ignore=["NK101"]).findings == []
    assert audit(faulty_net, X, select=["NK104"]).findings == []
    (left,) = audit(faulty_net, X, per_module_ignore={"layer1.*": ["NK101"]}).findings
    assert [place.module for place in left.places] == ["layer2.drop"]


@pytest.mark.parametrize(
    "options", [{"select": ["NK110"]}, {"ignore": ["NK110"]}, {"per_module_ignore": {"layer9.*": ["NK101"]}}, {"ignore": "NK101"}]
)
def test_wrong_options_are_refused(faulty_net: nn.Module, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        audit(faulty_net, X, **options)


class Wrapper(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


def test_paths_are_relative_to_the_root(faulty_net: nn.Module) -> None:
    subject = Subject(model=faulty_net, root=Wrapper(Wrapper(faulty_net)), example_inputs=X)
    report = audit_subject(subject, Selection(per_module_ignore={"network.network.layer1.*": ["NK101"]}))
    assert [place.module for place in report.findings[0].places] == ["network.network.layer2.drop"]
    assert report.subject == "Wrapper"


def test_the_model_itself_has_the_path_that_the_root_gives_it(make_rule: Any) -> None:
    make_rule("NK990")
    model = nn.Linear(1, 1)
    report = audit_subject(Subject(model=model, root=Wrapper(model)), Selection(["NK990"]))
    assert [place.module for place in report.findings[0].places] == ["network"]


# Fixing.


def switch_off(model: nn.Module, _: Any, *, filter_fn: Any = None) -> Changes:
    return apply_edits(model, [Replace(name, nn.Identity(), "off") for name, m in model.named_modules() if isinstance(m, nn.Dropout)])


def test_a_fix_that_two_findings_share_is_made_once(make_rule: Any) -> None:
    calls: list[int] = []

    def fix(model: nn.Module, inputs: Any, *, filter_fn: Any = None) -> Changes:
        calls.append(inputs)
        return switch_off(model, inputs)

    make_rule("NK990", fix=fix, fix_safety=FixSafety.SAFE)
    make_rule("NK991", fix=fix, fix_safety=FixSafety.SAFE)
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
    old = model[1]
    changes = fix_findings(model, 7, audit(model, select=["NK99"]).findings)
    assert (calls, str(changes), type(model[1])) == ([7], "1: off", nn.Identity)
    changes.undo()
    assert model[1] is old


@pytest.mark.parametrize("allowed", [True, False])
def test_an_unsafe_fix_waits_to_be_allowed(make_rule: Any, allowed: bool) -> None:
    make_rule("NK990", fix=switch_off, fix_safety=FixSafety.UNSAFE)
    model = nn.Sequential(nn.Dropout(0.5))
    changes = fix_findings(model, None, audit(model, select=["NK990"]).findings, allow_unsafe=allowed)
    assert (bool(changes), type(model[0])) == ((True, nn.Identity) if allowed else (False, nn.Dropout))


def test_a_fix_that_finds_nothing_is_listed_as_skipped(make_rule: Any) -> None:
    def fix(model: nn.Module, _: Any, *, filter_fn: Any = None) -> Changes:
        raise NothingMatchedError("nothing to place")

    make_rule("NK990", fix=fix, fix_safety=FixSafety.SAFE)
    model = nn.Linear(1, 1)
    changes = fix_findings(model, None, audit(model, select=["NK990"]).findings)
    assert (changes.made, [change.what for change in changes.skipped]) == ([], ["nothing to place"])


def test_a_fix_that_breaks_leaves_the_model_as_it_was(make_rule: Any) -> None:
    def break_down(model: nn.Module, _: Any, *, filter_fn: Any = None) -> Changes:
        raise RuntimeError("a bug")

    make_rule("NK990", fix=switch_off, fix_safety=FixSafety.SAFE)
    make_rule("NK991", fix=break_down, fix_safety=FixSafety.SAFE)
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
    old = model[1]
    with pytest.raises(RuntimeError, match="a bug"):
        fix_findings(model, 7, audit(model, select=["NK99"]).findings)
    assert model[1] is old


WAYS = {
    "as it is": lambda net: net,
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_silenced_is_not_mended(way: str, faulty_net: nn.Module) -> None:
    model, x = WAYS[way](faulty_net), torch.randn(4, 3, 16, 16)
    everything = {place.module for finding in audit(model, x).findings for place in finding.places}
    kept = sorted(everything)[0]
    report = audit(model, x, per_module_ignore={kept: ["NK1"]})
    old = faulty_net.get_submodule(kept)
    changes = fix_findings(model, x, report.findings)
    assert changes
    assert faulty_net.get_submodule(kept) is old
    assert kept in {place.module for finding in audit(model, x).findings for place in finding.places}
    changes.undo()
    assert {place.module for finding in audit(model, x).findings for place in finding.places} == everything


def test_inputs_without_variance_measure_nothing(faulty_net: nn.Module) -> None:
    """Behind zeros a batch norm sees dropout's noise alone in training and nothing in evaluation: a ratio near 0 that means nothing."""
    report = audit(faulty_net, torch.zeros(2, 3, 8, 8))
    assert [(finding.code, finding.evidence) for finding in report.findings] == [("NK101", ())]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning", "ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_scripted_model_becomes_a_note() -> None:
    report = audit(torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1))), torch.zeros(2, 3))
    assert len(report.notes) == 1
    assert "cannot be read by torch.export" in str(report.notes[0])


def test_a_dict_that_does_not_fit_forward_says_how_a_dict_is_passed(faulty_net: nn.Module) -> None:
    (note,) = audit(faulty_net, {"image": torch.zeros(2, 3, 8, 8)}).notes
    assert ("write ({...},)" in str(note), "inspect.py" in str(note)) == (True, False)


def test_shapes_alone_are_enough_for_a_model_off_the_meta_device(faulty_net: nn.Module) -> None:
    report = audit(faulty_net, X.to("meta"), measure=False)
    assert (report.notes, report.findings) == ([], audit(faulty_net, X, measure=False).findings)


@pytest.mark.parametrize(
    ("argument", "given", "seen"),
    [
        ("model", nn.Linear, "the class Linear"),
        ("model", "resnet18", "a str"),
        ("loss", nn.MSELoss(), "a MSELoss"),
        ("loss", 3.0, "a float"),
        ("loss", torch.ones(2, 3), "a Tensor of shape (2, 3)"),
        ("optimizers", torch.optim.SGD, "the class SGD"),
        ("optimizers", [torch.zeros(2)], "a list"),
        ("optimizers", nn.Linear(2, 2).parameters(), "a generator"),
        ("loaders", ([],), "a tuple"),
    ],
)
def test_an_argument_of_another_kind_is_refused_by_name(argument: str, given: Any, seen: str) -> None:
    arguments = {"model": nn.Linear(2, 2), "example_inputs": torch.zeros(1, 2), argument: given}
    with pytest.raises(ConfigError) as refused:
        audit(**arguments)
    assert (refused.value.where, refused.value.evidence) == (f"{argument}=", seen)


def test_a_loss_whose_backward_has_run_is_a_note() -> None:
    model, inputs = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), torch.ones(4, 2)
    loss = model(inputs).square().mean()
    assert audit(model, inputs, loss=loss).notes == []
    loss.backward()
    assert [note.kind for note in audit(model, inputs, loss=loss).notes] == [NoteKind.NOT_RUN]
