"""What the demo shows: the story's parts, the plain rendering of them, and the choice of a rendering."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from host_client.demo.corpus import Verdict
from host_client.demo.run_log import IterationRecord, RunLog, ToolRecord, Watcher
from host_client.demo.shorten import (
    CODE_LINES,
    clean,
    count,
    first_lines,
    one_line,
    output_lines,
    seconds_text,
    times_text,
    tools_text,
)

#: Lines longer than this are tiring to read, whatever the terminal has.
MAX_WIDTH = 110

TITLE = "rlm-sandbox demo"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What is about to happen; each text is one paragraph."""

    question: str
    model: str
    source: str
    sandbox: str

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Return label and text of each line."""
        return (("question", self.question), ("source", self.source), ("model", self.model), ("sandbox", self.sandbox))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What came out."""

    answer: Mapping[str, Mapping[str, str]]
    verdicts: Sequence[Verdict]
    log: RunLog
    total_s: float
    trajectory: Path

    def totals(self) -> list[str]:
        """Say in two lines where time and calls went."""
        iterations = self.log.iterations
        model_s, sandbox_s, tools_s = (
            sum(getattr(record, name) for record in iterations) for name in ("model_s", "sandbox_s", "tools_s")
        )
        queries = self.log.sub_queries
        return [
            f"{count(len(iterations), 'iteration')} in {seconds_text(self.total_s)}: model {seconds_text(model_s)}, "
            f"sandbox {seconds_text(sandbox_s)} (after a start of {seconds_text(self.log.startup_s)}), "
            f"host tools {seconds_text(tools_s)}",
            f"{len(iterations) + queries} model calls ({len(iterations)} actions, {queries} sub-queries), "
            f"{self.log.tool_calls} calls from the sandbox to the host",
        ]


def verdict_text(verdict: Verdict) -> str:
    """Say how an answer compares with the package."""
    total = len(verdict.right) + len(verdict.missing)
    text = (
        f"{verdict.kind}: {len(verdict.right)} of {total} found, {len(verdict.wrong)} wrong "
        f"(precision {verdict.precision:.2f}, recall {verdict.recall:.2f})"
    )
    for label, names in (("missing", verdict.missing), ("wrong", verdict.wrong), ("no line", verdict.bad_lines)):
        if names:
            text += f"; {label}: {', '.join(sorted(map(clean, names)))}"
    return text


class Screen(Watcher):
    """A rendering of the whole demo. The plain one: lines of text, for pipes, logs and dumb terminals."""

    def __init__(self, out: TextIO | None = None, width: int | None = None) -> None:
        self._out = sys.stdout if out is None else out
        self._width = min(width or shutil.get_terminal_size((80, 24)).columns, MAX_WIDTH)

    def opening(self, opening: Opening) -> None:
        """Show what is about to happen."""
        self._line(TITLE)
        for label, text in opening.rows():
            self._paragraph(text, first=f"  {label:<9} ", rest=" " * 12)

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Say what is being waited for."""
        self._line(f"  ... {text}")
        yield

    def sandbox_ready(self, seconds: float) -> None:
        """Show that code can run."""
        self._line(f"  sandbox ready in {seconds_text(seconds)}")

    def action_chosen(self, record: IterationRecord) -> None:
        """Show reasoning and code."""
        self._line(f"\n-- {record.number} " + "-" * (self._width - 5 - len(str(record.number))))
        self._paragraph(one_line(record.reasoning, 3 * self._width))
        for line in first_lines(record.code, lines=CODE_LINES, width=self._width - 6):
            self._line(f"    | {line}")

    def tool_started(self, record: IterationRecord, tool: ToolRecord) -> None:
        """Nothing: the call is shown with its time when the iteration ends."""

    def tool_progress(self, record: IterationRecord, tool: str, message: str) -> None:
        """Show how far a tool is."""
        self._line("  > " + one_line(f"{tool}: {message}", self._width - 4))

    def iteration_ended(self, record: IterationRecord) -> None:
        """Show output, tool calls and times."""
        for line in output_lines(record, self._width - 4):
            self._line(f"    {line}")
        for text in tools_text(record.tools):
            self._line(f"  > {text}")
        word = {"ok": "ok", "submitted": "SUBMIT"}.get(record.outcome, "error")
        self._line(f"  = {word} · {times_text(record)}")

    def ending(self, ending: Ending) -> None:
        """Show answer, check and totals."""
        for kind, lines in ending.answer.items():
            self._line(f"\n{kind} ({len(lines)})")
            pad = max(map(len, lines), default=0)
            for name, line in lines.items():
                self._paragraph(one_line(str(line), 400), first=f"  {clean(name):<{pad}}  ", rest=" " * (pad + 4))
        self._line("\nchecked against the package itself")
        for verdict in ending.verdicts:
            self._paragraph(verdict_text(verdict), first="  ok  " if verdict.passed else "  NO  ", rest=" " * 6)
        self._line("")
        for text in [*ending.totals(), f"trajectory: {ending.trajectory}"]:
            self._paragraph(text)

    def failure(self, text: str) -> None:
        """Show why there is no answer."""
        self._line("")
        for line in clean(text).splitlines():
            self._paragraph(line)

    def _paragraph(self, text: str, first: str = "  ", rest: str = "  ") -> None:
        wrapped = textwrap.wrap(
            text, self._width, initial_indent=first, subsequent_indent=rest, break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
        for line in wrapped:
            self._line(line)

    def _line(self, text: str) -> None:
        print(text, file=self._out, flush=True)


def choose_screen() -> Screen:
    """Return the rendering for where standard output goes: rich on a terminal, else plain."""
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return Screen()
    try:
        from host_client.demo.rich_screen import RichScreen
    except ModuleNotFoundError:  # rich comes with the extra "demo"
        return Screen()
    return RichScreen()
