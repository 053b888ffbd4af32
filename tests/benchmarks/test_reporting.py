"""Tables and pictures say what was measured."""

from __future__ import annotations

import dataclasses
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import agents, flame, plots, processes, report
from benchmarks.cases import all_cases
from benchmarks.curves import all_curves
from benchmarks.llm_sandbox_interpreter import shown_value
from benchmarks.measure import CurvePoint, Figure, Outcome

ROWS, LINES = all_cases(quick=True), all_curves(quick=True)


@pytest.fixture
def outcome() -> Outcome:
    cpu = {"host": 0.0001, "broker": 0.0002, "worker": 0.0003}
    return Outcome(
        figures=[
            Figure("warm", "rlm-sandbox", "s", (0.001, 0.002, 0.003), cpu),
            Figure("warm", "before", "s", (0.008, 0.008), cpu),
            Figure("warm", "LocalInterpreter", "s", (0.004,) * 3, {"host": 0.0001, "worker": 0.0002}),
            Figure("concurrent", "rlm-sandbox", "calls", (0.25,)),
        ],
        points=[CurvePoint("curve-fresh", "rlm-sandbox", x, {"wall_s": x / 1e9}) for x in (1024, 1 << 20)],
        left_out={("Deno", "it is not there"): ["a", "b"]},
    )


def test_the_table_has_medians_both_ratios_and_whether_the_target_is_reached(outcome: Outcome) -> None:
    [warm] = [line for line in report.table(outcome, ROWS).splitlines() if line.startswith("| warm execution")]
    assert warm == "| warm execution | 2 (3) ms | 8 (8) ms | 4 (4) ms | 2.00 | 0.50 | ≤ 0.6: yes | 1.5 |"


def test_concurrent_calls_are_shown_as_a_rate(outcome: Outcome) -> None:
    [row] = [
        line for line in report.table(outcome, ROWS).splitlines() if line.startswith("| 1,000 concurrent tool calls |")
    ]
    assert "4,000 calls/s (once)" in row


def test_cpu_time_is_listed_by_process(outcome: Outcome) -> None:
    [row] = [line for line in report.cpu_table(outcome, ROWS).splitlines() if line.startswith("| warm execution")]
    assert row == "| warm execution | 0.1 | 0.2 | 0.3 | 0.1 | 0.2 | 0.3 | 0.1 | 0.2 |"


def test_the_generated_parts_replace_what_is_between_their_markers_only() -> None:
    document = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    assert report.filled(document, {"x": "new"}) == "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n"
    with pytest.raises(ValueError, match="<!-- y -->"):
        report.filled(document, {"y": "new"})


def test_the_documents_have_every_marker_and_every_row_is_explained(outcome: Outcome, tmp_path: Path) -> None:
    report.write(outcome, ROWS, LINES, tmp_path, quick=True, took_s=1.0)
    text = (tmp_path / "performance.md").read_text("utf-8")
    assert "≤ 0.6: yes" in text
    assert "- **Deno**, because it is not there: a; b." in text
    for row in ROWS:
        assert f"\n| {row.title} | " in text, f"docs/performance.md does not say what {row.title!r} is"
    readme = (agents.ROOT / "README.md").read_text("utf-8")
    assert report.filled(readme, {"figures": "x"}) != readme


def test_every_picture_is_a_png_of_a_readable_size(outcome: Outcome, tmp_path: Path) -> None:
    written = plots.write(outcome, ROWS, LINES, tmp_path)
    assert {path.name for path in written} == {"benchmarks.png", "benchmarks-cpu.png", "benchmarks-curves.png"}
    for path in written:
        head = path.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        assert struct.unpack(">I", head[16:20])[0] >= 1200


