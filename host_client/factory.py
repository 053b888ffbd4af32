"""The zero-argument callable that DSPy asks for interpreters."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from host_client import checks
from host_client.artifacts import INSTRUCTIONS
from host_client.errors import BadSetting
from host_client.history import observer
from host_client.sandbox_session import default_provider
from host_client.settings import SandboxSettings

if TYPE_CHECKING:
    from host_client.budgets import Budget
    from host_client.interpreter import SandboxInterpreter

_KEYWORDS = {
    "tools": None,
    "output_fields": None,
    "execution_timeout_s": 300.0,
    "settings": None,
    "sandbox": None,
    "callbacks": None,
    "session": None,
    "attach": None,
    "idempotent": (),
    "journal": None,
    "secrets": None,
    "on_tool_event": None,
    "artifacts_to": None,
    "budget": None,
}


class InterpreterFactory:
    """Makes interpreters that all look the same; safe to call from many threads.

    It is no interpreter itself: DSPy refuses a factory that could be mistaken for one.

    Args:
        kind: ``SandboxInterpreter`` or a subclass.
        keywords: Its keyword arguments.

    Attributes:
        execution_instructions: Told to the model by RLM.

    Raises:
        BadSetting: A keyword that cannot work.
    """

    def __init__(self, kind: type[SandboxInterpreter], keywords: Mapping[str, Any]) -> None:
        provider = keywords.get("provider")
        given = {name: value for name, value in keywords.items() if name != "provider"}
        unknown = sorted(given.keys() - _KEYWORDS.keys())
        if unknown:
            raise BadSetting(f"factory: unknown keyword {unknown[0]!r}; known are {', '.join(_KEYWORDS)}")
        checks.check_keywords(**{**_KEYWORDS, **given})
        settings = given.get("settings") or SandboxSettings.from_environment()
        if (secrets := given.pop("secrets", None)) is not None:
            settings = dataclasses.replace(settings, secrets=secrets)
        if (settings.history is not False or given.get("budget") is not None) and "dspy" in sys.modules:
            # Made before the run that it is for, whose beginning is seen then.
            observer.install()
        self._kind = kind
        self._keywords = {**given, "settings": settings}
        self.execution_instructions = execution_instructions(
            settings, given.get("budget"), artifacts=given.get("artifacts_to") is not None
        )
        # Guards _provider and _pid: one provider for all interpreters of a process, made at the first call.
        self._lock = threading.Lock()
        self._given_provider = self._provider = provider
        self._pid = os.getpid()

    def __call__(self) -> SandboxInterpreter:
        """Return a fresh interpreter; nothing is started yet."""
        return self._kind(**self._keywords, provider=self._shared_provider())

    def __repr__(self) -> str:
        return f"{self._kind.__name__}.factory({', '.join(f'{k}={v!r:.60}' for k, v in self._keywords.items())})"

    def __copy__(self) -> InterpreterFactory:
        return self  # nothing in it changes

    def __deepcopy__(self, memo: dict[int, Any]) -> InterpreterFactory:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        provider = {} if self._given_provider is None else {"provider": self._given_provider}
        return type(self), (self._kind, {**self._keywords, **provider})

    def _shared_provider(self) -> Any:
        with self._lock:
            if self._given_provider is None and (self._provider is None or self._pid != os.getpid()):
                self._provider, self._pid = default_provider(self._keywords["settings"]), os.getpid()
            return self._provider


def execution_instructions(settings: SandboxSettings, budget: Budget | None = None, *, artifacts: bool = False) -> str:
    """Return what a model should know about the sandbox before it writes code for it."""
    packages = ", ".join(("numpy", "pandas", *settings.packages))
    secrets = f" These environment variables are set: {', '.join(settings.secrets)}." if settings.secrets else ""
    handed_over = INSTRUCTIONS if artifacts else ""
    limited = (
        " What you use is limited: budget() returns what is left. When nothing is left, SUBMIT what you have."
        if budget is not None
        else ""
    )
    network = "with" if settings.network else "without"
    return (
        f"Code runs as full CPython in an isolated Linux container {network} network access. Variables, imports and "
        "functions persist between executions; input variables are set anew before each one. The standard library and "
        f"{packages} are installed; subprocesses, threads and files under /tmp work. What is printed is shown, and the "
        "value of the last expression too. Tools are global functions (see help(tool)); they may be called from "
        f"threads and raise ordinary exceptions. SUBMIT ends the execution at once.{secrets}{handed_over}{limited}"
    )
