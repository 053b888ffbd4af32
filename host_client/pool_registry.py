"""The pools of this process: those with a name, and those that factories share."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from host_client.at_exit import at_exit
from host_client.endings import EXIT_WAIT_S, wait_for_endings
from host_client.errors import BadSetting, UnknownPool

if TYPE_CHECKING:
    from host_client.pool import SandboxPool
    from host_client.pool_core import PoolCore


#: Pools of factories that outlive their factories.
_MAX_SHARED = 4


class PoolRegistry:
    """The open pools of one process.

    Args:
        named: Those that it begins with: what has a name in the parent has it in a forked child, with nothing in it.
    """

    def __init__(self, named: Mapping[str, SandboxPool] | None = None) -> None:
        # Guards all below.
        self._lock = threading.Lock()
        self._named: dict[str, SandboxPool] = dict(named or {})
        self._shared: list[SandboxPool] = []
        self._cores: set[PoolCore] = set()
        self._has_exit_hook = False

    def add(self, pool: SandboxPool) -> None:
        """Register a pool by its name.

        Raises:
            BadSetting: Another open pool has that name.
        """
        with self._lock:
            if pool.name in self._named:
                raise BadSetting(
                    f"pool {pool.name!r}: there is one of that name",
                    help=f"host_client.get_pool({pool.name!r}) returns it; close it first to make another",
                )
            self._named[pool.name] = pool

    def get(self, name: str) -> SandboxPool:
        """Return the open pool of that name.

        Raises:
            UnknownPool: There is none.
        """
        with self._lock:
            pool, known = self._named.get(name), sorted(self._named)
        if pool is None:
            there = f"open are {', '.join(known)}" if known else "none is open"
            raise UnknownPool(
                f"there is no pool {name!r:.80}; {there}", help=f"SandboxPool(name={name!r:.80}) makes it"
            )
        return pool

    def named(self) -> dict[str, SandboxPool]:
        """Return the pools by name; takes no lock, which a fork might have left taken."""
        return self._named.copy()

    def remove(self, pool: SandboxPool) -> None:
        """Forget a pool that was closed."""
        with self._lock:
            if self._named.get(pool.name) is pool:
                del self._named[pool.name]
            self._shared = [each for each in self._shared if each is not pool]

    def shared(self, matches: Callable[[SandboxPool], bool], make: Callable[[], SandboxPool]) -> SandboxPool:
        """Return the shared pool that matches, made where there is none.

        The few that were asked for last are held here, so that a program which makes a factory for each request has a
        use for them; any other is held by its factories, and ends with them.
        """
        with self._lock:
            pool = next(filter(matches, self._shared), None) or make()
            self._shared = [pool, *(each for each in self._shared if each is not pool)][:_MAX_SHARED]
            return pool

    def opened(self, core: PoolCore) -> None:
        """Note a pool that may hold sandboxes: the exit of the process closes it."""
        with self._lock:
            self._cores = {each for each in self._cores if not each.over_and_done} | {core}
            first, self._has_exit_hook = not self._has_exit_hook, True
        if first:
            at_exit(self.close_all)

    def close_all(self) -> None:
        """End what the pools of this process hold; runs at its exit."""
        give_up_at = time.monotonic() + EXIT_WAIT_S
        with self._lock:
            cores, self._cores, self._shared = list(self._cores), set(), []
        for core in cores:
            core.close(0.0)  # all of them stop starting before the first is waited for
        for core in cores:
            core.close(max(0.0, give_up_at - time.monotonic()))
        wait_for_endings(max(0.0, give_up_at - time.monotonic()))


# One for each process: a forked child has none of its parent's warm sandboxes.
_of_processes: dict[int, PoolRegistry] = {}


def of_this_process() -> PoolRegistry:
    """Return the registry of the calling process."""
    pid = os.getpid()
    if pid not in _of_processes:
        parents = list(_of_processes.values())
        _of_processes.setdefault(pid, PoolRegistry(parents[-1].named() if parents else None))
    return _of_processes[pid]


def get_pool(name: str) -> SandboxPool:
    """Return the open pool of that name in this process.

    Raises:
        UnknownPool: There is none; the message names those that are.
    """
    return of_this_process().get(name)


def found(pool: SandboxPool | str | None) -> SandboxPool | None:
    """Return a pool that is given as such, or by its name.

    Raises:
        UnknownPool: There is none of that name.
    """
    return get_pool(pool) if isinstance(pool, str) else pool
