"""Turns figures into a table, a JSON file and a plot."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

from benchmarks.measure import Figure

BASELINE = "LocalInterpreter"


def table(figures: list[Figure]) -> str:
    """Return a Markdown table: median (p95) of each contender, and our ratio to the baseline."""
    names = list(dict.fromkeys(figure.contender for figure in figures))
    by = {(figure.case, figure.contender): figure for figure in figures}
    lines = [
        "| median (p95) | " + " | ".join(names) + f" | {names[0]} / {BASELINE} |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for case in dict.fromkeys(figure.case for figure in figures):
        cells = [_cell(by.get((case, name))) for name in names]
        lines.append(f"| {case} | " + " | ".join(cells) + f" | {_ratio(by, case, names[0])} |")
    return "\n".join(lines)


def write_json(figures: list[Figure], path: Path) -> None:
    """Write all samples with what is needed to read them: date, Python, cores, versions."""
    import dspy

    from host_client import __version__

    about = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "dspy": dspy.__version__,
        "rlm_sandbox": __version__,
    }
    path.write_text(json.dumps({"about": about, "figures": [figure.to_json() for figure in figures]}, indent=1) + "\n")


def plot(figures: list[Figure], path: Path) -> None:
    """Draw one panel per case, the contenders as bars with their samples' spread (median, up to p95)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(figure.case for figure in figures))
    names = list(dict.fromkeys(figure.contender for figure in figures))
    colours = dict(zip(names, ("#2a6f97", "#9aa5b1", "#e09f3e"), strict=False))
    columns = 4
    rows = -(-len(cases) // columns)
    canvas, axes = pyplot.subplots(rows, columns, figsize=(14, 3.4 * rows), squeeze=False)
    for panel in axes.flat[len(cases) :]:
        panel.axis("off")
    for panel, case in zip(axes.flat, cases, strict=False):
        _panel(panel, case, [f for f in figures if f.case == case], colours)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    canvas.legend(handles, names, loc="upper center", ncols=len(names), frameon=False)
    canvas.tight_layout(rect=(0, 0, 1, 0.94))
    canvas.savefig(path, dpi=110)
    pyplot.close(canvas)


def _panel(panel: Any, case: str, figures: list[Figure], colours: dict[str, str]) -> None:
    scale, unit = (1e3, "ms") if figures[0].unit == "s" else (1 / (1 << 20), "MiB")
    medians = [figure.median * scale for figure in figures]
    spread = [[0.0] * len(figures), [max(0.0, f.p95 * scale - m) for f, m in zip(figures, medians, strict=True)]]
    bars = panel.bar(
        range(len(figures)), medians, yerr=spread, capsize=3, color=[colours[f.contender] for f in figures]
    )
    panel.bar_label(bars, labels=[_short(median) for median in medians], padding=2, fontsize=8)
    panel.set_yscale("log")
    panel.set_ylim(top=panel.get_ylim()[1] * 2)
    panel.set_title(case, fontsize=10)
    panel.set_ylabel(f"{unit} (log)", fontsize=8)
    panel.set_xticks([])
    panel.spines[["top", "right"]].set_visible(False)


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "n/a"
    scale, unit = (1e3, "ms") if figure.unit == "s" else (1 / (1 << 20), "MiB")
    return f"{_short(figure.median * scale)} ({_short(figure.p95 * scale)}) {unit}"


def _ratio(by: dict[tuple[str, str], Figure], case: str, ours: str) -> str:
    mine, base = by.get((case, ours)), by.get((case, BASELINE))
    return "n/a" if mine is None or base is None else f"{mine.median / base.median:.2f}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
