"""Both renderings fit the terminal, and nothing from the sandbox can steer it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from host_client.demo.corpus import Verdict
from host_client.demo.rich_screen import RichScreen
from host_client.demo.run_log import IterationRecord, RunLog, ToolRecord
from host_client.demo.screen import Ending, Opening, Screen, verdict_text
from host_client.demo.shorten import clean, first_lines, one_line, output_lines, seconds_text, tools_text

EVIL = "\x1b]0;owned\x07\x1b[31mred\x1b[0m [bold]markup[/bold] [/] \u202egnp.exe \x9b2J\r\x00 " + "long " * 60
MakeScreen = Callable[[io.StringIO, int], Screen]


def plain(out: io.StringIO, width: int) -> Screen:
    return Screen(out, width)


def rich(out: io.StringIO, width: int) -> Screen:
    return RichScreen(Console(file=out, width=width, force_terminal=True, color_system=None, highlight=False))


def play(screen: Screen, text: str) -> None:
    """Show a whole run in which every text is ``text``."""
    log = RunLog(screen)
    screen.opening(Opening(question="Which?", model="scripted", source="250 files", sandbox="Docker"))
    with screen.waiting("starting the sandbox"):
        log.sandbox_ready(0.6)
        for outcome in ("ok", "error", "submitted"):
            log.action_chosen(text, f"print(1)\n{text}\n" + "x = 1\n" * 30)
            log.execution_started()
            log.tool_ended(log.tool_started("llm_query_batched", 12), None)
            log.tool_progress("search", text)
            log.execution_ended(f"{text}\n" * 20, outcome)
    verdict = Verdict(
        kind="modules", right=frozenset({"A"}), missing=frozenset({"B"}), wrong=frozenset({text[:60]}),
        bad_lines=frozenset(),
    )  # fmt: skip
    answer = {"modules": {"A": text, text[:30]: "x"}}
    screen.ending(Ending(answer=answer, verdicts=[verdict], log=log, total_s=12.3, trajectory=Path("run.json")))
    screen.failure("it failed")


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("make", [plain, rich])
def test_no_line_is_wider_than_the_terminal(make: MakeScreen, width: int) -> None:
    out = io.StringIO()
    play(make(out, width), "A sentence with [brackets] and some words. " * 12)
    lines = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9?;]*[A-Za-z]", "", out.getvalue()))
    assert max(map(cell_len, lines)) <= width
    assert any("12 prompts" in line for line in lines)


@pytest.mark.parametrize("make", [plain, rich])
def test_nothing_shown_can_steer_the_terminal(make: MakeScreen) -> None:
    harmless, evil = io.StringIO(), io.StringIO()
    play(make(harmless, 100), "harmless " * 40)
    play(make(evil, 100), EVIL)
    # What rich itself writes (cursor movement of its live line, styles) is what it writes for harmless text.
    allowed = {char for char in harmless.getvalue() if not char.isprintable()}
    assert {char for char in evil.getvalue() if not char.isprintable()} <= allowed
    assert "]0;owned" in evil.getvalue()
    assert "\x1b]0;owned" not in evil.getvalue()
    assert "[bold]markup[/bold]" in evil.getvalue()


def test_plain_rendering_has_no_escape_sequences() -> None:
    out = io.StringIO()
    play(Screen(out, 80), "text")
    assert "\x1b" not in out.getvalue()


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    colours = {}
    for value in ("", "1"):
        monkeypatch.setenv("NO_COLOR", value)
        out = io.StringIO()
        play(RichScreen(Console(file=out, width=80, force_terminal=True, color_system="standard")), "text")
        colours[value] = any(f"\x1b[{code}m" in out.getvalue() for code in (31, 32, 35, 36))
    assert colours == {"": True, "1": False}


def test_clean_keeps_text_and_lines() -> None:
    assert clean("naïve — 漢字 🙂\n\tx") == "naïve — 漢字 🙂\n    x"
    assert clean("a\x1bb\r\u202e") == "a\ufffdb\ufffd\ufffd"


def test_shortening_says_how_much_is_hidden() -> None:
    assert first_lines("a\nb\nc\nd", lines=2, width=10) == ["a", "b", "… 2 more lines"]
    assert first_lines("a\nb\nc", lines=2, width=10) == ["a", "b", "c"]
    assert first_lines("abcdefghijkl", lines=2, width=5) == ["abcd…"]
    assert one_line("a\n b   c", 4) == "a b…"


def test_end_of_an_error_is_shown_where_the_error_is() -> None:
    record = IterationRecord(number=1, reasoning="", code="", model_s=0, outcome="error")
    record.output = "Traceback\n" + "  File x\n" * 50 + "KeyError: 'a'"
    assert output_lines(record, 80)[-1] == "KeyError: 'a'"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0004, "0.4 ms"), (0.0142, "14 ms"), (0.9999, "1.0 s"), (1.23, "1.2 s"), (200, "3 min 20 s")],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_many_calls_of_a_tool_are_one_line() -> None:
    calls = [ToolRecord(name="look", queries=None, seconds=s) for s in (0.1, 0.3, 0.2)]
    calls.append(ToolRecord(name="look", queries=None, seconds=0.1, error="KeyError"))
    assert tools_text(calls) == ["look, 4 calls, 1 raised, the longest 300 ms"]


def test_verdict_names_what_is_missing_and_wrong() -> None:
    verdict = Verdict(
        kind="optimizers", right=frozenset({"A"}), missing=frozenset({"C", "B"}), wrong=frozenset({"X"}),
        bad_lines=frozenset({"A"}),
    )  # fmt: skip
    assert verdict_text(verdict) == (
        "optimizers: 1 of 3 found, 1 wrong (precision 0.50, recall 0.33); missing: B, C; wrong: X; no line: A"
    )
