"""``SandboxPool``: warm sandboxes, handed out one for each interpreter, and back to the session that they belong to.

The life of a sandbox in a pool is drawn in ``host_client.pool_place``; who gets which is decided in
``host_client.pool_book``; the threads are in ``host_client.pool_core``.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from host_client import endings, pool_registry
from host_client.endings import EXIT_WAIT_S, wait_for_endings
from host_client.errors import BadSetting
from host_client.journal import Journal
from host_client.pool_config import Affinity, Exhaustion, PoolConfig
from host_client.pool_core import PoolCore
from host_client.pool_sandbox import PooledSandbox
from host_client.pool_status import PoolStatus
from host_client.providers.base import SandboxProvider
from host_client.sandbox_session import SandboxSession, default_provider, open_journal
from host_client.settings import SandboxSettings

if TYPE_CHECKING:
    from host_client.factory import InterpreterFactory
    from host_client.interpreter import SandboxInterpreter

#: What an interpreter of a pool takes from the pool.
_OF_THE_POOL = ("settings", "provider", "sandbox", "attach", "secrets", "journal", "pool", "keep")
#: One start, on a slow machine, and one more try.
_WARM_TIMEOUT_S = 60.0


class SandboxPool:
    """Sandboxes that are ready before anybody asks.

        with SandboxPool(name="triage", min_size=2, max_size=4, affinity="strict_queue") as pool:
            rlm = dspy.RLM("report -> severity", interpreter_factory=pool.factory())
            rlm = dspy.RLM("report -> severity", interpreter_factory=pool.factory(session="case-7"))
            with pool.interpreter(session="case-7") as interpreter:   # case-7's own sandbox, its variables in it
                ...

    A sandbox in which generated code has run is never handed to another session. An interpreter without a session name
    gets one that nothing has run in, and it ends with the interpreter. With a name (*affinity*) it is kept at
    ``shutdown`` and goes, variables and all, to the next interpreter of the same name. Where it is in use then:

    - ``hint``: another, fresh one is given; it ends with its interpreter. A kept one may be ended where others need
      its place, and one that is gone is replaced without a word.
    - ``strict_queue``: waits for it. ``strict_fail_fast``: raises ``PoolSessionBusy``. One that is gone raises
      ``PoolSessionGone`` with both, until ``end_session`` says that the session may start anew.

    Where every place is taken (*exhaustion*): ``fail_fast`` raises ``PoolExhausted``; ``wait`` waits in a queue, of at
    most ``max_waiting``, for at most ``wait_timeout_s``; ``overflow`` starts an extra sandbox, which ends after use.
    Whoever holds a place already, which is an RLM within a tool of another one, never waits for a second: it gets an
    extra one, whatever the policy, so nested RLMs cannot wait for each other. This is known from DSPy's context, so it
    holds in the tool, in ``dspy.Parallel`` and in ``asyncio``; threads of your own need
    ``contextvars.copy_context().run``.

    Args:
        name: Its name in this process: ``get_pool(name)``, ``SandboxInterpreter(pool=name)``.
        min_size: Sandboxes kept warm, as far as ``max_size`` leaves places.
        max_size: Most sandboxes at once: warm, in use, kept for a session, starting or ending.
        exhaustion: ``fail_fast``, ``wait`` or ``overflow``.
        affinity: ``hint``, ``strict_queue`` or ``strict_fail_fast``.
        wait_timeout_s: Longest wait for a place or a session's sandbox, in seconds.
        max_waiting: Most who may wait.
        max_uses: How many interpreters of one session get its sandbox before that is ended. Without a name it is
            always one.
        max_age_s: Age at which a sandbox that is not in use is ended, in seconds, or None.
        idle_timeout_s: After how long a kept sandbox that nobody asks for, or a warm one beyond ``min_size``, is
            ended, in seconds, or None.
        health_interval_s: How often warm and kept sandboxes are asked whether they are well. Each is also asked when it
            is handed out.
        settings: How its sandboxes are made; by default read from ``RLM_SANDBOX_*``.
        provider: Where they come from; by default what the settings say.
        prewarm: Begin to start ``min_size`` now, in the background; else at the first use.
        **keywords: For every interpreter of this pool, such as ``tools`` and ``execution_timeout_s``.

    Raises:
        BadSetting: An argument that cannot work, or a name that an open pool has.
    """

    def __init__(
        self,
        *,
        name: str,
        min_size: int = 1,
        max_size: int = 4,
        exhaustion: Exhaustion | str = Exhaustion.WAIT,
        affinity: Affinity | str = Affinity.HINT,
        wait_timeout_s: float = 3600.0,
        max_waiting: int = 1000,
        max_uses: int | None = None,
        max_age_s: float | None = 3600.0,
        idle_timeout_s: float | None = 300.0,
        health_interval_s: float = 30.0,
        settings: SandboxSettings | None = None,
        provider: SandboxProvider | None = None,
        prewarm: bool = True,
        **keywords: Any,
    ) -> None:
        config = PoolConfig(
            name=name,
            min_size=min_size,
            max_size=max_size,
            exhaustion=exhaustion,
            affinity=affinity,
            wait_timeout_s=wait_timeout_s,
            max_waiting=max_waiting,
            max_uses=max_uses,
            max_age_s=max_age_s,
            idle_timeout_s=idle_timeout_s,
            health_interval_s=health_interval_s,
        )
        if settings is not None and not isinstance(settings, SandboxSettings):
            raise BadSetting(f"pool {name!r}: settings must be a SandboxSettings, got {type(settings).__name__}")
        self._set_up(config, settings or SandboxSettings.from_environment(), provider, keywords=keywords)
        self._checked(keywords)
        pool_registry.of_this_process().add(self)
        if prewarm:
            self.prewarm()

    @classmethod
    def of_factories(
        cls,
        config: PoolConfig,
        settings: SandboxSettings,
        provider: SandboxProvider | None,
        journal: Journal | None = None,
    ) -> SandboxPool:
        """Return a pool without a name, for interpreters of factories; closed when nobody refers to it any more."""
        pool = cls.__new__(cls)
        pool._set_up(config, settings, provider, journal=journal)
        weakref.finalize(pool, _close_soon, pool._cores).atexit = False  # the exit closes all pools
        return pool

    def _set_up(
        self,
        config: PoolConfig,
        settings: SandboxSettings,
        provider: SandboxProvider | None,
        *,
        journal: Journal | None = None,
        keywords: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.settings = config, settings
        self._provider, self._journal, self._keywords = provider, journal, dict(keywords or {})
        # One for each process that uses this object. No lock: a fork might leave it taken for ever.
        self._cores: dict[int, PoolCore] = {}

    @property
    def name(self) -> str:
        """Its name."""
        return self.config.name

    def factory(self, session: str | None = None, **keywords: Any) -> InterpreterFactory:
        """Return a callable for DSPy's ``interpreter_factory``: each call makes an interpreter that takes from here.

        Args:
            session: Affinity of all of them: an RLM that is called again finds its sandbox and its variables again.
                Two at once are what the affinity says: a fresh sandbox, a wait, or an error.
            keywords: As for ``SandboxInterpreter``, over those of the pool; settings, secrets, journal and provider are
                the pool's.

        Raises:
            BadSetting: A keyword that cannot work.
        """
        from host_client.interpreter import SandboxInterpreter

        return SandboxInterpreter.factory(**self._checked(keywords), session=session, pool=self)

    def interpreter(self, session: str | None = None, **keywords: Any) -> SandboxInterpreter:
        """Return an interpreter that takes from here when it is started.

        Args:
            session: Its affinity: the sandbox that this session had before, with its variables.
            keywords: As for ``factory``.

        Raises:
            BadSetting: An argument that cannot work.
        """
        from host_client.interpreter import SandboxInterpreter

        return SandboxInterpreter(**self._checked(keywords), session=session, pool=self)

    def acquire(self, session: str | None = None) -> SandboxSession:
        """Take a sandbox and return its open session; for interpreters.

        Raises:
            PoolExhausted, PoolSessionBusy, PoolSessionGone, PoolClosed: There is none to be had; says who holds what.
            SandboxError: None could be started.
        """
        return self._core().acquire(session, f"thread {threading.current_thread().name}")

    def prewarm(self, *, wait: bool = False, timeout_s: float = _WARM_TIMEOUT_S) -> bool:
        """Begin to start sandboxes, where that has not begun.

        Args:
            wait: Return when ``min_size`` are warm, as far as there are places.
            timeout_s: Give up waiting after this long, in seconds.

        Returns:
            Whether they are warm; True where nothing was waited for.

        Raises:
            SandboxError: Why none could be started, where it was waited for.
        """
        if wait:
            return self._core().wait_until_warm(timeout_s)
        self._core().prewarm()
        return True

    def end_session(self, session: str) -> bool:
        """End what is kept for a named session, and let it start anew; one in use ends at its ``shutdown``.

        Returns:
            Whether the pool knew it.
        """
        return self._core().end_session(session)

    def status(self) -> PoolStatus:
        """Return what it holds, who has it, and what happened so far; ``print`` shows it."""
        return self._core().status()

    def close(self, *, wait: bool = True) -> None:
        """End what nobody uses, and forget the name. What is in use ends with its interpreter. Idempotent.

        The exit of the process does this too.

        Args:
            wait: Return when what is ended is gone.
        """
        self._core().close(self.settings.start_timeout_s if wait else 0.0)
        if wait:
            wait_for_endings(EXIT_WAIT_S)
        pool_registry.of_this_process().remove(self)

    def __enter__(self) -> SandboxPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SandboxPool(name={self.name!r}, min_size={self.config.min_size}, max_size={self.config.max_size})"

    def __copy__(self) -> SandboxPool:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SandboxPool:
        return self  # DSPy copies modules together with their factories

    def __reduce__(self) -> tuple[Callable[[str], SandboxPool], tuple[str]]:
        return pool_registry.get_pool, (self.name,)

    def _checked(self, keywords: Mapping[str, Any]) -> dict[str, Any]:
        if "session" in keywords:
            raise BadSetting(
                f"pool {self.name!r}: a session is one factory's or interpreter's: pool.factory(session=...)"
            )
        ours = sorted(set(keywords).intersection(_OF_THE_POOL))
        if ours:
            raise BadSetting(f"pool {self.name!r}: {ours[0]} cannot be set for one interpreter; it is the pool's")
        return {**self._keywords, **keywords}

    def _core(self) -> PoolCore:
        pid = os.getpid()
        core = self._cores.get(pid)
        if core is None:
            made = PoolCore(self.config, self._starter())
            core = self._cores.setdefault(pid, made)
            if core is made:
                pool_registry.of_this_process().opened(core)
        return core

    def _starter(self) -> Callable[[], PooledSandbox]:
        # Without a reference to this object: the threads would keep it alive.
        settings, journal = self.settings, self._journal
        provider = self._provider or default_provider(settings)
        return lambda: PooledSandbox(provider, settings, lambda: journal or open_journal(settings))


def _close_soon(cores: Mapping[int, PoolCore]) -> None:
    """Close a pool, from the garbage collector: any lock may be taken, so another thread does it."""
    core = cores.get(os.getpid())
    if core is not None:
        endings.of_this_process().submit(partial(core.close, 0.0))
