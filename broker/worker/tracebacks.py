"""Exceptions as text: frames of generated code and of the libraries below it, none of the worker."""

from __future__ import annotations

import linecache
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

import broker.protocol
from broker.protocol.messages import ErrorInfo
from broker.worker.cells import is_generated
from broker.worker.display import clip, safe_str, type_name

MAX_FRAMES = 30
MAX_TRACEBACK_CHARS = 20_000
MAX_MESSAGE_CHARS = 20_000
# Part of one source line shown for a syntax error.
_MAX_LINE_CHARS = 300

_WORKER_FOLDERS = (str(Path(__file__).parent), str(Path(broker.protocol.__file__).parent))
# Frames of the worker are taken away afterwards; a call through a wrapper has a handful.
_SPARE_FRAMES = 15

_get_traceback = BaseException.__dict__["__traceback__"].__get__


def describe(error: BaseException) -> ErrorInfo:
    """Return an exception as text. Runs generated code (``__str__``); never raises an Exception itself."""
    message = clip(safe_str(error), MAX_MESSAGE_CHARS)
    return ErrorInfo(
        type=type_name(type(error)),
        message=message,
        traceback=clip(format_traceback(error), MAX_TRACEBACK_CHARS),
        lineno=_innermost_line(_get_traceback(error)),
    )


def format_traceback(error: BaseException) -> str:
    """Return the traceback with its causes, or a short one for an exception that cannot be formatted."""
    try:
        summary = traceback.TracebackException(
            type(error), error, _get_traceback(error), limit=-(MAX_FRAMES + _SPARE_FRAMES), compact=True
        )
        for each in _linked(summary):
            _without_worker(each)
        return "".join(summary.format())
    except Exception:
        return f"{type_name(type(error))}: {safe_str(error)}\n"


def describe_syntax_error(error: SyntaxError) -> ErrorInfo:
    """Return a compiler's complaint with the line and a caret below it, as Python prints it."""
    where = f" (line {error.lineno})" if error.lineno else ""
    message = f"{error.msg}{where}{_marked_line(error)}"
    kind = type_name(type(error))
    return ErrorInfo(type=kind, message=message, traceback=f"{kind}: {message}\n", lineno=error.lineno or None)


def _marked_line(error: SyntaxError) -> str:
    # The compiler's later passes know the place but not the text.
    text = error.text or linecache.getline(str(error.filename), error.lineno or 0)
    if not text or not error.lineno:
        return ""
    line = text.split("\n")[0].rstrip()
    text = line.lstrip(" \t\f")
    if error.offset is None or error.offset < 1:
        return f"\n    {text[:_MAX_LINE_CHARS]}"
    start = max(error.offset - 1 - (len(line) - len(text)), 0)
    same_line = error.end_lineno == error.lineno and error.end_offset is not None
    length = max((error.end_offset or 0) - error.offset, 1) if same_line else 1
    first = max(start - _MAX_LINE_CHARS // 2, 0)
    shown = text[first : first + _MAX_LINE_CHARS]
    carets = "^" * min(length, max(len(shown) - (start - first), 1))
    return f"\n    {shown}\n    {' ' * (start - first)}{carets}"


def _linked(summary: traceback.TracebackException) -> Iterator[traceback.TracebackException]:
    """Yield the exception, its causes and the members of groups."""
    pending, seen = [summary], 0
    while pending and seen < 1000:
        each = pending.pop()
        seen += 1
        yield each
        pending += [e for e in (each.__cause__, each.__context__, *(getattr(each, "exceptions", None) or ())) if e]


def _without_worker(summary: traceback.TracebackException) -> None:
    frames = [frame for frame in summary.stack if not frame.filename.startswith(_WORKER_FOLDERS)]
    summary.stack[:] = frames[-MAX_FRAMES:]


def _innermost_line(tb: types.TracebackType | None) -> int | None:
    found = None
    while tb is not None:
        if is_generated(tb.tb_frame.f_code):
            found = tb.tb_lineno
        tb = tb.tb_next
    return found
