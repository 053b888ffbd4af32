"""What history and budgets need of the installed DSPy: callbacks, modules that write code, what a model's call cost.

Beside ``dspy_compat`` the only module that imports ``dspy``, at the first use.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from host_client.dspy_compat import OURS

_RUNS = ("RLM", "CodeAct", "ProgramOfThought", "Flex")
#: Replies come back soon after they were noted; more threads than this do not share a model.
_RECENT = 256


class Usage(NamedTuple):
    """What one call of a model has used."""

    tokens_in: int = 0
    tokens_out: int = 0
    tokens: int = 0
    cost: float | None = None
    cached: bool = False


class ContextPool(ThreadPoolExecutor):
    """A pool whose threads see the context variables of whoever submits."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See ``Executor.submit``."""
        return super().submit(contextvars.copy_context().run, fn, *args, **kwargs)


class DspyParts:
    """Use ``parts()``: one is enough."""

    def __init__(self) -> None:
        import dspy
        from dspy.predict import rlm
        from dspy.utils import callback

        self._dspy = dspy
        self.run_modules: tuple[type, ...] = tuple(getattr(dspy, name) for name in _RUNS if hasattr(dspy, name))
        self.model: type = dspy.BaseLM
        self._callback = callback
        if not _copies_context(rlm):
            # Before 3.3, llm_query_batched forgets dspy.context(), and whose budget it spends, in its threads.
            rlm.ThreadPoolExecutor = ContextPool

    def install(self, observer: Any) -> None:
        """Let an observer see all that happens under the callbacks that are active now; does nothing the second time.

        Added to the list in place: ``dspy.configure`` belongs to one thread, and ``dspy.context`` ends with its block.
        """
        active = self._dspy.settings.callbacks
        if isinstance(active, list) and not any(getattr(callback, OURS, False) for callback in active):
            active.append(observer)

    def active_call(self) -> str | None:
        """Return the id of DSPy's call that is under way in this context."""
        found: str | None = self._callback.ACTIVE_CALL_ID.get()
        return found

    def current_module(self) -> Any:
        """Return the module whose ``forward`` runs in this context, or None."""
        modules = self._dspy.settings.caller_modules
        return modules[-1] if modules else None

    @property
    def notes_usage(self) -> bool:
        """Whether DSPy keeps what calls of models have used."""
        return not self._dspy.settings.disable_history

    def usage(self, model: Any, outputs: Any, inputs: dict[str, Any]) -> Usage | None:
        """Return what a call that has just ended has used, or None where DSPy did not note it."""
        from dspy.clients import base_lm

        for history in (getattr(model, "history", ()), base_lm.GLOBAL_HISTORY):
            for entry in reversed(history[-_RECENT:]):
                if _is_of(entry, outputs, inputs):
                    return _usage(entry)
        return None

    def as_callback(self, observer: type) -> type:
        """Return a class of callbacks that does what this one does, and nothing where it does nothing."""
        return type(observer.__name__, (observer, self._callback.BaseCallback), {})


@functools.cache
def parts() -> DspyParts:
    """Return the parts of the installed DSPy, importing it the first time."""
    return DspyParts()


def _copies_context(rlm: Any) -> bool:
    return hasattr(rlm, "contextvars")


def _is_of(entry: Any, outputs: Any, inputs: dict[str, Any]) -> bool:
    if entry.get("outputs") is outputs:
        return True
    # A typed answer of DSPy 3.4 is another object than the one that was noted.
    messages = inputs.get("messages")
    return messages is not None and entry.get("messages") is messages


def _usage(entry: Any) -> Usage:
    used = entry.get("usage")
    used = used if isinstance(used, dict) else {}
    tokens_in, tokens_out = (_number(used.get(name)) for name in ("prompt_tokens", "completion_tokens"))
    cached = getattr(entry.get("response"), "cache_hit", False) is True
    cost = entry.get("cost")
    priced = isinstance(cost, (int, float)) and not isinstance(cost, bool)
    return Usage(
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        tokens=_number(used.get("total_tokens")) or tokens_in + tokens_out,
        # What comes from the cache was paid before.
        cost=0.0 if cached else float(cost) if priced else None,
        cached=cached,
    )


def _number(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
