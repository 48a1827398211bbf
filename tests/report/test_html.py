"""The page: what stands in it, that hostile text stays text, and how it behaves in a real browser where one is installed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from pl_normkit import Report, audit, measure_gamma_norms, measure_variance_shift
from pl_normkit.block_health import BlockHealth
from pl_normkit.errors import ConfigError
from pl_normkit.findings import Evidence, Finding, FixSafety, Note, NoteKind, Place, Severity
from pl_normkit.report.charts import bars, depth_chart, line_chart, network_map
from pl_normkit.report.landmarks import Landmark, RunResult, Score, Table
from pl_normkit.report.probe_curves import curves_of_probes
from pl_normkit.report.source_lines import lines_around

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def finding(code: str = "NK101", severity: Severity = Severity.WARNING, module: str = "layer1.drop", **changed: object) -> Finding:
    fields: dict[str, object] = {
        "name": "dropout-before-batch-norm",
        "message": "Dropout before a batch norm",
        "places": (Place(module, f"{__file__}:1"),),
        "evidence": (Evidence("before", 4.0, "1"), Evidence("after", 1.0, "1")),
        "advice": "Move it",
        "fix_safety": FixSafety.SAFE,
    }
    return Finding(code, severity=severity, **{**fields, **changed})  # type: ignore[arg-type]


LONG = ".".join(["module_with_a_long_name"] * 12)
REPORT = Report(
    [finding(severity=Severity.ERROR), finding(module=HOSTILE, message=HOSTILE, advice=HOSTILE), finding("NK501", Severity.NOTE, LONG)],
    HOSTILE,
    [Note(HOSTILE), Note("no inputs", NoteKind.NOT_RUN)],
    [HOSTILE],
    {HOSTILE: b"\x89PNG"},
    {"inputs": HOSTILE},
    [Landmark("norm", LONG, "", 3), Landmark("dropout", HOSTILE, HOSTILE, 9)],
    {HOSTILE: {"a": 1.0, HOSTILE: float("nan"), "b": 3.0}, f"{HOSTILE} {LONG}": {LONG: 1.0, HOSTILE: 2.0}},
    RunResult([Score(HOSTILE, 0.5, HOSTILE)], HOSTILE, {HOSTILE: [(0, 1.0), (1, 0.5)]}, [Table(HOSTILE, [HOSTILE], [[HOSTILE]])], HOSTILE),
)


def text_of(page: str) -> str:
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", " ", body))


def test_the_page_says_everything_the_report_holds() -> None:
    text = text_of(
        Report([finding()], "ResNet", [Note("no inputs", NoteKind.NOT_RUN)], ["bn: moved"], about={"inputs": "(2, 3)"}).to_html()
    )
    for part in (
        "ResNet",
        "1 warning",
        "Dropout before a batch norm",
        "before: 4 (should be 1)",
        "Move it",
        "from pl_normkit import place_dropout",
        "layer1.drop",
        'ignore=["NK101"]',
        "Why it hurts",
        "What did not run",
        "bn: moved",
        "(2, 3)",
    ):
        assert part in text, part


def test_an_empty_report_says_so() -> None:
    assert "Nothing to report" in text_of(Report([], "ResNet").to_html())


def test_hostile_text_stays_text() -> None:
    """Two script elements would be ours and a third theirs."""
    page = REPORT.to_html()
    assert page.count("<script>") == 1
    assert "<img src=x" not in page
    assert text_of(page).count(HOSTILE) >= 12


def test_the_page_asks_no_network() -> None:
    assert re.findall(r"""(?:src|href)=["']?(?!data:)[^"'\s>]+""", Report([finding()], "ResNet", pictures={"a": b"1"}).to_html()) == []


def test_source_lines_come_from_the_named_file_or_a_package() -> None:
    (first, *rest) = lines_around(f"{__file__}:1", margin=1)
    assert (first.number, first.is_meant, first.text[:12], len(rest)) == (1, True, '"""The page:', 1)
    assert [line.is_meant for line in lines_around("torch/nn/functional.py:100", margin=2)] == [False, False, True, False, False]
    assert [lines_around(source) for source in ("", "nowhere.py:3", "nowhere/at_all.py:3", "<string>:1", f"{__file__}:999999")] == [[]] * 5


def test_bars_are_as_long_as_their_numbers() -> None:
    widths = [float(width) for width in re.findall(r'rect .*?width="([\d.]+)"', bars(finding().evidence))]
    assert widths[0] == pytest.approx(4 * widths[1])
    assert bars([Evidence("one", 1.0)]) == ""
    assert bars([Evidence("one", 1.0, unit="MiB"), Evidence("two", 1.0)]) == ""


def test_the_map_marks_where_findings_stand() -> None:
    svg = network_map([Landmark("norm", "a", "x.py:1", 0), Landmark("norm", "b", "", 5)], {"b": {"NK101"}})
    assert re.findall(r'class="(\w+)" cx="([\d.]+)"', svg) == [("plain", "150.0"), ("found", "632.0")]
    assert "b NK101" in svg
    assert network_map([], {}) == ""


def test_a_curve_leaves_out_what_is_not_finite() -> None:
    assert line_chart([(0, 1.0), (1, float("nan")), (2, 3.0)]).count("<circle") == 2
    assert line_chart([(0, float("inf"))]) == ""


class Ratio(NamedTuple):
    module: str
    ratio: float


@pytest.mark.parametrize(
    ("result", "curves"),
    [
        ({"a": 1, "b": 2.5}, {"t": {"a": 1.0, "b": 2.5}}),
        ({"last": {"a": 1.0}, "none": {}}, {"t: last": {"a": 1.0}}),
        ({"a": BlockHealth(0.5, None, 0.1)}, {"t: gradient norm": {"a": 0.5}, "t: dead share": {"a": 0.1}}),
        ([Ratio("a", 2.0), Ratio("a", 4.0), Ratio("b", 1.0)], {"t": {"a": 4.0, "b": 1.0}}),
        (SimpleNamespace(curves={"by block": {"a": 1.0}}), {"t: by block": {"a": 1.0}}),
        (SimpleNamespace(curves=lambda: {"by block": {"a": 1.0}}), {"t: by block": {"a": 1.0}}),
        ({}, {"t": {}}),
    ],
)
def test_results_of_probes_are_curves(result: object, curves: dict[str, dict[str, float]]) -> None:
    assert curves_of_probes({"t": result}) == curves


@pytest.mark.parametrize("result", [3.0, "text", ["text"], {"a": "text"}, None])
def test_what_holds_no_numbers_by_module_is_refused(result: object) -> None:
    with pytest.raises(ConfigError, match="cannot be drawn"):
        curves_of_probes({"t": result})


def test_a_curve_along_the_landmarks_lies_below_the_map() -> None:
    """A block stands where its first landmark does; a curve with a module that has none is drawn apart."""
    landmarks = [Landmark("norm", "a.bn", "", 0), Landmark("norm", "b.bn1", "", 5), Landmark("norm", "b.bn2", "", 10)]
    svg = depth_chart({"b": 4.0, "a.bn": 2.0, "b.bn2": 3.0}, landmarks)
    assert re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg) == [("150.0", "100.0"), ("391.0", "20.0"), ("632.0", "60.0")]
    assert re.findall(r'y="(\d+)" text-anchor="end">([\d.]+)<', svg) == [("104", "2"), ("24", "4")]
    assert re.findall(r'y="(\d+)" text-anchor="end">([\d.]+)<', depth_chart({"a.bn": 2.0}, landmarks)) == [("104", "2")]  # on its line
    assert depth_chart({"a.bn": 2.0, "elsewhere": 3.0}, landmarks) == ""
    page = Report(landmarks=landmarks).to_html({"Shift": {"a.bn": 2.0}, "Apart": {"elsewhere": 1.0}})
    assert "Shift" in page.partition("Map of the network")[2].partition("</section>")[0]
    assert "Apart" in page.partition("Map of the network")[2].partition("</section>")[2]


