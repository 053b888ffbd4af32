"""The interpreters that are compared, each made ready by the same two methods."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Tools = dict[str, Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class Contender:
    """One interpreter under test.

    Attributes:
        name: Shown in the tables.
        make: Returns a fresh interpreter with these tools; nothing is started yet.
        pids: Returns the ids of the processes that belong to a started interpreter.
        threads: Whether generated code can start threads there.
    """

    name: str
    make: Callable[[Tools], Any]
    pids: Callable[[Any], list[int]]
    threads: bool = True


def available(*, with_deno: bool = True) -> list[Contender]:
    """Return the contenders that can run here; why one cannot is printed, never hidden."""
    found = [_sandbox(), _local()]
    if with_deno:
        deno = _deno()
        if isinstance(deno, str):
            print(f"dspy.PythonInterpreter is left out: {deno}")
        else:
            found.append(deno)
    return found


def _sandbox() -> Contender:
    from host_client import SandboxInterpreter

    def pids(interpreter: Any) -> list[int]:
        from host_client.providers.docker_engine import DockerEngine

        handle = interpreter.sandbox_handle
        return [int(DockerEngine.connect().inspect(handle.sandbox_id)["State"]["Pid"])]

    return Contender("rlm-sandbox", lambda tools: SandboxInterpreter(tools=tools), pids)


def _local() -> Contender:
    from dspy import LocalInterpreter

    return Contender("LocalInterpreter", lambda tools: LocalInterpreter(tools=tools), lambda i: [i._process.pid])


def _deno() -> Contender | str:
    """Deno's interpreter, or why it cannot run. Its own import map is used where its library host is out of reach."""
    from dspy import PythonInterpreter

    if shutil.which("deno") is None and not _deno_package():
        return "Deno is not installed (pip install deno)"
    _point_deno_at_npm()
    last = ""
    for command in (None, _offline_command(PythonInterpreter().deno_command)):
        try:
            probe = PythonInterpreter(deno_command=command)
            probe.execute("1+1")
            probe.shutdown()
        except Exception as error:
            last = str(error).splitlines()[0]
            continue
        return Contender(
            "PythonInterpreter (Deno)",
            lambda tools, command=command: PythonInterpreter(deno_command=command, tools=tools),
            lambda i: [i.deno_process.pid],
            threads=False,
        )
    return last


def _deno_package() -> bool:
    try:
        import deno  # noqa: F401
    except ImportError:
        return False
    return True


def _point_deno_at_npm() -> None:
    """Deno reads the registry from the environment only; npm's own settings are the user's choice."""
    if "NPM_CONFIG_REGISTRY" in os.environ or shutil.which("npm") is None:
        return
    answer = subprocess.run(["npm", "config", "get", "registry"], capture_output=True, text=True, check=False)
    if answer.returncode == 0 and answer.stdout.strip():
        os.environ["NPM_CONFIG_REGISTRY"] = answer.stdout.strip()


def _offline_command(command: list[str]) -> list[str]:
    """The same command, with the one helper that the runner loads by URL taken from this folder."""
    helper = Path(__file__).with_name("deno") / "read_lines.ts"
    runner = next(Path(part) for part in command if part.endswith("runner.js"))
    url = next(
        line.split('"')[1] for line in runner.read_text().splitlines() if "readLines" in line and "import" in line
    )
    folder = Path(tempfile.mkdtemp(prefix="rlm-sandbox-bench-"))
    import_map = folder / "import_map.json"
    import_map.write_text(json.dumps({"imports": {url: str(helper)}}))
    changed = [f"{part},{helper}" if part.startswith("--allow-read=") else part for part in command]
    position = changed.index("--no-config") + 1
    return [*changed[:position], f"--import-map={import_map}", *changed[position:]]
