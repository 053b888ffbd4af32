"""A host process that a fault strikes: ``python -m tests.faults.host <json>``; prints how it ended."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from host_client import SandboxInterpreter
from host_client.errors import SandboxError
from tests.faults.seams import Step, StrikingJournal, StrikingProvider, counting, strike_on_lane

#: What it runs. The variable before the call shows later whether the namespace is the same.
CODE = """
before = "kept"
print("under way")
try:
    answer = effect("done")
except Exception as error:
    answer = type(error).__name__
print(answer)
"""


@dataclasses.dataclass
class RunningBroker:
    host_socket: Path
    ended: bool = False


def main(spec: dict[str, Any]) -> None:
    """Run the code; the process strikes itself at the step."""

    def strike(step: Step) -> None:
        if step is Step(spec["step"]):
            # To this very thread: one sent to the process strikes it a little later.
            signal.pthread_kill(threading.get_ident(), signal.Signals(spec["signal"]))

    work = counting(Path(spec["counter"]))

    def effect(text: str) -> str:
        answer = work(text)
        strike(Step.MID_TOOL)
        return answer

    interpreter = SandboxInterpreter(
        tools={"effect": effect},
        idempotent=["effect"] if spec["idempotent"] else [],
        session=spec["session"],
        provider=StrikingProvider(RunningBroker(Path(spec["socket"])), strike),
        journal=StrikingJournal(spec["journal"], strike),
    )
    try:
        if spec["on_lane"]:
            strike_on_lane(strike)
            interpreter.execute("1")  # from the second execution on there is a lane
        interpreter.execute(CODE)
        print("finished", flush=True)
    except SandboxError as error:
        print(error.code, getattr(error, "reason", ""), flush=True)
    interpreter.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
