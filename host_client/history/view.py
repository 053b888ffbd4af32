"""``rlm-sandbox history``: the runs for people, and as JSON for programs. All text is made safe for a terminal."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from host_client.demo.shorten import clean, count, first_lines, one_line, seconds_text
from host_client.errors import HistoryUnusable
from host_client.history.export import as_dict, run_as_dict
from host_client.history.records import NO_MODULE, RUNNING, CallRow, ExecutionRow, IterationRow, RunRow, WholeRun
from host_client.history.store import History, default_path, path_of
from host_client.settings import SandboxSettings
from host_client.spending import QUERY, QUERY_BATCHED

HEADINGS = ("ID", "WHEN", "RUN", "ITER", "CALLS", "TOKENS", "COST", "TIME", "OUTCOME")

#: Shown of a text without --full, in lines.
_REASONING_LINES, _CODE_LINES, _OUTPUT_LINES, _MESSAGE_LINES = 6, 30, 12, 12
_ALL = 1_000_000
_MIN_WIDTH, _ROOMY = 60, 100
#: The column that gives way.
_RUN_COLUMN, _MIN_RUN_CHARS = 2, 8


def of_settings(settings: SandboxSettings) -> History:
    """Return the history that the settings mean; where recording is off, what was recorded before."""
    return History(path_of(settings.history) or default_path())


def show_runs(history: History, *, limit: int, as_json: bool) -> int:
    """Print the newest runs, oldest first.

    Raises:
        HistoryUnusable: The history cannot be read.
    """
    runs = history.runs(limit)
    if as_json:
        for run in runs:
            print(json.dumps(run_as_dict(run)))
    elif runs:
        print("\n".join(table(runs, _width())))
    else:
        print(f"no run is recorded in {history.path}")
    return 0


def show_run(history: History, run_id: str, *, full: bool) -> int:
    """Print one run, iteration by iteration.

    Raises:
        UnknownRun, HistoryUnusable: It cannot be read.
    """
    print("\n".join(run_lines(history.find(run_id), _width(), full=full)))
    return 0


def show_prompts(history: History, run_id: str, *, full: bool) -> int:
    """Print what a run's models were asked and what they answered.

    Raises:
        UnknownRun, HistoryUnusable: It cannot be read.
    """
    found = history.prompts(run_id)
    for call in found:
        print("\n".join(prompt_lines(call, _width(), full=full)))
    if not found:
        print(f"no call of a model is recorded of the run {run_id}")
    return 0


def export_run(history: History, run_id: str, out: Path | None) -> int:
    """Write one run as JSON, to a file or to stdout.

    Raises:
        UnknownRun, HistoryUnusable: It cannot be read, or the file not be written.
    """
    text = json.dumps(as_dict(history.find(run_id)), indent=2, ensure_ascii=out is None)
    if out is None:
        print(text)
        return 0
    try:
        # Prompts and outputs are nobody else's business.
        with open(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        raise HistoryUnusable(f"the run cannot be written to {out}: {error.strerror}") from error
    print(f"{out}: {len(text):,} characters")
    return 0


def table(runs: list[RunRow], width: int) -> list[str]:
    """Lay runs out in columns that fit a width."""
    today = datetime.date.today()
    clock = "%H:%M" if width < _ROOMY else "%H:%M:%S"
    rows = [HEADINGS, *(_cells(run, today, clock) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    gap = " " if width < _ROOMY else "  "
    others = sum(widths) - widths[_RUN_COLUMN] + len(gap) * (len(widths) - 1)
    widths[_RUN_COLUMN] = max(_MIN_RUN_CHARS, min(widths[_RUN_COLUMN], width - others))
    return [
        gap.join(one_line(cell, size).ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def run_lines(whole: WholeRun, width: int, *, full: bool) -> Iterator[str]:
    """Yield a run's text."""
    yield from _head(whole, width)
    executions: dict[int, list[ExecutionRow]] = {}
    calls: dict[int, list[CallRow]] = {}
    for execution in whole.executions:
        executions.setdefault(execution.iteration, []).append(execution)
    for call in whole.calls:
        calls.setdefault(call.iteration, []).append(call)
    steps = {step.number: step for step in whole.iterations}
    for number in sorted({0, *steps, *executions, *calls}):
        ran, asked = executions.get(number, []), calls.get(number, [])
        if ran and number == 0 and whole.run.module != NO_MODULE and not full:
            # Before its first iteration, DSPy sets the session up with code of its own.
            yield from ["", f"set-up: {count(len(ran), 'execution')}, --full shows the code"]
            continue
        if number or ran or asked:
            yield ""
        if number:
            yield _rule(number, steps.get(number), [call for call in asked if _is_own(call)], width)
        yield from _step(steps.get(number), width, full)
        for execution in ran:
            yield from _execution(execution, steps.get(number), width, full)
        yield from _calls([call for call in asked if not _is_own(call)], width, full)
    if whole.run.error and not any(step.error == whole.run.error for step in whole.iterations):
        yield from ["", *_block(whole.run.error, width, _OUTPUT_LINES, full)]


