"""Charts of a report as SVG: evidence as bars, the map of a network, curves. Every text is escaped here."""

from __future__ import annotations

__all__ = ["bars", "depth_chart", "line_chart", "network_map"]

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape

from pl_normkit.findings import Evidence
from pl_normkit.report.landmarks import Landmark

_WIDTH = 640
_ROW = 22
_LABEL = 150


def bars(evidence: Sequence[Evidence]) -> str:
    """One bar a number, on a common scale; a logarithmic one where they differ by more than a factor of 50. "" for fewer than two."""
    values = [item.value for item in evidence]
    if len(values) < 2 or len({item.unit for item in evidence}) > 1 or not all(math.isfinite(value) and value >= 0 for value in values):
        return ""
    lengths = _lengths(values)
    rows = []
    for number, (item, length) in enumerate(zip(evidence, lengths, strict=True)):
        y = number * 2 * _ROW
        rows.append(f'<text x="0" y="{y + 14}">{escape(item.what)}</text>')
        rows.append(f'<rect x="0" y="{y + _ROW}" width="{max(length * (_WIDTH - 110), 2):.1f}" height="12" rx="2"/>')
        rows.append(f'<text x="{max(length * (_WIDTH - 110), 2) + 8:.1f}" y="{y + _ROW + 11}">{item.value:.4g}</text>')
    return _svg("bars", _WIDTH, len(values) * 2 * _ROW, rows, "evidence as bars")


def _lengths(values: Sequence[float]) -> list[float]:
    largest, positive = max(values), [value for value in values if value > 0]
    if not positive:
        return [0.0] * len(values)
    if largest / min(positive) <= 50:
        return [value / largest for value in values]
    low = math.log10(min(positive)) - 0.5
    return [(math.log10(value) - low) / (math.log10(largest) - low) if value > 0 else 0.0 for value in values]


def network_map(landmarks: Sequence[Landmark], marked: Mapping[str, Collection[str]]) -> str:
    """The landmarks along depth, one row a kind; those at which findings stand are marked and name their codes."""
    kinds = list(dict.fromkeys(landmark.kind for landmark in landmarks))
    if not kinds:
        return ""
    last = max(landmark.depth for landmark in landmarks) or 1
    parts = []
    for row, kind in enumerate(kinds):
        y = row * _ROW + 16
        parts.append(f'<text x="0" y="{y + 4}">{escape(kind)}</text>')
        parts.append(f'<line x1="{_LABEL}" y1="{y}" x2="{_WIDTH - 8}" y2="{y}"/>')
    for landmark in landmarks:
        x = _LABEL + landmark.depth / last * (_WIDTH - 8 - _LABEL)
        y = kinds.index(landmark.kind) * _ROW + 16
        codes = " ".join(sorted(marked.get(landmark.module, ())))
        title = escape(" ".join(part for part in (landmark.module or "(the model)", landmark.source, codes) if part))
        kind = "found" if codes else "plain"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y}" r="{6 if codes else 4}"><title>{title}</title></circle>')
    return _svg("map", _WIDTH, len(kinds) * _ROW + 16, parts, "map of the network along depth")


def depth_chart(curve: Mapping[str, float], landmarks: Sequence[Landmark]) -> str:
    """A curve over the depth of the map, so that it can be read below it; "" where a module of the curve has no landmark.

    A block stands where its first landmark does.
    """
    depths = {path: _depth_of(path, landmarks) for path in curve}
    points = [(depth, curve[path], path) for path, depth in depths.items() if depth is not None and math.isfinite(curve[path])]
    if not points or None in depths.values():
        return ""
    points.sort(key=lambda point: point[0])
    last, low, high = max(landmark.depth for landmark in landmarks) or 1, min(y for _, y, _ in points), max(y for _, y, _ in points)
    placed = [
        (_LABEL + x / last * (_WIDTH - 8 - _LABEL), 100 - (y - low) / ((high - low) or 1) * 80, f"{label} {y:.4g}")
        for x, y, label in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in placed)
    dots = [f'<circle class="plain" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(title)}</title></circle>' for x, y, title in placed]
    ends = {104: low, 24: high} if high > low else {104: low}
    axes = [f'<text x="{_LABEL - 12}" y="{y}" text-anchor="end">{value:.4g}</text>' for y, value in ends.items()]
    return _svg("curve", _WIDTH, 112, [f'<polyline points="{line}"/>', *dots, *axes], "curve along depth")


def _depth_of(path: str, landmarks: Sequence[Landmark]) -> int | None:
    inside = [landmark.depth for landmark in landmarks if landmark.module == path or landmark.module.startswith(f"{path}.")]
    return min(inside, default=None)


def line_chart(points: Sequence[tuple[float, float]], labels: Sequence[str] = ()) -> str:
    """Points joined in order, with both ranges written at the axes; `labels` are shown at the points. "" without finite points."""
    named = zip(points, labels or [""] * len(points), strict=True)
    finite = [(x, y, label) for (x, y), label in named if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        return ""
    left, right = min(x for x, _, _ in finite), max(x for x, _, _ in finite)
    low, high = min(y for _, y, _ in finite), max(y for _, y, _ in finite)
    placed = [
        (60 + (x - left) / ((right - left) or 1) * (_WIDTH - 70), 130 - (y - low) / ((high - low) or 1) * 115, x, y, label)
        for x, y, label in finite
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in placed)
    dots = [
        f'<circle class="plain" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(f"{label} {at:g}: {value:.4g}".strip())}</title></circle>'
        for x, y, at, value, label in placed
    ]
    axes = [
        f'<text x="0" y="20">{high:.4g}</text>',
        f'<text x="0" y="132">{low:.4g}</text>',
        f'<text x="60" y="150">{left:g}</text>',
        f'<text x="{_WIDTH - 10}" y="150" text-anchor="end">{right:g}</text>',
    ]
    return _svg("curve", _WIDTH, 156, [f'<polyline points="{line}"/>', *dots, *axes], "curve")


def _svg(kind: str, width: int, height: int, parts: Sequence[str], label: str) -> str:
    return f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
