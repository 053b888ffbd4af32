"""The interpreters that are compared, each made ready by the same few methods."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.processes import Processes

Tools = dict[str, Callable[..., Any]]

#: What a contender may lack, and how the report puts it.
LACKS = {
    "tools": "generated code cannot call the host",
    "threads": "generated code has no threads",
    "pandas": "it has no pandas",
}
# For the cost curves: three times a 1 GiB context and its copies, and as much printed as they ask for.
_ROOMY: dict[str, Any] = {"memory": 6 << 30, "max_output_bytes": 8 << 20, "tmpfs": 2 << 30}


class Contender:
    """One interpreter under test.

    Attributes:
        name: Shown in the tables.
        lacks: Keys of ``LACKS``: cases that need them are left out, by name.
        slow: Whether one execution takes so long that ``--quick`` leaves out what is heavy.
        keeps_warm: Whether its factory may keep some started.
    """

    name = "?"
    lacks: frozenset[str] = frozenset()
    slow = False
    keeps_warm = False

    def make(self, tools: Tools, variant: str = "plain") -> Any:
        """Return an interpreter that is not started.

        Args:
            tools: Host functions.
            variant: ``plain``; ``memory_journal``, ``idempotent``, ``roomy`` mean something to us only.
        """
        raise NotImplementedError

    def factory(self, tools: Tools) -> Callable[[], Any]:
        """Return what makes interpreters for a program that asks for many: with a warm pool, where there is one."""
        return lambda: self.make(tools)

    def discard(self, interpreter: Any) -> None:
        """End an interpreter where its end is not what is measured."""
        interpreter.shutdown()

    @contextlib.contextmanager
    def opener(self, tools: Tools) -> Iterator[Callable[[], Any]]:
        """Give a function that opens one more session, sharing whatever this contender's sessions can share."""
        yield lambda: self.make(tools)

    def processes(self, interpreter: Any) -> Processes:
        """Return the processes behind a started interpreter by role, this one left out."""
        raise NotImplementedError


class Sandbox(Contender):
    """This project, of this checkout or of the one that Python finds first."""

    name = "rlm-sandbox"
    keeps_warm = True

    def __init__(self) -> None:
        self._count = itertools.count()
        # The process of each sandbox; asking the engine takes as long as twenty executions.
        self._supervisors: dict[str, int] = {}

    def make(self, tools: Tools, variant: str = "plain") -> Any:
        from host_client import SandboxInterpreter, SandboxSettings

        settings: dict[str, Any] = {"memory_journal": {"journal": ":memory:"}, "roomy": _ROOMY}.get(variant, {})
        return SandboxInterpreter(
            tools=tools,
            settings=SandboxSettings.from_environment(**settings),
            idempotent=list(tools) if variant == "idempotent" else (),
            execution_timeout_s=None,
        )

    def factory(self, tools: Tools) -> Callable[[], Any]:
        from host_client import SandboxInterpreter, SandboxSettings

        known = {field.name for field in dataclasses.fields(SandboxSettings)}
        # Older checkouts have no preloads.
        preload: dict[str, Any] = {"preload": ("numpy", "pandas")} if "preload" in known else {}
        return SandboxInterpreter.factory(tools=tools, settings=SandboxSettings.from_environment(**preload))

    @contextlib.contextmanager
    def opener(self, tools: Tools) -> Iterator[Callable[[], Any]]:
        from host_client import SandboxInterpreter, SandboxSettings

        name = f"bench-{os.getpid()}-{next(self._count)}"
        # What many sessions cost each other, not what they cost the disk.
        settings = SandboxSettings.from_environment(journal=":memory:")
        self._command("up", name)
        try:
            yield lambda: SandboxInterpreter(tools=tools, sandbox=name, settings=settings, execution_timeout_s=None)
        finally:
            self._command("down", name)

    def processes(self, interpreter: Any) -> Processes:
        sandbox_id = interpreter.sandbox_handle.sandbox_id
        if sandbox_id not in self._supervisors:
            command = ["docker", "inspect", "--format", "{{.State.Pid}}", sandbox_id]
            self._supervisors[sandbox_id] = int(subprocess.check_output(command))
        return processes.sandbox_roles(self._supervisors[sandbox_id])

    def _command(self, *arguments: str) -> None:
        """Run the ``rlm-sandbox`` command of the checkout that this process uses."""
        import host_client

        checkout = Path(str(host_client.__file__)).resolve().parents[1]
        room = {"RLM_SANDBOX_MAX_SESSIONS": "64", "RLM_SANDBOX_MEMORY": "4g"}
        command = [sys.executable, "-m", "host_client.cli", *arguments]
        done = subprocess.run(
            command,
            env={**os.environ, **room, "PYTHONPATH": str(checkout)},
            cwd=checkout,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"rlm-sandbox {' '.join(arguments)} failed: {done.stderr.strip()}")


class Local(Contender):
    """DSPy's own interpreter without a sandbox: a child process and two pipes."""

    name = "LocalInterpreter"

    def make(self, tools: Tools, variant: str = "plain") -> Any:
        from dspy import LocalInterpreter

        return LocalInterpreter(tools=tools)

    def processes(self, interpreter: Any) -> Processes:
        return {"worker": list(processes.tree(interpreter._process.pid))}


def kinds() -> dict[str, Callable[[], Contender]]:
    """Return the contenders by the name that ``agent.py`` is given; making one may raise ``Unavailable``."""
    from benchmarks.deno_interpreter import Deno
    from benchmarks.llm_sandbox_interpreter import LlmSandbox

    return {"sandbox": Sandbox, "local": Local, "deno": Deno, "llm-sandbox": LlmSandbox}
