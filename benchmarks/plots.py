"""The pictures: bars for the cases, lines for the cost curves, stacks for CPU time."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.curves import Curve
from benchmarks.measure import Figure, Outcome
from benchmarks.processes import ROLES
from benchmarks.report import BASELINE, BEFORE, OURS, scaled, size

_COLOURS = {
    OURS: "#1b6ca8",
    BEFORE: "#8ecae6",
    BASELINE: "#6c757d",
    "PythonInterpreter (Deno)": "#e09f3e",
    "llm-sandbox": "#9e2a2b",
}
_ROLE_COLOURS = {"host": "#1b6ca8", "broker": "#e09f3e", "worker": "#6a994e"}
_OTHER = "#444444"
_WANTED = "#2d6a4f"
_DPI = 110
_WIDTH_INCHES = 14
#: Of the titles' font.
_TITLE_CHARS_PER_INCH = 10.5


def write(outcome: Outcome, rows: Sequence[Case], lines: Sequence[Curve], folder: Path) -> list[Path]:
    """Draw whatever there are figures for, and return the files."""
    import matplotlib

    matplotlib.use("Agg")
    written = []
    if outcome.figures:
        written.append(_bars(outcome, rows, folder / "benchmarks.png"))
    if any(figure.cpu_s for figure in outcome.figures):
        written.append(_cpu(outcome, rows, folder / "benchmarks-cpu.png"))
    if outcome.points:
        written.append(_curves(outcome, lines, folder / "benchmarks-curves.png"))
    return written


def _bars(outcome: Outcome, rows: Sequence[Case], path: Path) -> Path:
    names = [name for name in _COLOURS if any(figure.contender == name for figure in outcome.figures)]
    shown = [row for row in rows if any(figure.case == row.key for figure in outcome.figures)]
    canvas, panels = _grid(len(shown), columns=4, height=2.7)
    for panel, row in zip(panels, shown, strict=False):
        found = {figure.contender: figure for figure in outcome.figures if figure.case == row.key}
        _bar_panel(panel, row, [found[name] for name in names if name in found])
        if row.target is not None and BASELINE in found:
            wanted = scaled(row.unit, found[BASELINE].median * row.target)[0]
            panel.axhline(wanted, color=_WANTED, linestyle="--", linewidth=1.2)
            panel.set_ylim(bottom=min(panel.get_ylim()[0], wanted / 2))
    _finish(canvas, names, _COLOURS, path, dashed="wanted")
    return path


def _bar_panel(panel: Any, row: Case, figures: Sequence[Figure]) -> None:
    medians = [scaled(figure.unit, figure.median)[0] for figure in figures]
    ends = [scaled(figure.unit, figure.p95)[0] for figure in figures]
    colours = [_COLOURS.get(figure.contender, _OTHER) for figure in figures]
    bars = panel.bar(range(len(figures)), medians, color=colours, width=0.72)
    panel.vlines(range(len(figures)), medians, ends, colors="#222222", linewidth=1.2)
    panel.set_yscale("log")
    panel.set_ylim(bottom=max(min([*medians, *ends]), 1e-4) / 3, top=max([*medians, *ends]) * 4)
    for bar, median, end in zip(bars, medians, ends, strict=True):
        where = (bar.get_x() + bar.get_width() / 2, max(median, end) * 1.15)
        panel.annotate(_short(median), where, ha="center", va="bottom", fontsize=9)
    _title(panel, row.title)
    panel.set_ylabel(f"{scaled(figures[0].unit, 1.0)[1]} (log)", fontsize=9)
    panel.set_xticks([])


def _cpu(outcome: Outcome, rows: Sequence[Case], path: Path) -> Path:
    names = [name for name in (BEFORE, OURS, BASELINE) if any(f.contender == name for f in outcome.figures)]
    by = {(figure.case, figure.contender): figure for figure in outcome.figures if figure.cpu_s}
    shown = [row for row in rows if any((row.key, name) in by for name in names)]
    canvas, panels = _grid(len(shown), columns=3, height=1.1 + 0.45 * len(names))
    for panel, row in zip(panels, shown, strict=False):
        present = [name for name in names if (row.key, name) in by][::-1]
        left = [0.0] * len(present)
        for role in ROLES:
            spent = [by[row.key, name].cpu_s.get(role, 0.0) * 1e3 for name in present]
            panel.barh(present, spent, left=left, color=_ROLE_COLOURS[role], height=0.62)
            left = [a + b for a, b in zip(left, spent, strict=True)]
        for index, total in enumerate(left):
            panel.annotate(f" {_short(total)}", (total, index), va="center", fontsize=9)
        panel.set_xlim(right=max(left) * 1.25)
        _title(panel, row.title)
        panel.set_xlabel("CPU ms of one operation", fontsize=9)
    _finish(canvas, list(ROLES), _ROLE_COLOURS, path)
    return path


def _curves(outcome: Outcome, lines: Sequence[Curve], path: Path) -> Path:
    drawn: list[tuple[Curve, str, str, str]] = []
    for line in lines:
        if any(point.curve == line.key for point in outcome.points):
            drawn.append((line, line.y[0], line.y[1], line.title))
            if any("worst_ms" in p.measures for p in outcome.points if p.curve == line.key):
                drawn.append((line, "worst_ms", "worst call, ms", f"{line.title}: latency"))
                drawn.append((line, "worker_bytes_each", "MiB a session", f"{line.title}: memory"))
    names = [name for name in _COLOURS if any(point.contender == name for point in outcome.points)]
    canvas, panels = _grid(len(drawn), columns=3, height=3.3)
    for panel, (line, key, unit, title) in zip(panels, drawn, strict=False):
        for name in names:
            points = [
                p for p in outcome.points if p.curve == line.key and p.contender == name and p.measures.get(key, 0) > 0
            ]
            factor = {"wall_s": 1e3, "worker_bytes_each": 1 / (1 << 20)}.get(key, 1.0)
            values = [point.measures[key] * factor for point in points]
            panel.plot([p.x for p in points], values, marker="o", markersize=4, color=_COLOURS[name])
            if key == "wall_s":
                spent = [point.measures.get("cpu_s", 0.0) * 1e3 for point in points]
                panel.plot([p.x for p in points], spent, linestyle=":", linewidth=1.3, color=_COLOURS[name])
        _axes(panel, line, title, unit)
    _finish(canvas, names, _COLOURS, path)
    return path


def _axes(panel: Any, line: Curve, title: str, unit: str) -> None:
    panel.set_xscale("log", base=2)
    drawn = [value for curve in panel.lines for value in curve.get_ydata() if value > 0]
    # Less than a decade and a half has hardly a tick on a logarithmic axis.
    logarithmic = bool(drawn) and max(drawn) > 30 * min(drawn)
    if logarithmic:
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)
    label: Callable[[int], str] = size if line.in_bytes else "{:,}".format
    ticks = line.points[:: max(1, len(line.points) // 5)]
    panel.set_xticks(ticks, [label(tick) for tick in ticks], fontsize=9)
    panel.xaxis.minorticks_off()
    panel.grid(visible=True, alpha=0.25)
    _title(panel, title + (" (dotted: CPU time)" if unit == "ms" else ""))
    panel.set_xlabel(line.x, fontsize=9)
    panel.set_ylabel(f"{unit} (log)" if logarithmic else unit, fontsize=9)


def _title(panel: Any, text: str) -> None:
    """Set a panel's title, in as many lines as it takes to stay above the panel."""
    wide = _WIDTH_INCHES / panel.get_gridspec().ncols * _TITLE_CHARS_PER_INCH
    panel.set_title(textwrap.fill(text.replace("`", ""), int(wide)), fontsize=10.5)


def _grid(count: int, *, columns: int, height: float) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot

    rows = -(-count // columns)
    canvas, axes = pyplot.subplots(rows, columns, figsize=(_WIDTH_INCHES, height * rows + 0.5), squeeze=False)
    panels = list(axes.flat)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    for panel in panels[count:]:
        panel.axis("off")
    return canvas, panels


def _finish(canvas: Any, names: Sequence[str], colours: dict[str, str], path: Path, *, dashed: str = "") -> None:
    from matplotlib import lines, patches, pyplot

    handles: list[Any] = [patches.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    labels = list(names)
    if dashed:
        handles.append(lines.Line2D([], [], color=_WANTED, linestyle="--"))
        labels.append(dashed)
    height = canvas.get_size_inches()[1]
    canvas.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False, fontsize=11)
    canvas.tight_layout(rect=(0, 0, 1, 1 - 0.4 / height))
    canvas.savefig(path, dpi=_DPI)
    pyplot.close(canvas)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
