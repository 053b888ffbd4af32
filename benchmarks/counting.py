"""Counts what one operation on the hot path does: function calls, not seconds. ``python -m benchmarks.counting``.

The real host side and the real broker run in this process, in threads of their own, with a real worker, a process of
its own; a profile function in each counts calls. A busy machine makes that slower and changes no count, so a test can
compare them with a budget.
"""

from __future__ import annotations

import collections
import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.counter import Counter
from benchmarks.processes import ROLES
from benchmarks.state import TOOLS

_WORKER_SIDE = Path(__file__).with_name("worker_side")
_WORKER_COUNTS = "import sys; sys.modules['sitecustomize'].COUNTER.of_this_process()"
#: How often who spins looks is a matter of time, not of what there is to do.
_NO_SPINNING = "import broker.protocol.spinner; broker.protocol.spinner._WORTH_IT = False"
_BROKER_THREAD = "in-process-broker"
#: What is counted, and what it stands for.
METRICS = {
    "own_calls": "calls of functions in host_client and broker",
    "library_calls": "calls of Python functions in libraries",
    "built_in_calls": "calls of built-in functions from our code",
    "socket_calls": "reads, writes and polls of sockets",
}
#: Operations over which a count is averaged: what one of them does late falls into the next.
_OPERATIONS = 100
_WARM_UP = 20
_TEXT = "v" * (1 << 20)

Counts = dict[str, dict[str, dict[str, int]]]
_Taken = collections.Counter[tuple[str, str]]


def _operations(interpreter: Any) -> dict[str, Callable[[], Any]]:
    return {
        "execution": lambda: interpreter.execute("1 + 1"),
        "execution with one tool call": lambda: interpreter.execute("double(21)"),
        "execution with an unchanged 1 MiB str": lambda: interpreter.execute("len(text)", {"text": _TEXT}),
    }


def count() -> Counts:
    """Return the counts of one operation: by operation, role and metric."""
    # Here, not above: nothing of ours is imported before it is decided who watches.
    from broker import lull
    from broker.protocol import spinner
    from broker.testing import InProcessBroker
    from host_client import SandboxInterpreter, SandboxSettings
    from host_client.providers.fake import FakeProvider

    spinner._WORTH_IT = False
    lull.LULL_S = 0.002  # lest the broker's reading of many executions fall into the count after theirs
    counter = Counter("host")
    # Without the history, whose thread writes what it has gathered at a moment of its own: in one count or in another.
    settings = SandboxSettings(journal=":memory:", history=False)
    # Read by the supervisor that is started below, whose forks the workers are.
    os.environ["PYTHONPATH"] = f"{_WORKER_SIDE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with counter.counting(), InProcessBroker() as broker:
        [thread] = [one for one in threading.enumerate() if one.name == _BROKER_THREAD]
        counter.broker_is(thread)
        with SandboxInterpreter(tools=TOOLS, settings=settings, provider=FakeProvider(broker)) as interpreter:
            interpreter.execute(_NO_SPINNING)

            def snapshot() -> _Taken:
                worker = interpreter.execute(_WORKER_COUNTS)
                return counter.snapshot() + _Taken({("worker", metric): n for metric, n in worker.items()})

            return {name: _counted(snapshot, run) for name, run in _operations(interpreter).items()}


def _counted(snapshot: Callable[[], _Taken], run: Callable[[], Any]) -> dict[str, dict[str, int]]:
    for _ in range(_WARM_UP):
        run()
    before = snapshot()
    for _ in range(_OPERATIONS):
        run()
    used = snapshot() - before
    # Rounded up: what the broker does for many operations at once is something too.
    return {role: {metric: math.ceil(used[role, metric] / _OPERATIONS) for metric in METRICS} for role in ROLES}


if __name__ == "__main__":
    print(json.dumps(count(), indent=1))
