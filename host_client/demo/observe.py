"""Watching an RLM from outside: a wrapper around its interpreter and a DSPy callback. Nothing is patched.

The wrapper works with every supported DSPy; the interpreter callbacks that DSPy has since 3.3.1 do not
reach back to 3.1.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from typing import Any

from dspy.primitives.code_interpreter import FinalOutput
from dspy.utils.callback import BaseCallback

from host_client.demo.run_log import RunLog
from host_client.progress import PROGRESS, ToolEvent


class ActionCallback(BaseCallback):  # type: ignore[misc]
    """Hands the RLM's chosen actions to the log; give it to ``dspy.context(callbacks=[...])``."""

    def __init__(self, log: RunLog) -> None:
        self._log = log

    def on_adapter_parse_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
        """Take replies that have the two fields of an action."""
        if isinstance(outputs, dict) and {"reasoning", "code"} <= outputs.keys():
            self._log.action_chosen(str(outputs["reasoning"]), strip_fences(str(outputs["code"])))


class WatchedInterpreter:
    """An interpreter that reports executions and tool calls to a ``RunLog``; otherwise as the inner one.

    Args:
        inner: Any ``dspy`` code interpreter.
        log: Where to report.
    """

    def __init__(self, inner: Any, log: RunLog) -> None:
        self._inner = inner
        self._log = log
        self._started = False
        if getattr(inner, "on_tool_event", self) is None:  # ours, and nobody else listens
            inner.on_tool_event = self._tool_event

    @property
    def tools(self) -> dict[str, Callable[..., Any]]:
        """The inner interpreter's live dict: DSPy adds its tools to it."""
        tools: dict[str, Callable[..., Any]] = self._inner.tools
        return tools

    @property
    def output_fields(self) -> Any:
        """The fields of SUBMIT; DSPy sets them."""
        return self._inner.output_fields

    @output_fields.setter
    def output_fields(self, fields: Any) -> None:
        self._inner.output_fields = fields

    def start(self) -> None:
        """Start the inner interpreter once and report how long that took."""
        if not self._started:
            before = time.monotonic()
            self._inner.start()
            self._started = True
            self._log.sandbox_ready(time.monotonic() - before)

    def execute(self, code: str, variables: dict[str, Any] | None = None) -> Any:
        """Run code in the inner interpreter and report it."""
        self.start()
        self._watch_tools()
        if _is_setup(variables):
            return self._inner.execute(code, variables)
        self._log.execution_started()
        try:
            result = self._inner.execute(code, variables)
        except BaseException as error:
            self._log.execution_ended(f"{type(error).__name__}: {error}", "error")
            raise
        submitted = isinstance(result, FinalOutput)
        self._log.execution_ended(as_text(result), "submitted" if submitted else "ok")
        return result

    def shutdown(self) -> None:
        """Shut the inner interpreter down."""
        self._inner.shutdown()

    def _tool_event(self, event: ToolEvent) -> None:
        if event.kind == PROGRESS:
            self._log.tool_progress(event.tool, event.message)

    def _watch_tools(self) -> None:
        for name, tool in self.tools.items():
            if not name.startswith("__") and not hasattr(tool, "__watched__"):
                self.tools[name] = watch_tool(name, tool, self._log)


def _is_setup(variables: dict[str, Any] | None) -> bool:
    """Tell DSPy's own set-up (sub-agents since 3.4.1, SandboxSerializable inputs) from an iteration's code."""
    return any(name.startswith(("__dspy_", "_raw_")) for name in variables or ())


def watch_tool(name: str, tool: Callable[..., Any], log: RunLog) -> Callable[..., Any]:
    """Wrap a tool, plain or async, so that its calls are reported; signature and docstring stay."""
    if inspect.iscoroutinefunction(tool):

        @functools.wraps(tool)
        async def watched_async(*args: Any, **kwargs: Any) -> Any:
            with _Reported(name, args, kwargs, log):
                return await tool(*args, **kwargs)

        watched: Callable[..., Any] = watched_async
    else:

        @functools.wraps(tool)
        def watched_plain(*args: Any, **kwargs: Any) -> Any:
            with _Reported(name, args, kwargs, log):
                return tool(*args, **kwargs)

        watched = watched_plain
    watched.__watched__ = True  # type: ignore[attr-defined]
    return watched


class _Reported:
    """Reports one tool call from its start to its end."""

    def __init__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], log: RunLog) -> None:
        self._log = log
        self._tool = log.tool_started(name, _count_queries(name, args, kwargs))

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        self._log.tool_ended(self._tool, None if kind is None else kind.__name__)


def _count_queries(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    if name == "llm_query":
        return 1
    if name == "llm_query_batched":
        prompts = kwargs.get("prompts", args[0] if args else ())
        return len(prompts) if hasattr(prompts, "__len__") else 0
    return None


def as_text(result: Any) -> str:
    """Return the text that an RLM makes of a result."""
    if isinstance(result, FinalOutput):
        return ""
    if isinstance(result, list):
        return "\n".join(map(str, result))
    return str(result) if result else ""


def strip_fences(code: str) -> str:
    """Remove a Markdown fence around code, for display."""
    lines = code.strip().splitlines()
    if lines and lines[0].startswith("```"):
        lines = lines[1:]
    if lines and lines[-1].strip() == "```":
        lines = lines[:-1]
    return "\n".join(lines).strip("\n")
