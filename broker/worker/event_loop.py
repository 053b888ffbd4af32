"""Top-level ``await``: one event loop for the life of the worker."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

# For tasks that do not end when they are cancelled; then the whole loop is given up.
_CANCEL_GRACE_S = 1.0


class EventLoop:
    """Runs the coroutines of executions. Tasks left behind by one go on while a later one awaits."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine to its end; whatever cuts it short takes all other tasks of the loop along."""
        loop = self._ready()
        task = loop.create_task(coroutine)
        try:
            return loop.run_until_complete(task)
        except Exception:
            raise
        except BaseException:
            self._cancel_everything(loop)
            raise

    def _ready(self) -> asyncio.AbstractEventLoop:
        import asyncio  # 50 ms that only those pay who await

        if self._loop is None or self._loop.is_closed() or self._loop.is_running():
            self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        return self._loop

    def _cancel_everything(self, loop: asyncio.AbstractEventLoop) -> None:
        import asyncio

        self._loop = None  # given up, unless everything below succeeds
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=_CANCEL_GRACE_S))
        for task in tasks:
            if not task.done():
                return
            if not task.cancelled():
                task.exception()  # asked for, so that asyncio does not log it
        self._loop = loop
