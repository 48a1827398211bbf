"""The parts of a run, judged as each becomes known, without Lightning."""

from __future__ import annotations

import torch
from torch import nn

from pl_normkit import RunAudit, audit
from pl_normkit.findings import NoteKind
from pl_normkit.selection import Selection
from tests.methods.residual_networks import BlockSpec, Net, NetSpec

WRONG, RIGHT = NetSpec((BlockSpec("pre-basic", (2,)),)), NetSpec((BlockSpec("pre-basic", (5,)),))


def test_networks_loss_and_optimizers_make_one_report_with_paths_of_the_root() -> None:
    root = nn.ModuleDict({"student": Net(WRONG), "teacher": Net(RIGHT)})
    run, images = RunAudit(root, Selection()), torch.zeros(2, 3, 8, 8)
    for network in root.values():
        run.add_network(network, images)
        run.add_network(network, None)  # known already
    run.judge_loss((root["student"](images + 1).square().sum() * 0).sqrt())
    run.judge(optimizers=[torch.optim.Adam(root.parameters(), weight_decay=0.1)])
    found = {(finding.code, finding.places[0].module if finding.places else "") for finding in run.report.findings}
    assert {("NK101", "student.blocks.0.drop2")} <= found
    assert {"NK205", "NK401"} <= {code for code, _ in found}
    assert not any(place.startswith("teacher.blocks") and code.startswith("NK1") for code, place in found)
    assert all(run.has_read(network) for network in root.values())
    alone = [finding.code for finding in audit(root["student"], images, select=["NK1"]).findings]
    assert alone == [code for code, _ in sorted(found) if code.startswith("NK1")]


def test_what_fails_is_a_note_and_a_fix_has_paths_of_the_root() -> None:
    class Unreadable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_tensor(x.tolist())

    root = nn.ModuleDict({"net": Net(WRONG), "odd": Unreadable()})
    run = RunAudit(root, Selection(["NK101"]))
    (fix,) = run.fix(root["net"], torch.zeros(2, 3, 8, 8), allow_unsafe=False)
    assert (fix.code, bool(run.changes)) == ("NK101", True)
    run.add_network(root["net"], torch.zeros(2, 3, 8, 8))
    run.add_network(root["odd"], torch.zeros(2))
    run.judge(optimizers=[])
    assert list(run.report.findings) == []
    assert [note.kind for note in run.report.notes] == [NoteKind.FAILED]
    assert all(line.startswith("fixed: net.blocks") for line in run.report.fixed)
