"""Turns what was measured into tables, a JSON file, and the generated parts of the documents."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.agents import ROOT
from benchmarks.cases import CALLS, Case
from benchmarks.curves import GIB, KIB, MIB, Curve
from benchmarks.measure import CurvePoint, Figure, Outcome
from benchmarks.processes import ROLES

OURS, BEFORE, BASELINE = "rlm-sandbox", "before", "LocalInterpreter"
# What of a curve's measures is tabled, and how: key, heading, factor, digits after the point.
_MEASURES = {
    "wall_s": ("ms", 1e3, None),
    "cpu_s": ("CPU ms", 1e3, None),
    "calls_per_s": ("calls/s", 1.0, 0),
    "cpu_call_s": ("CPU ms a call", 1e3, None),
    "worst_ms": ("worst call, ms", 1.0, 1),
    "least_share": ("calls of the slowest session / mean", 1.0, 2),
    "broker_bytes": ("broker, MiB", 1 / MIB, 1),
    "worker_bytes_each": ("each session, MiB", 1 / MIB, 1),
}


def table(outcome: Outcome, rows: Sequence[Case]) -> str:
    """Return a Markdown table: median (p95) of each contender, and the ratios to the baseline beside the targets."""
    names = list(dict.fromkeys(figure.contender for figure in outcome.figures))
    by = _by_case(outcome)
    ratios = [name for name in (BEFORE, OURS) if name in names]
    headings = [f"{name} / {BASELINE}" if name == OURS else "ratio before" for name in ratios]
    lines = [
        "| median (p95) | " + " | ".join([*names, *headings, "wanted", f"p95 / median, {OURS}"]) + " |",
        "|---|" + "---:|" * (len(names) + len(headings) + 2),
    ]
    for row in rows:
        cells = [_cell(by.get((row.key, name))) for name in names]
        cells += [_show_ratio(ratio(by, row.key, name)) for name in ratios]
        lines.append(
            f"| {row.title} | "
            + " | ".join([*cells, _wanted(row, ratio(by, row.key, OURS)), _spread(by.get((row.key, OURS)))])
            + " |"
        )
    return "\n".join(lines)


def short_table(outcome: Outcome, rows: Sequence[Case]) -> str:
    """Return the README's table: ours, the baseline and the ratio."""
    by = _by_case(outcome)
    lines = [f"| median (p95) | {OURS} | {BASELINE} | ratio |", "|---|---:|---:|---:|"]
    for row in rows:
        cells = [_cell(by.get((row.key, name))) for name in (OURS, BASELINE)]
        lines.append(f"| {row.title} | " + " | ".join([*cells, _show_ratio(ratio(by, row.key, OURS))]) + " |")
    return "\n".join(lines)


def cpu_table(outcome: Outcome, rows: Sequence[Case]) -> str:
    """Return a Markdown table of the mean CPU time of one operation, by process."""
    names = [name for name in (BEFORE, OURS, BASELINE) if any(f.contender == name for f in outcome.figures)]
    by = _by_case(outcome)
    headings = [f"{name}, {role}" for name in names for role in ROLES if (name, role) != (BASELINE, "broker")]
    lines = ["| CPU ms of one operation | " + " | ".join(headings) + " |", "|---|" + "---:|" * len(headings)]
    for row in rows:
        found = {name: by[row.key, name] for name in names if (row.key, name) in by}
        if not any(figure.cpu_s for figure in found.values()):
            continue
        cells = []
        for name in names:
            spent = found[name].cpu_s if name in found else {}
            for role in ROLES:
                if (name, role) != (BASELINE, "broker"):
                    cells.append(_short(spent[role] * 1e3) if role in spent else "n/a")
        lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curve_tables(outcome: Outcome, lines: Sequence[Curve]) -> str:
    """Return one Markdown table for each curve: points down, contenders and their measures across."""
    return "\n\n".join(_curve_table(outcome, line) for line in lines)


