"""Making text fit a terminal, and safe for it: all of it comes from a model or out of the sandbox."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable

from host_client.demo.run_log import IterationRecord, ToolRecord

CODE_LINES, OUTPUT_LINES = 12, 7

_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Co"})


def clean(text: str) -> str:
    """Replace what could steer a terminal (escape sequences, text direction) and expand tabs."""
    return "".join(
        char if char == "\n" or unicodedata.category(char) not in _UNSAFE else "\N{REPLACEMENT CHARACTER}"
        for char in text.expandtabs(4)
    )


def one_line(text: str, width: int) -> str:
    """Return text on one line of at most ``width`` characters."""
    text = " ".join(clean(text).split())
    return text if len(text) <= width else text[: max(1, width - 1)].rstrip() + "…"


def first_lines(text: str, *, lines: int, width: int) -> list[str]:
    """Return the first lines, each cut to ``width``, and one that says how many more there are."""
    all_lines = clean(text).strip("\n").splitlines()
    if len(all_lines) == lines + 1:  # a line that says "1 more line" would take the place of that line
        lines += 1
    shown = [line if len(line) <= width else line[: width - 1] + "…" for line in all_lines[:lines]]
    hidden = len(all_lines) - len(shown)
    return [*shown, f"… {hidden} more lines"] if hidden else shown


def output_lines(record: IterationRecord, width: int) -> list[str]:
    """Return the lines to show of an output: its start, or the end of a traceback, where the error is."""
    lines = clean(record.output).strip().splitlines()
    if record.outcome == "error":
        lines = lines[-3:]
    # A long line (a printed list) gets a second row: half a list of names would be a pity.
    rows = [row for line in lines for row in _rows(line, width)]
    return first_lines("\n".join(rows), lines=OUTPUT_LINES, width=width)


def _rows(line: str, width: int) -> list[str]:
    rows = textwrap.wrap(line, width, subsequent_indent="  ", drop_whitespace=False, break_on_hyphens=False)
    if len(rows) > 2:
        rows = [rows[0], rows[1].rstrip()[: width - 2] + " …"]
    return [row.rstrip() for row in rows] or [""]


def seconds_text(seconds: float) -> str:
    """Return a duration with two or three digits: ``0.4 ms``, ``14 ms``, ``1.2 s``, ``3 min 20 s``."""
    if seconds < 0.001:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def tool_text(tool: ToolRecord) -> str:
    """Describe a tool call: ``llm_query_batched, 11 prompts, 0.9 s``."""
    parts = [tool.name]
    if tool.name == "llm_query_batched":
        parts.append(count(tool.queries or 0, "prompt"))
    parts.append(seconds_text(tool.seconds) if tool.error is None else f"raised {tool.error}")
    return ", ".join(parts)


def tools_text(tools: Iterable[ToolRecord]) -> list[str]:
    """Describe tool calls, many calls of one tool in one line."""
    grouped: dict[str, list[ToolRecord]] = {}
    for tool in tools:
        grouped.setdefault(tool.name, []).append(tool)
    return [_group_text(name, group) for name, group in grouped.items()]


def _group_text(name: str, group: list[ToolRecord]) -> str:
    if len(group) <= 1:
        return tool_text(group[0])
    failed = sum(tool.error is not None for tool in group)
    errors = f", {failed} raised" if failed else ""
    longest = max(tool.seconds for tool in group)
    return f"{name}, {len(group)} calls{errors}, the longest {seconds_text(longest)}"


def times_text(record: IterationRecord) -> str:
    """Say where an iteration's time went."""
    parts = [f"model {seconds_text(record.model_s)}", f"sandbox {seconds_text(record.sandbox_s)}"]
    if record.tools:
        parts.append(f"host tools {seconds_text(record.tools_s)}")
    return " · ".join(parts)


def count(number: int, noun: str) -> str:
    """Return ``1 prompt`` or ``2 prompts``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
