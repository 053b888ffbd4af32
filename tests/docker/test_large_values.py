"""Claims about large variables in a container whose memory is limited: no copy but the value's own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_client import SandboxInterpreter, SandboxSettings
from tests.docker.sandboxes import image as image

pytestmark = pytest.mark.docker

MIB = 1 << 20


@pytest.fixture
def interpreter(image: str) -> Iterator[SandboxInterpreter]:
    settings = SandboxSettings(image=image, memory="256m", tmpfs="16m", journal=":memory:", history=False)
    with SandboxInterpreter(settings=settings) as running:
        yield running
        running.shutdown(wait=True)


def peaks(interpreter: SandboxInterpreter) -> dict[str, int]:
    """Return the most memory that each process of the sandbox has had, in bytes."""
    handle = interpreter.sandbox_handle
    assert handle is not None
    listed = subprocess.run(
        ["docker", "top", handle.sandbox_id, "-eo", "pid"], capture_output=True, text=True, check=True
    )
    found = {}
    for pid in listed.stdout.split()[1:]:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        found[pid] = int(status["VmHWM"].split()[0]) * 1024
    return found


def test_a_text_of_more_than_half_the_memory_arrives_and_costs_nothing_again(interpreter: SandboxInterpreter) -> None:
    text = "x" * (150 * MIB)
    for _ in range(3):
        assert interpreter.execute("len(text), text[-1]", {"text": text}) == [150 * MIB, "x"]
    assert interpreter.execute("text = ''; len(text)") == 0
    assert interpreter.execute("len(text)", {"text": text}) == 150 * MIB


def test_only_the_worker_holds_it(interpreter: SandboxInterpreter) -> None:
    interpreter.execute("1")
    data = [bytes([number]) * (40 * MIB) for number in range(3)]
    assert interpreter.execute("[piece[0] for piece in data]", {"data": data}) == [0, 1, 2]
    large = [peak for peak in peaks(interpreter).values() if peak > 100 * MIB]
    assert len(large) == 1


def test_what_does_not_fit_ends_the_session_with_the_reason(interpreter: SandboxInterpreter) -> None:
    from host_client.errors import SessionLost

    with pytest.raises(SessionLost) as lost:
        interpreter.execute("copy = text + 'y'", {"text": "x" * (200 * MIB)})
    assert lost.value.reason == "oom"


def test_results_arguments_and_answers_pass_the_broker_by_without_costing_it_memory(image: str) -> None:
    settings = SandboxSettings(image=image, memory="256m", tmpfs="16m", journal=":memory:", history=False)
    tools = {"size": len, "make": lambda count: "m" * count}
    with SandboxInterpreter(tools, settings=settings) as running:
        # The value and its file: a third copy would not fit.
        assert running.execute(f"'x' * {100 * MIB}") == "x" * (100 * MIB)
        assert running.execute(f"size('y' * {90 * MIB})") == 90 * MIB
        assert running.execute(f"len(make({90 * MIB}))") == 90 * MIB
        assert sorted(peaks(running).values())[-2] < 60 * MIB
        running.shutdown(wait=True)
