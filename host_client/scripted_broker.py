"""A broker without a sandbox, for tests: it does what a script says, and notes what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from host_client.errors import BrokerError, UnknownSandbox
from host_client.providers.base import SandboxHandle
from host_client.scripted_client import ScriptedClient
from host_client.scripted_steps import ScriptedExecution, ScriptedStep, ScriptedToolError, Step
from host_client.settings import SandboxSettings

__all__ = ["ScriptedBroker", "ScriptedExecution", "ScriptedStep", "ScriptedToolError", "Step"]

#: Found by name, and never started.
_NAMED = "scripted"
#: A function in the set-up that DSPy runs in the sandbox for its sub-agents.
_DSPY_SETUP = "_dspy_make_ctor"


class ScriptedBroker:
    r"""A ``SandboxProvider`` whose sandboxes follow a script: no Docker, no process, no socket.

        from host_client.scripted_broker import ScriptedBroker, Step

        broker = ScriptedBroker([
            Step(output="3 chapters\n"),
            lambda execution: Step(value=execution.call("llm_query", "What is it about?")),
            Step(submitted={"answer": "whales"}),
        ])
        rlm = dspy.RLM("book -> answer", interpreter_factory=SandboxInterpreter.factory(provider=broker))
        assert rlm(book="...").answer == "whales"
        assert "SUBMIT" in broker.executions[-1].code

    Each execution takes the next step. A step that is a function runs on a thread of its own, and may call the host's
    tools; what it raises is raised by the "generated code". DSPy 3.4 runs a set-up of its own before the model's first
    code (its sub-agents): pass ``skip`` a function that recognises such code, and it takes no step.

    Args:
        steps: What the executions give, in order.
        skip: Tells whether some code takes no step and gives nothing; by default DSPy's own set-up.

    Attributes:
        executions: The executions so far, without the skipped ones.
        started: How many sandboxes were started.
        stopped: How many of them were stopped.
        death: What ``why_dead`` answers.
    """

    def __init__(
        self, steps: Iterable[ScriptedStep] = (), *, skip: Callable[[str], bool] = lambda code: _DSPY_SETUP in code
    ) -> None:
        self.executions: list[ScriptedExecution] = []
        self.started = self.stopped = 0
        self.death: str | None = None
        self._steps, self._skip = iter(steps), skip
        # Guards the script, the counters and _clients.
        self._lock = threading.Lock()
        self._clients: dict[str, ScriptedClient] = {}

    def start(self, settings: SandboxSettings, *, name: str | None = None) -> SandboxHandle:
        """Count a start."""
        with self._lock:
            self.started += 1
            sandbox_id = f"scripted-{self.started}"
        return self._handle(sandbox_id, name or _NAMED)

    def find(self, name: str) -> SandboxHandle:
        """Return the sandbox ``scripted``; there is no other."""
        if name != _NAMED:
            raise UnknownSandbox(f"no running sandbox is called {name!r}")
        return SandboxHandle(sandbox_id=_NAMED, name=name, socket_path=Path(_NAMED), owned=False)

    def reachable(self, address: str) -> list[SandboxHandle]:
        """Return the sandboxes that were asked for a client so far."""
        with self._lock:
            return [self._handle(sandbox_id) for sandbox_id in self._clients]

    def adopt(self, handle: SandboxHandle) -> None:
        """Nothing ends by itself."""

    def disown(self, handle: SandboxHandle) -> None:
        """Nothing ends by itself."""

    def why_dead(self, handle: SandboxHandle) -> str | None:
        """Return what the test said in ``death``."""
        return self.death

    def stop(self, handle: SandboxHandle) -> None:
        """Count a stop, and end the sandbox's sessions."""
        with self._lock:
            self.stopped += 1
            client = self._clients.pop(handle.sandbox_id, None)
        if client is not None:
            client.lose("shutdown")

    def connect(self, handle: SandboxHandle) -> ScriptedClient:
        """Return the sandbox's client."""
        with self._lock:
            made = ScriptedClient(self._take_step, lambda: self.death is not None)
            return self._clients.setdefault(handle.sandbox_id, made)

    def die(self, reason: str) -> None:
        """Let every sandbox end now, for ``reason``: whoever waits meets a broker that is gone."""
        self.death = reason
        for client in list(self._clients.values()):
            client.lose(reason)

    def _handle(self, sandbox_id: str, name: str = _NAMED) -> SandboxHandle:
        owned = sandbox_id != _NAMED
        return SandboxHandle(sandbox_id=sandbox_id, name=name, socket_path=Path(_NAMED), owned=owned)

    def _take_step(self, execution: ScriptedExecution) -> ScriptedStep:
        if self._skip(execution.code):
            return Step()
        with self._lock:
            self.executions.append(execution)
            step = next(self._steps, None)
        if step is None:
            number = len(self.executions)
            raise BrokerError(f"the script has no step {number}, for this code:\n{execution.code}")
        return step
