"""DSPy's default interpreter: Pyodide in Deno."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.contenders import Contender, Tools
from benchmarks.processes import Processes
from benchmarks.unavailable import Unavailable


class Deno(Contender):
    """``dspy.PythonInterpreter``. Its own import map is used where its library host is out of reach.

    Raises:
        Unavailable: Deno is not installed, or cannot fetch what it needs.
    """

    name = "PythonInterpreter (Deno)"
    lacks = frozenset({"threads", "pandas"})
    slow = True

    def __init__(self) -> None:
        from dspy import PythonInterpreter

        if shutil.which("deno") is None and importlib.util.find_spec("deno") is None:
            raise Unavailable("Deno is not installed (pip install deno)")
        _point_deno_at_npm()
        self._command = _working_command(PythonInterpreter)

    def make(self, tools: Tools, variant: str = "plain") -> Any:
        from dspy import PythonInterpreter

        return PythonInterpreter(deno_command=self._command, tools=tools)

    def processes(self, interpreter: Any) -> Processes:
        return {"worker": list(processes.tree(interpreter.deno_process.pid))}


def _working_command(interpreter: Any) -> list[str] | None:
    last = ""
    for command in (None, _offline_command(interpreter().deno_command)):
        try:
            probe = interpreter(deno_command=command)
            probe.execute("1+1")
            probe.shutdown()
        except Exception as error:
            last = str(error).splitlines()[0]
        else:
            return command
    raise Unavailable(last)


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