def test_no_title_is_wider_than_its_panel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    canvases: list[Any] = []
    original = plots._finish

    def finish(canvas: Any, *arguments: Any, **keywords: Any) -> None:
        original(canvas, *arguments, **keywords)
        canvases.append(canvas)

    monkeypatch.setattr(plots, "_finish", finish)
    every = Outcome(
        [Figure(row.key, "rlm-sandbox", row.unit, (0.001,), {"host": 0.001}) for row in ROWS],
        [CurvePoint(line.key, "rlm-sandbox", x, {"wall_s": 0.001}) for line in LINES for x in line.points],
    )
    plots.write(every, ROWS, LINES, tmp_path)
    panels = [panel for canvas in canvases for panel in canvas.axes if panel.get_title()]
    assert len(panels) > len(ROWS)
    for panel in panels:
        title = panel.title.get_window_extent()
        assert title.x0 >= 0, panel.get_title()
        assert title.x1 <= panel.figure.bbox.x1, panel.get_title()


def test_the_plots_can_be_drawn_from_the_figures_that_were_written(outcome: Outcome, tmp_path: Path) -> None:
    report.write_json(outcome, {}, tmp_path / "benchmarks.json")
    read = report.read_json(tmp_path / "benchmarks.json")
    assert read.figures == outcome.figures
    assert [dataclasses.astuple(point)[:3] for point in read.points] == [
        dataclasses.astuple(point)[:3] for point in outcome.points
    ]
    assert [point.measures for point in read.points] == [
        pytest.approx(point.measures, rel=1e-4) for point in outcome.points
    ]
    (tmp_path / "other.json").write_text('{"figures": [{}]}')
    with pytest.raises(ValueError, match=r"other\.json holds no figures"):
        report.read_json(tmp_path / "other.json")


def test_a_flame_graph_shows_each_frame_with_its_share_and_escapes_its_name() -> None:
    root = flame.parse(["main (m.py:1);run (host_client/x.py:2) 3", "main (m.py:1);<lambda> (y.py:3) 1"])
    drawn = flame.draw(root, "title & more")
    assert "title &amp; more: 4 samples" in drawn
    assert "<title>main (m.py:1): 4 samples, 100.0%</title>" in drawn
    assert "<title>run (host_client/x.py:2): 3 samples, 75.0%</title>" in drawn
    assert "&lt;lambda&gt;" in drawn


def test_a_frame_too_small_to_see_is_not_drawn() -> None:
    drawn = flame.draw(flame.parse(["big 10000", "tiny 1"]), "t")
    assert "big" in drawn
    assert "tiny" not in drawn


def test_the_cpu_clock_of_a_process_is_the_one_that_it_reads_itself() -> None:
    import time

    before = time.process_time_ns()
    seen = processes.cpu_ns(os.getpid())
    assert before <= seen <= time.process_time_ns()


def test_a_process_is_part_of_its_tree_and_has_memory() -> None:
    assert os.getpid() in processes.tree(os.getpid())
    assert processes.pss_bytes([os.getpid()]) > 1 << 20


@pytest.mark.parametrize(
    ("shown", "value"),
    [("Out[1]: 2\n\n", 2), ("line\nOut[12]: 'a\\nb'\n", "a\nb"), ("just printed\n", "just printed\n")],
)
def test_what_ipython_shows_is_read_as_a_value(shown: str, value: object) -> None:
    assert shown_value(shown) == value


def test_an_agent_of_another_folder_is_refused_and_of_this_one_answers_with_samples(tmp_path: Path) -> None:
    agent = agents.Agent("local", checkout=tmp_path, quick=True)
    agent.wait_ready()
    agent.close()
    assert agent.unavailable == "its process ended with status 1"
    agent = agents.Agent("local", quick=True)
    try:
        agent.wait_ready()
        assert (agent.unavailable, agent.name) == (None, "LocalInterpreter")
        taken = agent.ask(op="sample", case="warm", count=3)
        assert len(taken["samples"]) == 3
        assert taken["cpu_s"].keys() == {"host", "worker"}
        assert agent.ask(op="sample", case="no such case", count=1)["error"].startswith("KeyError")
    finally:
        agent.close()


def test_an_unknown_case_is_refused_by_name_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.__main__ import main

    assert main(["--only", "warm,wram"]) == 2
    assert "'wram'" in capsys.readouterr().err
    assert "benchmarks.agent" not in sys.modules
