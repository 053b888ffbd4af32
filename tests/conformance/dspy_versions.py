"""The same DSPy program, spelled as the installed version wants it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import dspy
from dspy.primitives import code_interpreter
from dspy.utils import DummyLM
from dspy.utils.callback import BaseCallback

_RLM = inspect.signature(dspy.RLM.__init__).parameters
HAS_FACTORY = "interpreter_factory" in _RLM
HAS_CODE_EXECUTION_ERROR = hasattr(code_interpreter, "CodeExecutionError")
HAS_CALLBACKS = hasattr(BaseCallback, "on_interpreter_execute_start")
HAS_SETTING = hasattr(code_interpreter, "resolve_interpreter_factory")
HAS_SERIALIZABLE = hasattr(dspy.RLM, "_prepare_serializable_vars")
HAS_SUB_AGENTS = hasattr(dspy.RLM, "_setup_facade")
HAS_POSITIONAL = HAS_FACTORY and "interpreter" in inspect.signature(dspy.RLM.forward).parameters
HAS_FLEX = hasattr(dspy, "Flex")

Factory = Callable[[], Any]


def only_if(holds: bool, why: str) -> Callable[[Any], Any]:
    """Keep a test only where the installed DSPy has what it is about; elsewhere there is nothing to skip."""
    return lambda test: test if holds else None


def rlm(signature: Any, factory: Factory, *, max_iters: int = 5, **keywords: Any) -> Any:
    """An RLM on this factory; before DSPy 3.3 on one interpreter from it."""
    limit = {"max_iters" if "max_iters" in _RLM else "max_iterations": max_iters}
    if HAS_FACTORY:
        return dspy.RLM(signature, interpreter_factory=factory, **limit, **keywords)
    return dspy.RLM(signature, interpreter=factory(), **limit, **keywords)


def with_interpreter(kind: Any, *args: Any, factory: Factory, **keywords: Any) -> Any:
    """A CodeAct or ProgramOfThought on this factory."""
    if "interpreter_factory" in inspect.signature(kind.__init__).parameters:
        return kind(*args, interpreter_factory=factory, **keywords)
    return kind(*args, interpreter=factory(), **keywords)


def writes(*codes: str) -> DummyLM:
    """A model that writes these pieces of code, one after the other."""
    return DummyLM([{"reasoning": f"step {number}", "code": code} for number, code in enumerate(codes, 1)])


class CallNotes(BaseCallback):
    """Notes what DSPy tells about an interpreter."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._lock = threading.Lock()

    def _note(self, text: str) -> None:
        with self._lock:
            self.notes.append(text)

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._note(f"module {type(instance).__name__}")

    def on_interpreter_execute_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._note(f"execute {inputs['code']}")

    def on_interpreter_execute_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self._note(f"executed {outputs!r}" if exception is None else f"failed {type(exception).__name__}")

    def on_interpreter_tool_call_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._note(f"tool {inputs['tool_name']} {inputs['args']} {inputs['kwargs']}")

    def on_interpreter_tool_call_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self._note(f"tool gave {outputs!r}")

    def on_interpreter_startup_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._note("start")

    def on_interpreter_shutdown_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self._note("shutdown")


def outputs_of(prediction: Any) -> list[str]:
    """What the model saw after each step."""
    return [step["output"] for step in prediction.trajectory]
