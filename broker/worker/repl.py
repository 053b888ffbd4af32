"""The namespace of a session, and one execution in it."""

from __future__ import annotations

import builtins
import dataclasses
import inspect
import sys
import types
from collections.abc import Sequence
from typing import Any

from broker.protocol.frames import Blob
from broker.protocol.messages import ErrorInfo, Outcome
from broker.protocol.values import Decoder, Encoder
from broker.worker.cells import FILENAME_PREFIX, Cell, Sources, compile_cell
from broker.worker.current import Execution
from broker.worker.display import display, is_plain, safe_str, type_name
from broker.worker.event_loop import EventLoop
from broker.worker.interrupts import interruptible
from broker.worker.tracebacks import describe, describe_syntax_error

# Below this, not even the worker itself could run.
_MIN_RECURSION_LIMIT = 250
_DEFAULT_RECURSION_LIMIT = 1000

# Blobs of variables up to this stay until the result was sent: to free their pages takes 120 us for 1 MiB.
_FREED_LATE_BYTES = 4 << 20


@dataclasses.dataclass(slots=True)
class Ending:
    """How an execution ended, as the broker is told."""

    outcome: Outcome
    value: Any = None
    display: str | None = None
    error: ErrorInfo | None = None
    blobs: Sequence[Blob] = ()


class _CannotStart(Exception):
    """Nothing ran; holds what the host is told."""

    def __init__(self, outcome: Outcome, error: ErrorInfo) -> None:
        self.ending = Ending(outcome, error=error)


class Repl:
    """A session's namespace: the ``__dict__`` of a real ``__main__``, so that pickling and forking work."""

    def __init__(self) -> None:
        self._module = types.ModuleType("__main__")
        self.namespace: dict[str, Any] = self._module.__dict__
        self._kept: dict[str, Any] = {}
        self._bindings: dict[str, Any] = {}
        self._sources = Sources(self.namespace)
        self._loop = EventLoop()
        self._count = 0
        self._hooks = sys.gettrace(), sys.getprofile()
        sys.modules["__main__"] = self._module
        self.bind({})

    def bind(self, functions: dict[str, Any]) -> None:
        """Set the names that every execution starts with: SUBMIT and the tools. Older ones of ours go."""
        for name, function in self._bindings.items():
            if name not in functions and self.namespace.get(name) is function:
                del self.namespace[name]
        self._bindings = {"__builtins__": builtins, "__name__": "__main__", **functions}

    def drop(self, ids: Sequence[str]) -> None:
        """Forget kept values."""
        for kept_id in ids:
            self._kept.pop(kept_id, None)

    def waiting_tasks(self) -> int:
        """Return how many tasks wait in the event loop."""
        return self._loop.waiting_tasks()

    def forget_loop(self) -> None:
        """In a copy of the worker: begin with an event loop of its own."""
        self._loop.forget()

    def run(self, execution: Execution, source: str, variables: dict[str, Any], blobs: Sequence[Blob]) -> Ending:
        """Inject, compile, run; whatever generated code does, this returns how it ended."""
        self._restore_limits()
        try:
            ending = interruptible(self._run, execution, source, variables, blobs)
        except _CannotStart as refused:
            ending = refused.ending
        except BaseException as error:
            self._restore_hooks(execution)
            ending = self._ending_of(execution, error)
        self._restore_hooks(execution)
        if execution.submission is not None:
            return Ending(Outcome.SUBMITTED, execution.submission.value, blobs=execution.submission.blobs)
        return ending

    def _run(self, execution: Execution, source: str, variables: dict[str, Any], blobs: Sequence[Blob]) -> Ending:
        """Everything that may take long or run generated code: an interrupt may strike anywhere in here."""
        if execution.interrupts:
            raise KeyboardInterrupt
        if variables:
            self._inject(variables, blobs)
            if isinstance(blobs, list) and sum(map(len, blobs)) > _FREED_LATE_BYTES:
                blobs.clear()  # a large value is in memory once from here on
        self.namespace.update(self._bindings)
        value = self._evaluate(self._compile(source))
        return _ending_with(value)

    def _inject(self, variables: dict[str, Any], blobs: Sequence[Blob]) -> None:
        decoder = Decoder(blobs, kept=self._kept, arrays=True)
        decoded = {}
        for name, encoded in variables.items():
            try:
                decoded[name] = decoder.decode(encoded)
            except Exception as error:
                message = f"variable {name!r} could not be set: {safe_str(error)}; nothing ran"
                raise _CannotStart(Outcome.RAISED, ErrorInfo(type=type_name(type(error)), message=message)) from None
        self.namespace.update(decoded)

    def _compile(self, source: str) -> Cell:
        self._count += bool(source)  # a rehearsal has none, and nothing to look up
        filename = f"{FILENAME_PREFIX}{self._count}>"
        if source:
            self._sources.add(filename, source)
        try:
            return compile_cell(source, filename)
        except SyntaxError as error:
            raise _CannotStart(Outcome.SYNTAX_ERROR, describe_syntax_error(error)) from None

    def _evaluate(self, cell: Cell) -> Any:
        if cell.is_async:
            return self._loop.run(self._await(cell))
        if cell.body is not None:
            exec(cell.body, self.namespace)
        return None if cell.last is None else eval(cell.last, self.namespace)  # noqa: S307

    async def _await(self, cell: Cell) -> Any:
        """Both parts in one task, so that they share their context variables."""
        value = None
        for part in (cell.body, cell.last):
            if part is not None:
                value = eval(part, self.namespace)  # noqa: S307
                if part.co_flags & inspect.CO_COROUTINE:
                    value = await value
        return None if cell.last is None else value

    def _ending_of(self, execution: Execution, error: BaseException) -> Ending:
        try:
            info = interruptible(describe, error)
        except BaseException as second:
            self._restore_hooks(execution)
            message = f"its text could not be read: {type_name(type(second))}"
            info = ErrorInfo(type=type_name(type(error)), message=message)
        if execution.interrupts:
            return Ending(Outcome.INTERRUPTED, error=dataclasses.replace(info, message=info.message or "interrupted"))
        if isinstance(error, SystemExit):
            message = f"exit({info.message}) does not end the session; call SUBMIT(...) to hand over the result"
            info = dataclasses.replace(info, message=message)
        return Ending(Outcome.RAISED, error=info)

    def _restore_limits(self) -> None:
        if sys.getrecursionlimit() < _MIN_RECURSION_LIMIT:
            sys.setrecursionlimit(_DEFAULT_RECURSION_LIMIT)

    def _restore_hooks(self, execution: Execution) -> None:
        if execution.unwinding is not None:
            execution.unwinding.stop()
            execution.unwinding = None
        trace, profile = self._hooks
        if sys.gettrace() is not trace:
            sys.settrace(trace)
        if sys.getprofile() is not profile:
            sys.setprofile(profile)


def _ending_with(value: Any) -> Ending:
    """The ending of code that ran to its end, with the last expression's value."""
    if value is None:
        return Ending(Outcome.OK)
    shown = display(value)
    if not is_plain(value):
        return Ending(Outcome.OK, value=shown, display=shown)
    encoder = Encoder(listify=True, lazy=True)
    try:
        return Ending(Outcome.OK, value=encoder.encode(value, "value"), display=shown, blobs=encoder.blobs)
    except Exception:
        return Ending(Outcome.OK, value=shown, display=shown)