def prompt_lines(call: CallRow, width: int, *, full: bool) -> Iterator[str]:
    """Yield what a model was asked and what it answered."""
    via = f" for {call.via}" if call.via else ""
    yield _ruled(f"{call.number}: {call.name}{via}, {_moment(call.started_at):%H:%M:%S}, {_used(call)}", width)
    for message in _json(call.prompt, []):
        role, content = (
            (message.get("role", "user"), message.get("content")) if isinstance(message, dict) else ("", message)
        )
        yield f"{one_line(str(role), 20)}:"
        yield from _block(_text(content), width, _MESSAGE_LINES, full)
    for answer in _json(call.answer, []):
        yield "answer:"
        yield from _block(_text(answer), width, _MESSAGE_LINES, full)
    if call.error:
        yield from ["error:", *_block(call.error, width, _MESSAGE_LINES, full)]
    yield ""


def _head(whole: WholeRun, width: int) -> Iterator[str]:
    run = whole.run
    yield one_line(f"run {run.id}, {_name(run)}", width)
    spent = [
        count(run.iterations, "iteration"),
        count(run.executions, "execution"),
        count(run.calls, "sub-call"),
        f"{run.tokens:,} tokens",
        _cost(run),
    ]
    when = f"{_moment(run.started_at):%Y-%m-%d %H:%M:%S}, {_duration(run)}, {_outcome(run)}"
    yield from textwrap.wrap(f"{when}: {', '.join(spent)}", width)
    for title, values in (("input", run.inputs), ("output", run.outputs)):
        for name, value in _json(values, {}).items():
            yield one_line(f"{title} {name}: {_text(value)}", width)
    if run.parent_id:
        yield f"inside the run {run.parent_id}"
    for nested in whole.nested:
        yield one_line(f"nested run {nested.id}, {_name(nested)}, {_outcome(nested)}, {_duration(nested)}", width)


def _rule(number: int, step: IterationRow | None, own: list[CallRow], width: int) -> str:
    parts = [str(number)] if step is None or step.kind == "action" else [f"{number} {step.kind}"]
    if own:
        parts.append(f"model {seconds_text(sum(call.duration_s for call in own))}")
        parts.append(f"{sum(call.tokens_in for call in own):,} + {sum(call.tokens_out for call in own):,} tokens")
    return _ruled(", ".join(parts), width)


def _step(step: IterationRow | None, width: int, full: bool) -> Iterator[str]:
    if step is None:
        return
    if step.reasoning:
        wrapped = "\n".join(line for part in step.reasoning.splitlines() for line in textwrap.wrap(clean(part), width))
        yield from first_lines(wrapped, lines=_ALL if full else _REASONING_LINES, width=width)
    if step.code is not None:
        yield "code"
        yield from _block(_without_fences(step.code), width, _CODE_LINES, full)
    if step.error:
        yield from ["error", *_block(step.error, width, _OUTPUT_LINES, full)]


def _execution(ran: ExecutionRow, step: IterationRow | None, width: int, full: bool) -> Iterator[str]:
    if step is None or step.code is None or _without_fences(step.code).strip() != ran.code.strip():
        yield "code that ran"
        yield from _block(ran.code, width, _CODE_LINES, full)
    yield f"output ({ran.outcome}, {seconds_text(ran.duration_s)})"
    # An error says what was printed before it.
    text = ran.error or ran.output
    if text:
        yield from _block(text, width, _OUTPUT_LINES, full)


