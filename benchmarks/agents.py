"""The processes in which the contenders are measured, seen from the one that compares them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: A contender that takes longer for one request has hung, or is too slow to be compared.
ANSWER_LIMIT_S = 150.0
_START_LIMIT_S = 600.0  # the first start may build an image
_CLOSE_LIMIT_S = 60.0


class AgentGone(Exception):
    """The process ended or hung; the message says which, and its last words."""


class Agent:
    """A contender's process.

    Args:
        kind: A key of ``contenders.kinds()``.
        checkout: Where ``host_client`` comes from.
        label: Its name in the tables, in place of its own.
        quick: As for ``cases.all_cases``.

    Attributes:
        name: Shown in the tables.
        lacks: Keys of ``contenders.LACKS``.
        slow: See ``Contender``.
        unavailable: Why it cannot run here, or None.
    """

    def __init__(self, kind: str, *, checkout: Path = ROOT, label: str | None = None, quick: bool = False) -> None:
        own = checkout / ".venv" / "bin" / "python"
        python = str(own) if checkout != ROOT and own.exists() else sys.executable
        command = [python, str(ROOT / "benchmarks" / "agent.py"), str(checkout), kind, "quick" if quick else "full"]
        self.name, self.lacks, self.slow = label or kind, frozenset[str](), False
        self.unavailable: str | None = None
        self._label = label
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            cwd=checkout,
            start_new_session=True,
        )
        self._rest = b""

    @property
    def pid(self) -> int:
        """The process' id."""
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait until it has started; fills the attributes."""
        try:
            told = self._read(_START_LIMIT_S)
        except AgentGone as error:
            self.unavailable = str(error)
            return
        self.unavailable = told.get("unavailable")
        if self.unavailable is None:
            self.name = self._label or told["name"]
            self.lacks, self.slow = frozenset(told["lacks"]), told["slow"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and return the reply.

        Raises:
            AgentGone: It ended, or gave no answer for ``ANSWER_LIMIT_S``; it is ended then.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise AgentGone(f"its process ended ({error})") from error
        return self._read(ANSWER_LIMIT_S)

    def close(self) -> None:
        """Let it shut its interpreters down, and end it if it does not."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            self._process.stdin.close()
        try:
            self._process.wait(_CLOSE_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._kill()

    def _read(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                self._kill()
                raise AgentGone(f"no answer within {limit_s:.0f} s")
            got = os.read(self._process.stdout.fileno(), 1 << 16)
            if not got:
                raise AgentGone(f"its process ended with status {self._process.wait(_CLOSE_LIMIT_S)}")
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def start(kinds: list[str], *, against: Path | None, quick: bool) -> tuple[list[Agent], dict[str, str]]:
    """Start the agents side by side.

    Returns:
        Those that can run, and for the others why not, by name.
    """
    agents = [Agent(kind, quick=quick) for kind in kinds]
    if against is not None:
        agents.insert(1, Agent("sandbox", checkout=against.resolve(), label="before", quick=quick))
    for agent in agents:
        agent.wait_ready()
    missing = {agent.name: agent.unavailable for agent in agents if agent.unavailable is not None}
    for agent in agents:
        if agent.unavailable is not None:
            agent.close()
    return [agent for agent in agents if agent.unavailable is None], missing