def _curve_table(outcome: Outcome, line: Curve) -> str:
    points = {(p.contender, p.x): p.measures for p in outcome.points if p.curve == line.key}
    names = list(dict.fromkeys(name for name, _ in points))
    kept = [key for key in _MEASURES if any(key in measures for measures in points.values())]
    if line.y[0] != "wall_s":
        kept = [key for key in kept if key not in ("wall_s", "cpu_s")]
    columns = [
        (name, key) for name in names for key in kept if any(key in points.get((name, x), {}) for x in line.points)
    ]
    headings = [f"{name}, {_MEASURES[key][0]}" for name, key in columns]
    text = [f"| {line.title}: {line.x} | " + " | ".join(headings) + " |", "|---:|" + "---:|" * len(columns)]
    for x in line.points:
        cells = [_measure(points.get((name, x), {}), key) for name, key in columns]
        text.append(f"| {size(x) if line.in_bytes else f'{x:,}'} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def _measure(measures: dict[str, float], key: str) -> str:
    if key not in measures:
        return "n/a"
    _, factor, digits = _MEASURES[key]
    value = measures[key] * factor
    return _short(value) if digits is None else f"{value:,.{digits}f}"


def ratio(by: dict[tuple[str, str], Figure], case: str, name: str) -> float | None:
    """Return a contender's median over the baseline's, or None where one of them is missing."""
    mine, base = by.get((case, name)), by.get((case, BASELINE))
    return None if mine is None or base is None else mine.median / base.median


def write(
    outcome: Outcome, rows: Sequence[Case], lines: Sequence[Curve], folder: Path, *, quick: bool, took_s: float
) -> None:
    """Write ``benchmarks.json``, and the generated parts of ``performance.md`` (and of the README, from ``docs``)."""
    facts = about(quick=quick, took_s=took_s)
    write_json(outcome, facts, folder / "benchmarks.json")
    intro = _sentence(facts)
    parts = {
        "about": intro,
        "figures": table(outcome, rows),
        "cpu": cpu_table(outcome, rows),
        "left-out": left_out(outcome),
    }
    if lines:
        parts["curves"] = curve_tables(outcome, lines)
    document = ROOT / "docs" / "performance.md"
    (folder / "performance.md").write_text(filled(document.read_text("utf-8"), parts), "utf-8")
    if folder.resolve() == ROOT / "docs":
        readme = ROOT / "README.md"
        text = f"{intro}\n\n{short_table(outcome, rows)}"
        readme.write_text(filled(readme.read_text("utf-8"), {"figures": text}), "utf-8")


def left_out(outcome: Outcome) -> str:
    """Return a list of what has no figure, and why."""
    lines = [f"- **{who}**, because {why}: {'; '.join(what)}." for (who, why), what in outcome.left_out.items()]
    return "\n".join(lines) or "Nothing."


def filled(document: str, parts: dict[str, str]) -> str:
    """Return a document with the text between ``<!-- NAME -->`` and ``<!-- /NAME -->`` replaced.

    Raises:
        ValueError: A pair of markers is missing.
    """
    for name, text in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if document.count(begin) != 1 or document.count(end) != 1:
            raise ValueError(f"the document needs <!-- {name} --> and <!-- /{name} --> once")
        before, _, rest = document.partition(begin)
        document = f"{before}{begin}{text}\n{end}{rest.partition(end)[2]}"
    return document


def about(*, quick: bool, took_s: float) -> dict[str, Any]:
    """Return what is needed to read the figures."""
    import dspy

    from host_client import __version__

    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "dspy": dspy.__version__,
        "rlm_sandbox": __version__,
        "quick": quick,
        "took_s": round(took_s),
    }


def _sentence(facts: dict[str, Any]) -> str:
    command = "python -m benchmarks --quick` (few samples)" if facts["quick"] else "make bench`"
    return (
        f"Medians (95th percentile) of one interleaved run of `{command} on {facts['date']}: {facts['cores']} virtual "
        f"cores, Python {facts['python']}, DSPy {facts['dspy']}.\n`LocalInterpreter` has no sandbox. Our journal is on "
        "its default, a file that is flushed before a tool starts, where a row does not say otherwise."
    )


def write_json(outcome: Outcome, facts: dict[str, Any], path: Path) -> None:
    """Write all samples; times in seconds, memory in bytes."""
    points = [{"curve": p.curve, "contender": p.contender, "x": p.x, **p.measures} for p in outcome.points]
    content = {
        "about": facts,
        "figures": [_rounded(figure.to_json()) for figure in outcome.figures],
        "points": [_rounded(point) for point in points],
        "left_out": [{"contender": who, "why": why, "what": what} for (who, why), what in outcome.left_out.items()],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Outcome:
    """Read what ``write_json`` wrote.

    Raises:
        ValueError: It did not.
    """
    content = json.loads(path.read_text())
    try:
        figures = [
            Figure(f["case"], f["contender"], f["unit"], tuple(f["samples"]), f["cpu_s"]) for f in content["figures"]
        ]
        points = [
            CurvePoint(
                point["curve"],
                point["contender"],
                point["x"],
                {name: value for name, value in point.items() if name not in ("curve", "contender", "x")},
            )
            for point in content["points"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no figures of this program: {error!r}") from None
    return Outcome(figures, points)


def _rounded(value: Any) -> Any:
    """Return it with floats of five digits: more is noise, and large files."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


def size(count: int) -> str:
    """Return a size in bytes as people say it."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= unit:
            return f"{count / unit:g} {name}"
    return f"{count} B"


def scaled(unit: str, value: float) -> tuple[float, str]:
    """Return a sample as it is shown, with its unit."""
    if unit == "calls":
        return CALLS / value, "calls/s"
    return (value * 1e3, "ms") if unit == "s" else (value / MIB, "MiB")


def _by_case(outcome: Outcome) -> dict[tuple[str, str], Figure]:
    return {(figure.case, figure.contender): figure for figure in outcome.figures}


def _wanted(row: Case, reached: float | None) -> str:
    if row.target is None:
        return ""
    if reached is None:
        return f"≤ {row.target:g}"
    return f"≤ {row.target:g}: {'yes' if reached <= row.target else 'no'}"


def _spread(figure: Figure | None) -> str:
    return "n/a" if figure is None or len(figure.samples) == 1 else f"{figure.p95 / figure.median:.1f}"


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "n/a"
    median, unit = scaled(figure.unit, figure.median)
    if len(figure.samples) == 1:
        return f"{_short(median)} {unit} (once)"
    return f"{_short(median)} ({_short(scaled(figure.unit, figure.p95)[0])}) {unit}"


def _show_ratio(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
