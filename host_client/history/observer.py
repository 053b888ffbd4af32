"""What DSPy tells through its callbacks: when runs, their steps and their calls of models begin and end.

Callbacks only observe: what they raise, DSPy logs and goes on. Limits are enforced where code executes and calls
(``watch``).
"""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple

from host_client import spending
from host_client.budgets import Budget
from host_client.dspy_compat import OURS
from host_client.errors import BadSetting
from host_client.history.dspy_parts import Usage, parts
from host_client.history.runs import Run, current_run


class _Step(NamedTuple):
    run: Run
    number: int
    began_at: float
    began: float


class _ModelCall(NamedTuple):
    run: Run | None
    model: Any
    inputs: dict[str, Any]
    began: float
    via: str


class RunObserver:
    """A DSPy callback (``dspy_parts`` makes it one); safe to call from many threads. There is one in a process."""

    def __init__(self) -> None:
        # What is under way, by DSPy's id of the call. Each id is put and taken by one thread.
        self._open: dict[str, Run | _Step | _ModelCall] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> RunObserver:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return the_observer, ()  # whoever pickles DSPy's settings gets the one of the process that reads them

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Open a run, or note the beginning of a step of one."""
        dspy = parts()
        if isinstance(instance, dspy.model):  # before 3.3, DSPy takes models that are no dspy.LM for modules
            self.on_lm_start(call_id, instance, inputs)
        elif isinstance(instance, dspy.run_modules):
            run = begin(instance, inputs, call_id)
            self._open[call_id] = run
            spending.open_account(run)
        elif (around := current_run()) is not None and _is_step(around, dspy.active_call()):
            self._open[call_id] = _Step(around, around.step_began(), time.time(), time.perf_counter())

    def on_module_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        """Close what was opened."""
        opened = self._open.pop(call_id, None)
        if isinstance(opened, Run):
            spending.close_account(opened)
            opened.finish(outputs, exception, ended=outputs is not None or exception is not None)
        elif isinstance(opened, _Step):
            duration_s = time.perf_counter() - opened.began
            opened.run.step_ended(opened.number, opened.began_at, duration_s, outputs, exception)
        elif opened is not None:
            self._model_ended(opened, outputs, exception)

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        """Count a sub-call, if a tool makes it."""
        if spending.accounts.get():
            spending.begin_model_call()
            tool = spending.current_tool()
            run = current_run()
            nested = tool is not None and run is not None and run in tool.around
            via = tool.tool if tool is not None and nested else ""
            self._open[call_id] = _ModelCall(run, instance, inputs, time.perf_counter(), via)

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        """Charge what it has used."""
        opened = self._open.pop(call_id, None)
        if isinstance(opened, _ModelCall):
            self._model_ended(opened, outputs, exception)

    def _model_ended(self, call: _ModelCall, outputs: Any, exception: BaseException | None) -> None:
        duration_s = time.perf_counter() - call.began
        used = None if exception is not None else parts().usage(call.model, outputs, call.inputs)
        if used is not None:
            spending.note_model_call(tokens=used.tokens, cost=used.cost or 0.0, priced=used.cost is not None)
        if call.run is None:
            return
        call.run.model_called(
            model=str(getattr(call.model, "model", type(call.model).__name__)),
            via=call.via,
            duration_s=duration_s,
            messages=_messages(call.inputs),
            answer=None if exception is not None else _outputs(outputs),
            used=used or Usage(),
            error=exception,
        )


setattr(RunObserver, OURS, True)


@functools.cache
def the_observer() -> RunObserver:
    """Return the one observer of this process, as a callback of DSPy's."""
    observer: RunObserver = parts().as_callback(RunObserver)()
    return observer


def install() -> None:
    """See to it that runs are seen, under the callbacks that are active in this context."""
    parts().install(the_observer())


def watch_models(budget: Budget) -> None:
    """See to it that a budget's spending is seen.

    Raises:
        BadSetting: It limits tokens or cost, and DSPy was told not to note them.
    """
    install()
    if budget.counts_usage and not parts().notes_usage:
        raise BadSetting(f"{budget!r} cannot be counted: dspy.settings.disable_history is on, so DSPy notes no usage")


def begin(module: Any, inputs: dict[str, Any], call_id: str | None) -> Run:
    """Return a new run of a module."""
    kwargs = inputs.get("kwargs")
    signature = getattr(getattr(module, "signature", None), "signature", "")
    return Run(
        type(module).__name__,
        signature=str(signature),
        inputs=dict(kwargs) if isinstance(kwargs, dict) else {},
        call_id=call_id,
        module_id=id(module),
    )


def run_here() -> tuple[Run | None, bool]:
    """Return the run whose module is at work right here, such as one that has just asked for an interpreter.

    Returns:
        The run, or None; and whether it is new, because DSPy has not told of its beginning. That is so where
        ``dspy.context(callbacks=...)`` was opened after the last ``install``.
    """
    dspy = parts()
    module = dspy.current_module()
    if not isinstance(module, dspy.run_modules):
        return None, False
    around = current_run()
    if around is not None and around.module_id == id(module):
        return around, False
    return begin(module, {}, dspy.active_call()), True


def _is_step(run: Run, parent_call: str | None) -> bool:
    """Tell whether what begins now is called by the run's module itself, not by a tool or by a module below it."""
    return run.call_id == parent_call and not spending.is_nested(run)


def _messages(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    messages = inputs.get("messages")
    if isinstance(messages, list) and messages:
        return [message if isinstance(message, dict) else {"role": "user", "content": message} for message in messages]
    prompt = inputs.get("prompt")
    if prompt is None:  # positional, since 3.3
        items = inputs.get("items") or inputs.get("request") or ""
        prompt = items[0] if isinstance(items, tuple) and items else items
    return [{"role": "user", "content": prompt if isinstance(prompt, (str, list)) else str(prompt)}]


def _outputs(outputs: Any) -> list[str]:
    if not isinstance(outputs, list):
        outputs = [getattr(outputs, "text", outputs)]
    return [str(item.get("text", item)) if isinstance(item, dict) else str(item) for item in outputs]
