"""One contender in a process of its own, asked for samples over a pipe: ``python benchmarks/agent.py CHECKOUT KIND``.

So each contender pays for its own memory, threads and garbage only, and another checkout of this project can take its
turns with ours in one run: CHECKOUT is where ``host_client`` comes from, the benchmarks are always these.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent


def _use(checkout: Path) -> None:
    """Take ``host_client`` and ``broker`` from that checkout, and ``benchmarks`` from this one, whatever it has."""
    spec = importlib.util.spec_from_file_location(
        "benchmarks", _HERE / "__init__.py", submodule_search_locations=[str(_HERE)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = package
    spec.loader.exec_module(package)
    sys.path[:] = [str(checkout), *(entry for entry in sys.path if entry and Path(entry).resolve() != _HERE)]
    import host_client

    if Path(str(host_client.__file__)).resolve().parents[1] != checkout:
        raise SystemExit(f"{checkout} is not a checkout of this project: it has no host_client")


class Agent:
    """Answers requests: an object with ``op`` each, and one object back.

    Args:
        kind: A key of ``contenders.kinds()``.
        quick: As for ``cases.all_cases``.
    """

    def __init__(self, kind: str, *, quick: bool) -> None:
        from benchmarks.cases import all_cases
        from benchmarks.contenders import kinds
        from benchmarks.curves import all_curves
        from benchmarks.state import State

        self._state = State(kinds()[kind]())
        self._cases = {case.key: case for case in all_cases(quick=quick)}
        self._curves = {curve.key: curve for curve in all_curves(quick=quick)}

    def ready(self) -> dict[str, Any]:
        """Tell who this is."""
        contender = self._state.contender
        return {"name": contender.name, "lacks": sorted(contender.lacks), "slow": contender.slow}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Take the samples that are asked for."""
        if request["op"] == "prepare":
            variant = self._cases[request["case"]].variant
            if variant is not None:
                self._state.warm(variant)
            return {}
        if request["op"] == "sample":
            return self._sample(request["case"], request["count"])
        return {"point": self._curves[request["curve"]].measure(self._state, request["x"])}

    def _sample(self, key: str, count: int) -> dict[str, Any]:
        from benchmarks.processes import used_ns

        case = self._cases[key]
        if case.pause_s and self._state.contender.keeps_warm:
            # Nothing to wait on: a pool says nowhere in public when it is full, and a user's program pauses too.
            time.sleep(case.pause_s)
        if case.variant is None:
            return {"samples": [case.sample(self._state) for _ in range(count)]}
        processes = self._state.processes(case.variant)
        before = used_ns(processes)
        samples = [case.sample(self._state) for _ in range(count)]
        after = used_ns(processes)
        return {"samples": samples, "cpu_s": {role: (after[role] - before[role]) / count / 1e9 for role in processes}}

    def recover(self) -> None:
        """Get ready for what comes after an error."""
        self._state.drop_lost()

    def close(self) -> None:
        """Shut all interpreters down."""
        self._state.close()


def _ensure_image(kind: str) -> None:
    if kind == "sandbox":
        from host_client.image import ensure_image
        from host_client.settings import SandboxSettings

        ensure_image(SandboxSettings.from_environment(), lambda line: print(line, file=sys.stderr))


def main() -> None:
    """Speak JSON lines on what was standard output; whatever else prints goes to standard error."""
    checkout, kind, mode = Path(sys.argv[1]).resolve(), sys.argv[2], sys.argv[3]
    _use(checkout)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        out.write(json.dumps(reply) + "\n")
        out.flush()

    from benchmarks.curves import NotTried
    from benchmarks.unavailable import Unavailable

    try:
        _ensure_image(kind)
        agent = Agent(kind, quick=mode == "quick")
    except Unavailable as error:
        say({"unavailable": str(error)})
        return
    try:
        say(agent.ready())
        for line in sys.stdin:
            try:
                say(agent.answer(json.loads(line)))
            except NotTried as error:
                say({"not_tried": str(error)})
            except Exception as error:
                agent.recover()
                say({"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]})
    finally:
        agent.close()


if __name__ == "__main__":
    main()