def _calls(asked: list[CallRow], width: int, full: bool) -> Iterator[str]:
    models = [call for call in asked if call.kind == "model"]
    if asked:
        tokens = sum(call.tokens_in + call.tokens_out for call in models)
        yield f"calls ({count(len(models), 'call')} of models, {tokens:,} tokens)" if models else "calls"
    for call in asked:
        if call.via in (QUERY, QUERY_BATCHED) and not full:
            continue  # the tool's own row has its prompts
        name = call.name if call.kind == "tool" else f"{call.name} for {call.via}"
        yield "  " + one_line(f"{name}, {_used(call)}", width - 2)
        yield from ("  " + line for line in _block(_prompt(call), width - 2, 2, full))
        if full and call.answer is not None:
            answer = _block(_text(_json(call.answer, "")), width - 2, 2, full)
            yield from ["  answer:", *("  " + line for line in answer)]


def _used(call: CallRow) -> str:
    parts = [seconds_text(call.duration_s)]
    if call.tokens_in or call.tokens_out:
        parts.append(f"{call.tokens_in:,} + {call.tokens_out:,} tokens")
    if call.cached:
        parts.append("from the cache")
    if call.answer_chars is not None:
        parts.append(f"answer {call.answer_chars:,} characters")
    if call.error:
        parts.append(one_line(call.error, 60))
    return ", ".join(parts)


def _prompt(call: CallRow) -> str:
    value = _json(call.prompt, "")
    if call.kind == "model":
        return "\n".join(_text(item.get("content") if isinstance(item, dict) else item) for item in value)
    if not isinstance(value, dict):
        return _text(value)
    arguments = [_text(item) for item in value.get("args", ())]
    return ", ".join([*arguments, *(f"{name}={_text(item)}" for name, item in value.get("kwargs", {}).items())])


def _is_own(call: CallRow) -> bool:
    """Whether it is a step of the run's own model."""
    return call.kind == "model" and not call.via


def _block(text: str, width: int, lines: int, full: bool) -> list[str]:
    return [
        "    " + line for line in first_lines(text, lines=_ALL if full else lines, width=_ALL if full else width - 4)
    ]


def _ruled(title: str, width: int) -> str:
    title = one_line(title, width - 6)
    return f"── {title} {'─' * (width - len(title) - 4)}"


def _cells(run: RunRow, today: datetime.date, clock: str) -> tuple[str, ...]:
    when = _moment(run.started_at)
    return (
        run.id,
        when.strftime(clock) if when.date() == today else f"{when:%m-%d %H:%M}",
        f"└ {_name(run)}" if run.parent_id else _name(run),
        str(run.iterations),
        str(run.calls),
        f"{run.tokens:,}" if run.tokens < 10_000 else f"{run.tokens / 1000:,.0f}k",
        _cost(run),
        _duration(run),
        _outcome(run),
    )


def _name(run: RunRow) -> str:
    return clean(f"{run.module} {run.signature}".strip())


def _cost(run: RunRow) -> str:
    return f"${run.cost:.{2 if run.cost >= 1 else 4}f}" if run.cost else "-" if run.unpriced or not run.tokens else "$0"


def _duration(run: RunRow) -> str:
    return "-" if run.duration_s is None else seconds_text(run.duration_s)


def _outcome(run: RunRow) -> str:
    return "cut off" if run.outcome == RUNNING and not _lives(run.process) else run.outcome


def _lives(process: int) -> bool:
    try:
        os.kill(max(process, 1), 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return process > 0


def _moment(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).astimezone()


def _json(text: Any, otherwise: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else otherwise
    except ValueError:
        return otherwise


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _without_fences(code: str) -> str:
    lines = code.strip("\n").splitlines()
    if lines and lines[0].lstrip().startswith("```"):
        lines = lines[1:]
    if lines and lines[-1].strip() == "```":
        lines = lines[:-1]
    return "\n".join(lines)


def _width() -> int:
    return max(_MIN_WIDTH, shutil.get_terminal_size((100, 24)).columns)
