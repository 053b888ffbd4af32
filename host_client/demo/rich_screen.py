"""The demo on a terminal, with rich: finished parts scroll, one line at the bottom tells what goes on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.rule import Rule
from rich.spinner import Spinner
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from host_client.demo.run_log import IterationRecord, ToolRecord
from host_client.demo.screen import MAX_WIDTH, TITLE, Ending, Opening, Screen, verdict_text
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

# Ten redraws of one line a second look alive; more only cost time that the demo is there to show.
_REDRAWS_PER_S = 10

_INDENT = 4


class _Ticker:
    """The bottom line: a spinner, what is going on, counts, and the seconds since the run began."""

    def __init__(self) -> None:
        self._spinner = Spinner("dots", style="cyan")
        self._started = time.monotonic()
        self.activity = ""
        self.queries = 0
        self.actions = 0

    def __rich__(self) -> RenderableType:
        elapsed = seconds_text(time.monotonic() - self._started)
        calls = count(self.actions + self.queries, "model call")
        self._spinner.update(text=Text.assemble(self.activity, (f"  ·  {calls}  ·  {elapsed}", "dim")))
        return Padding(self._spinner, (1, 0, 0, 1))


class RichScreen(Screen):
    """Colours, highlighted code and a live line. All text is cleaned and never read as markup."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._console.width = min(self._console.width, MAX_WIDTH)
        super().__init__(width=self._console.width)
        self._ticker = _Ticker()

    def opening(self, opening: Opening) -> None:
        """Show what is about to happen."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column()
        for label, text in opening.rows():
            grid.add_row(label, Text(text))
        self._console.print()
        self._console.print(Text(TITLE, style="bold"))
        self._console.print(grid)

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show the live line while something goes on."""
        self._ticker.activity = text
        with Live(
            self._ticker, console=self._console, refresh_per_second=_REDRAWS_PER_S, transient=True,
            redirect_stdout=False, redirect_stderr=False,
        ):  # fmt: skip
            yield

    def sandbox_ready(self, seconds: float) -> None:
        """Show that code can run."""
        self._console.print(Text.assemble(("ready in ", "dim"), (seconds_text(seconds), "green")))
        self._ticker.activity = "iteration 1: the model is thinking"

    def action_chosen(self, record: IterationRecord) -> None:
        """Show reasoning and code."""
        self._ticker.actions += 1
        self._ticker.activity = f"iteration {record.number}: running in the sandbox"
        lines = first_lines(record.code, lines=CODE_LINES, width=self._width - _INDENT - 2)
        more = lines.pop() if lines and lines[-1].startswith("… ") else None
        code: RenderableType = Syntax("\n".join(lines), "python", theme="ansi_dark", background_color="default")
        parts: list[RenderableType] = [Padding(_barred(code), (0, 0, 0, 2))]
        if more is not None:
            parts.append(Padding(Text(f"│ {more}", style="dim"), (0, 0, 0, 2)))
        self._console.print()
        self._console.print(Rule(Text(f" {record.number} ", style="bold cyan"), style="dim", align="left"))
        self._console.print(Padding(Text(one_line(record.reasoning, 3 * self._width), style="italic"), (0, 0, 0, 2)))
        self._console.print(Group(*parts))

    def tool_started(self, record: IterationRecord, tool: ToolRecord) -> None:
        """Show on the live line what the sandbox asks of the host."""
        self._ticker.queries += tool.queries or 0
        batch = f" with {count(tool.queries, 'prompt')}" if tool.queries else ""
        self._ticker.activity = f"iteration {record.number}: {clean(tool.name)}{batch} on the host"

    def tool_progress(self, record: IterationRecord, tool: str, message: str) -> None:
        """Show on the live line how far a tool is."""
        told = one_line(f"{tool} on the host, {message}", self._width // 2)
        self._ticker.activity = f"iteration {record.number}: {told}"

    def iteration_ended(self, record: IterationRecord) -> None:
        """Show output, tool calls and times."""
        failed = record.outcome == "error"
        for line in output_lines(record, self._width - _INDENT):
            self._console.print(Text(" " * _INDENT + line, style="red" if failed else ""))
        for text in tools_text(record.tools):
            self._console.print(Text.assemble(("  ↪ ", "magenta"), (clean(text), "magenta")))
        mark = {"ok": ("  ✓ ", "green"), "submitted": ("  ✓ SUBMIT  ", "bold green")}
        self._console.print(Text.assemble(mark.get(record.outcome, ("  ✗ ", "red")), (times_text(record), "dim")))
        self._ticker.activity = f"iteration {record.number + 1}: the model is thinking"

    def ending(self, ending: Ending) -> None:
        """Show answer, check and totals."""
        for kind, lines in ending.answer.items():
            self._console.print()
            self._console.print(Rule(Text(f" {kind} ({len(lines)}) ", style="bold"), style="dim", align="left"))
            table = Table.grid(padding=(0, 2))
            table.add_column(style="cyan", no_wrap=True)
            table.add_column()
            for name, line in lines.items():
                table.add_row(Text(f"  {clean(name)}"), Text(one_line(str(line), 400)))
            self._console.print(table)
        self._console.print()
        self._console.print(Rule(Text(" checked against the package itself ", style="bold"), style="dim", align="left"))
        for verdict in ending.verdicts:
            mark = ("  ✓ ", "bold green") if verdict.passed else ("  ✗ ", "bold red")
            row = Table.grid()
            row.add_row(Text.assemble(mark), Text(verdict_text(verdict)))
            self._console.print(row)
        self._console.print()
        for text in ending.totals():
            self._console.print(Padding(Text(text, style="dim"), (0, 0, 0, 2)))
        self._console.print(Text.assemble(("  trajectory ", "dim"), str(ending.trajectory)), soft_wrap=True)

    def failure(self, text: str) -> None:
        """Show why there is no answer."""
        self._console.print()
        self._console.print(Text(clean(text), style="red"))


def _barred(content: RenderableType) -> RenderableType:
    """Put a dim bar left of some lines."""
    grid = Table.grid()
    grid.add_column(width=2)
    grid.add_column()
    lines = len(content.code.splitlines()) if isinstance(content, Syntax) else 1
    grid.add_row(Text("\n".join(["│ "] * lines), style="dim"), content)
    return grid
