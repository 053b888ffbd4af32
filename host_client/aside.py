"""Asks a session for what is not generated code's affair: files, artefacts, which packages there are.

Everything runs as an ordinary execution, so the broker knows nothing of it; ``broker/worker/aside.py`` is the other
side. What comes back was made next to generated code: it is read as strictly as anything else from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from broker.protocol.messages import Outcome
from host_client.errors import FileRefused, MalformedReply
from host_client.results import ExecutionRecord

CODE = "from broker.worker.aside import serve as __rlm_sandbox_serve__\n__rlm_sandbox_serve__()"
REQUEST = "__rlm_sandbox_request__"
#: One step is a few megabytes; longer than this the session is stuck.
STEP_TIMEOUT_S = 60.0

#: Runs code with variables in the session and returns the record; other executions are kept off by the caller.
Run = Callable[[str, dict[str, Any]], ExecutionRecord]


class Aside:
    """Asks one session.

    Args:
        run: Runs code in it.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def ask(self, operation: str, **arguments: Any) -> Any:
        """Return the session's answer; any value, of any shape.

        Raises:
            FileRefused: The session says that it cannot be done.
            MalformedReply: It gave no answer of the kind.
            SandboxError: What an execution raises.
        """
        record = self._run(CODE, {REQUEST: {"operation": operation, **arguments}})
        if record.outcome is not Outcome.OK:
            why = record.outcome.value if record.error is None else f"{record.error.type}: {record.error.message}"
            raise MalformedReply(f"the session could not do {operation!r}: {why:.500}")
        reply = record.value
        if isinstance(reply, str):
            return reply
        if not isinstance(reply, dict):
            raise MalformedReply(f"the session gave no answer to {operation!r}")
        if "error" in reply:
            raise FileRefused(f"{reply['error']!s:.500}", path=f"{reply.get('path', '')!s:.500}")
        return reply.get("answer")
