"""One execution at a time for an interpreter, and the way its errors leave."""

from __future__ import annotations

import threading

from broker.protocol.values import ValueNotSendable
from host_client.dspy_compat import DspyContract
from host_client.errors import BadSetting, SandboxError, SessionBusy


class Alone:
    """Holds off every other execution of an interpreter, and lets errors leave as DSPy expects them."""

    __slots__ = ("_dspy", "_executing")

    def __init__(self, dspy: DspyContract) -> None:
        self._dspy = dspy
        # Held while an execution runs, and never waited for: a second one is refused.
        self._executing = threading.Lock()

    @property
    def held(self) -> bool:
        """Whether an execution runs."""
        return self._executing.locked()

    def __enter__(self) -> None:
        if not self._executing.acquire(blocking=False):
            raise self._dspy.terminal(
                SessionBusy(
                    "this interpreter is executing already",
                    status=409,
                    help="use another interpreter for code that runs inside a tool or in another thread",
                )
            )

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._executing.release()
        if isinstance(error, (SandboxError, ValueNotSendable)):
            raise self._dspy.terminal(_as_ours(error)) from error.__cause__


def _as_ours(error: SandboxError | ValueNotSendable) -> SandboxError:
    return error if isinstance(error, SandboxError) else BadSetting(f"variable {error}")
