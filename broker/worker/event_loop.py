"""Top-level ``await``: one event loop for the life of the worker."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from broker.worker.cells import is_generated

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

    def waiting_tasks(self) -> int:
        """Return how many tasks have not come to their end."""
        if self._loop is None:
            return 0
        import asyncio

        return len(asyncio.all_tasks(self._loop))

    def forget(self) -> None:
        """In a forked process: give up the loop, whose selector is the other process' too."""
        self._loop = None

    def _ready(self) -> asyncio.AbstractEventLoop:
        import asyncio  # 50 ms that only those pay who await

        if self._loop is None or self._loop.is_closed() or self._loop.is_running():
            self._loop = asyncio.new_event_loop()
            self._loop.set_exception_handler(_report)
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


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Let asyncio log what nobody asked for, but no interrupts: they were dealt with."""
    if not isinstance(context.get("exception"), (KeyboardInterrupt, SystemExit)):
        loop.default_exception_handler(context)


def raise_in_loop(
    frame: types.FrameType | None, error: type[BaseException], *, still_wanted: Callable[[], bool]
) -> bool:
    """Raise an exception from a callback of the event loop whose own code ``frame`` belongs to.

    Raised inside the loop's code, it could strike between taking a task off the queue and running it; then nobody
    would ever run that task again, not even to cancel it.

    Args:
        frame: The innermost frame of the calling thread.
        error: What to raise; asyncio must let it through (KeyboardInterrupt, SystemExit).
        still_wanted: Asked when the callback runs.

    Returns:
        False where no loop's code runs there, or generated code runs inside of it; then nothing was done.
    """
    base_events = sys.modules.get("asyncio.base_events")
    if base_events is None:
        return False

    def raise_now() -> None:
        if still_wanted():
            raise error

    run_forever = base_events.BaseEventLoop.run_forever.__code__
    while frame is not None and not is_generated(frame.f_code):
        if frame.f_code is run_forever:
            frame.f_locals["self"].call_soon_threadsafe(raise_now)
            return True
        frame = frame.f_back
    return False