def test_probes_of_a_real_network_are_drawn_on_its_map(faulty_net: nn.Module) -> None:
    batch = torch.randn(8, 3, 8, 8)
    probes = {"Shift": measure_variance_shift(faulty_net, batch), "Scales": measure_gamma_norms(faulty_net, batch)}
    report = audit(faulty_net, batch).with_probes(probes)
    assert set(report.curves["Shift"]) == {landmark.module for landmark in report.landmarks if landmark.kind == "norm"}
    below = report.to_html().partition("Map of the network")[2].partition("</section>")[0]
    assert below.count("<figcaption>") == len(report.curves) > 1


def test_an_audit_fills_the_page(faulty_net: nn.Module) -> None:
    report = audit(faulty_net, torch.zeros(2, 3, 8, 8))
    assert report.about == {
        "network": f"FaultyNet, {sum(p.numel() for p in faulty_net.parameters())} parameters",
        "inputs": "(2, 3, 8, 8) torch.float32",
    }
    kinds = [landmark.kind for landmark in report.landmarks]
    assert {kind: kinds.count(kind) for kind in kinds} == {"residual addition": 2, "norm": 4, "dropout": 2}
    assert report.to_html().count('circle class="found"') == 2


def test_a_notebook_shows_the_page_in_a_frame() -> None:
    frame = REPORT._repr_html_()
    assert html.unescape(frame[frame.index('"') + 1 : frame.index('" style')]) == REPORT.to_html()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHECKS = """
const results = {errors: []};
const frame = document.createElement("iframe");
frame.srcdoc = PAGE;
const check = async () => {
  const page = frame.contentDocument;
  for (const width of [390, 1280]) {
    frame.style.width = width + "px";
    page.querySelectorAll("details").forEach((part) => { part.open = true; });
    results[width] = [page.documentElement.scrollWidth <= width, page.documentElement.clientWidth];
  }
  const cards = [...page.querySelectorAll(".finding")];
  const shown = () => cards.filter((card) => card.offsetParent !== null).length;
  const set = (name, value) => {
    const field = page.querySelector(name);
    field.value = value;
    field.dispatchEvent(new Event("input", {bubbles: true}));
  };
  results.all = shown();
  page.querySelector('input[value="note"]').click();
  results.withoutNotes = shown();
  page.querySelector('input[value="note"]').click();
  set("select", "NK5");
  results.family = shown();
  set("select", "");
  set('input[name="module"]', "LAYER1");
  results.module = shown();
  set('input[name="module"]', "");
  const height = cards[0].offsetHeight;
  cards[0].open = false;
  results.folds = cards[0].offsetHeight < height;
  document.title = "done";
  document.body.textContent = JSON.stringify(results);
};
frame.addEventListener("load", () => { frame.contentWindow.onerror = (message) => results.errors.push(message); check(); });
document.body.append(frame);
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """No horizontal scroll on a phone or a desktop, no error, filters and folding work."""
    page = json.dumps(REPORT.to_html()).replace("</", "<\\/")
    (tmp_path / "checks.html").write_text(f"<!doctype html><body><script>const PAGE = {page};{CHECKS}</script>")
    flags = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-sync hide-scrollbars"
    command = [str(CHROMIUM), *(f"--{flag}" for flag in flags.split()), f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "checks.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    results = json.loads(html.unescape(re.search(r"<body>(.*?)</body>", done.stdout, re.DOTALL)[1]))  # type: ignore[index]
    assert results == {
        "errors": [],
        "390": [True, 390],
        "1280": [True, 1280],
        "all": 3,
        "withoutNotes": 2,
        "family": 1,
        "module": 1,
        "folds": True,
    }
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line and "error" in line.lower()] == []
