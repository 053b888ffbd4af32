"""The zero-argument callable that DSPy asks for interpreters."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from host_client import checks, pool_registry
from host_client.artifacts import INSTRUCTIONS
from host_client.connected_sandbox import is_slow
from host_client.errors import BadSetting
from host_client.history import observer
from host_client.pool import SandboxPool
from host_client.pool_config import MAX_PLACES, Exhaustion, PoolConfig
from host_client.providers.base import SandboxProvider
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
    "pool": None,
    "keep": False,
}

#: After this long without an RLM, no container waits for the next one.
_REST_AFTER_S = 600.0
_SURPLUS_S = 60.0
#: Give these, and the sandbox is not one like all others.
_NOT_POOLED = ("sandbox", "session", "attach")


class InterpreterFactory:
    """Makes interpreters that all look the same; safe to call from many threads.

    It is no interpreter itself: DSPy refuses a factory that could be mistaken for one.

    From its first call on, ``settings.warm_pool_size`` fresh sandboxes are kept ready in the background, so that an
    interpreter has one in milliseconds. Factories with equal settings share them. They end with the process, after ten
    minutes without use, or with the factory and its interpreters. None is kept for a named sandbox or session.

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
        checks.check_keywords(**{**_KEYWORDS, **given}, provider=provider)
        pool = pool_registry.found(given.get("pool"))
        settings = settings_of(pool, given.get("settings"), given.pop("secrets", None))
        if (settings.history is not False or given.get("budget") is not None) and "dspy" in sys.modules:
            # Made before the run that it is for, whose beginning is seen then.
            observer.install()
        self._kind = kind
        self._keywords = {**given, "settings": settings}
        self.execution_instructions = execution_instructions(
            settings, given.get("budget"), artifacts=given.get("artifacts_to") is not None
        )
        # Guards _provider, _pid and _own_pool: one provider for all interpreters of a process, made at the first call.
        self._lock = threading.Lock()
        self._given_provider = self._provider = provider
        self._pid = os.getpid()
        self._own_pool: SandboxPool | None = None

    def __call__(self) -> SandboxInterpreter:
        """Return a fresh interpreter. It starts nothing itself, but the sandboxes to be kept ready begin to start."""
        if self._keywords.get("pool") is not None:
            return self._kind(**self._keywords)
        pool = self._warm_pool()
        if pool is None:
            return self._kind(**self._keywords, provider=self._shared_provider())
        pool.prewarm()
        # The journal is the pool's, which has the session opened.
        return self._kind(**{**self._keywords, "journal": None}, pool=pool)

    def prewarm(self, *, wait: bool = False, timeout_s: float = 60.0) -> bool:
        """Begin to keep sandboxes ready now, instead of at the first call.

        Args:
            wait: Return when they are.
            timeout_s: Give up waiting after this long, in seconds.

        Returns:
            Whether they are, or begin to be; False where this factory keeps none.

        Raises:
            SandboxError: Why none could be started, where it was waited for.
        """
        pool = pool_registry.found(self._keywords.get("pool")) or self._warm_pool()
        return pool is not None and pool.prewarm(wait=wait, timeout_s=timeout_s)

    def __repr__(self) -> str:
        return f"{self._kind.__name__}.factory({', '.join(f'{k}={v!r:.60}' for k, v in self._keywords.items())})"

    def __copy__(self) -> InterpreterFactory:
        return self  # nothing in it changes

    def __deepcopy__(self, memo: dict[int, Any]) -> InterpreterFactory:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        provider = {} if self._given_provider is None else {"provider": self._given_provider}
        return type(self), (self._kind, {**self._keywords, **provider})

    def _warm_pool(self) -> SandboxPool | None:
        settings, provider = self._keywords["settings"], self._shared_provider()
        named = any(self._keywords.get(name) is not None for name in _NOT_POOLED)
        if named or settings.warm_pool_size == 0 or not is_slow(provider):
            return None
        with self._lock:
            if self._own_pool is None:
                self._own_pool = self._make_pool(settings, provider)
            return self._own_pool

    def _make_pool(self, settings: SandboxSettings, provider: SandboxProvider) -> SandboxPool:
        journal = self._keywords.get("journal")
        if self._given_provider is not None or journal is not None:
            return SandboxPool.of_factories(_warm_config(settings), settings, provider, journal)
        return pool_registry.of_this_process().shared(
            lambda pool: pool.settings == settings,
            lambda: SandboxPool.of_factories(_warm_config(settings), settings, provider),
        )

    def _shared_provider(self) -> Any:
        with self._lock:
            if self._given_provider is None and (self._provider is None or self._pid != os.getpid()):
                self._provider, self._pid = default_provider(self._keywords["settings"]), os.getpid()
            return self._provider


def settings_of(
    pool: SandboxPool | None, settings: SandboxSettings | None, secrets: Mapping[str, str] | Collection[str] | None
) -> SandboxSettings:
    """Return how an interpreter's sandbox is made; in a pool they are all alike.

    Raises:
        BadSetting: Other settings than the pool's, or a variable of the environment that cannot be read.
    """
    if pool is None:
        made = settings if settings is not None else SandboxSettings.from_environment()
        return made if secrets is None else dataclasses.replace(made, secrets=secrets)
    if secrets is not None or (settings is not None and settings != pool.settings):
        raise BadSetting(f"pool {pool.name!r}: its settings and secrets are the same for all; give them to the pool")
    return pool.settings


def _warm_config(settings: SandboxSettings) -> PoolConfig:
    return PoolConfig(
        name="of-factories",
        min_size=settings.warm_pool_size,
        max_size=MAX_PLACES,
        exhaustion=Exhaustion.OVERFLOW,
        idle_timeout_s=_SURPLUS_S,
        rest_after_s=_REST_AFTER_S,
    )


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
