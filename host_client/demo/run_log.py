"""What happened in one run of an RLM: iterations, their executions and their tool calls, with times."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

Clock = Callable[[], float]


@dataclasses.dataclass(slots=True, kw_only=True)
class ToolRecord:
    """Calls of one tool.

    Attributes:
        name: The tool's name.
        queries: How many prompts a batched sub-query held, or None for other tools.
        seconds: How long the host ran it.
        error: Class name of what it raised, or None.
    """

    name: str
    queries: int | None
    seconds: float = 0.0
    error: str | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class IterationRecord:
    """One turn of the loop.

    Attributes:
        number: 1-based.
        reasoning: What the model said.
        code: What it wrote, code fences removed.
        model_s: Seconds until the model's reply was there.
        execute_s: Seconds of the execution, tools included.
        tools_s: Seconds of these during which at least one tool ran on the host.
        tools: The tool calls, in the order in which they ended.
        output: What the REPL gave back (also the text of an error).
        outcome: ``running``, ``ok``, ``error`` or ``submitted``.
    """

    number: int
    reasoning: str
    code: str
    model_s: float
    execute_s: float = 0.0
    tools_s: float = 0.0
    tools: list[ToolRecord] = dataclasses.field(default_factory=list)
    output: str = ""
    outcome: str = "running"

    @property
    def sandbox_s(self) -> float:
        """Seconds spent in the sandbox itself."""
        return max(0.0, self.execute_s - self.tools_s)


class Watcher(Protocol):
    """What shows a run while it goes on. Called from several threads, one at a time."""

    def sandbox_ready(self, seconds: float) -> None:
        """The interpreter has started."""

    def action_chosen(self, record: IterationRecord) -> None:
        """The model replied; its code runs next."""

    def tool_started(self, record: IterationRecord, tool: ToolRecord) -> None:
        """Generated code called the host."""

    def tool_progress(self, record: IterationRecord, tool: str, message: str) -> None:
        """A tool said how far it is."""

    def iteration_ended(self, record: IterationRecord) -> None:
        """The code ended, in whichever way."""


class RunLog:
    """Collects the records of one run and passes each change to a watcher.

    Args:
        watcher: What shows the run.
        clock: Monotonic seconds.
    """

    def __init__(self, watcher: Watcher, *, clock: Clock = time.monotonic) -> None:
        self._watcher = watcher
        self._clock = clock
        # Guards everything below and the calls to the watcher: tools end in threads of their own.
        self._lock = threading.Lock()
        self.iterations: list[IterationRecord] = []
        self.startup_s = 0.0
        self._idle_since = clock()
        self._executing_since: float | None = None
        self._tools_running = 0
        self._tools_since = 0.0

    @property
    def sub_queries(self) -> int:
        """How many prompts generated code sent to the sub-model."""
        return sum(tool.queries or 0 for record in self.iterations for tool in record.tools)

    @property
    def tool_calls(self) -> int:
        """How many times generated code called the host."""
        return sum(len(record.tools) for record in self.iterations)

    def sandbox_ready(self, seconds: float) -> None:
        """Note that the interpreter has started."""
        with self._lock:
            self.startup_s += seconds
            self._idle_since = self._clock()
            self._watcher.sandbox_ready(seconds)

    def action_chosen(self, reasoning: str, code: str) -> None:
        """Note the model's reply; those of sub-agents, which run within an execution, are left out."""
        with self._lock:
            if self._executing_since is not None:
                return
            self._close_unexecuted()
            record = IterationRecord(
                number=len(self.iterations) + 1,
                reasoning=reasoning,
                code=code,
                model_s=self._clock() - self._idle_since,
            )
            self.iterations.append(record)
            self._watcher.action_chosen(record)

    def _close_unexecuted(self) -> None:
        """End the last record if DSPy never ran its code (it refuses a fence of another language)."""
        if self.iterations and self.iterations[-1].outcome == "running":
            self.iterations[-1].output, self.iterations[-1].outcome = "(not executed)", "error"
            self._watcher.iteration_ended(self.iterations[-1])

    def execution_started(self) -> None:
        """Note that the current iteration's code starts."""
        with self._lock:
            self._executing_since = self._clock()

    def execution_ended(self, output: str, outcome: str) -> None:
        """Note how the code ended."""
        with self._lock:
            now = self._clock()
            started, self._executing_since, self._idle_since = self._executing_since, None, now
            if not self.iterations or started is None:
                return
            record = self.iterations[-1]
            record.execute_s, record.output, record.outcome = now - started, output, outcome
            self._watcher.iteration_ended(record)

    def tool_started(self, name: str, queries: int | None) -> ToolRecord:
        """Note that generated code called the host."""
        tool = ToolRecord(name=name, queries=queries)
        with self._lock:
            tool.seconds = -self._clock()
            self._tools_running += 1
            if self._tools_running == 1:
                self._tools_since = self._clock()
            if self.iterations:
                self._watcher.tool_started(self.iterations[-1], tool)
        return tool

    def tool_progress(self, name: str, message: str) -> None:
        """Note what a running tool reports."""
        with self._lock:
            if self.iterations:
                self._watcher.tool_progress(self.iterations[-1], name, message)

    def tool_ended(self, tool: ToolRecord, error: str | None) -> None:
        """Note that a tool returned or raised."""
        with self._lock:
            now = self._clock()
            tool.seconds += now
            tool.error = error
            self._tools_running -= 1
            if self.iterations:
                self.iterations[-1].tools.append(tool)
                if self._tools_running == 0:
                    self.iterations[-1].tools_s += now - self._tools_since

    def to_json(self) -> list[dict[str, Any]]:
        """Return the records as JSON-ready dicts."""
        with self._lock:
            return [dataclasses.asdict(record) for record in self.iterations]
