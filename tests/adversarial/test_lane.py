"""Attacks through the lane, of whose two ends generated code holds one: the other one is in the user's own process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from host_client.errors import SandboxError, SessionLost
from tests.adversarial.arena import Arena, Target
from tests.adversarial.memory import MemoryPeak

pytestmark = [pytest.mark.docker, pytest.mark.family("lane")]

#: Most that a lane's words may cost the host.
_MOST_BYTES = 64 << 20

GARBAGE = {
    "a header of 4 GiB": "b'\\xff' * 4",
    "a header that is no JSON": "struct.pack('>I', 4) + b'\\x80abc'",
    "nested 100,000 deep": "struct.pack('>I', 200_006) + b'{\"a\":' + b'[' * 100_000 + b']' * 100_000 + b'}'",
    "2 GiB announced": "struct.pack('>I', 22) + b'{\"blobs\":[2147483648]}'",
    "half a frame": "struct.pack('>I', 40) + b'{'",
    "5,000 frames of nothing": "frame({'type': 'x'}) * 5_000",
    "a flood of 100 MB": "b'\\0\\0\\0\\2{}' * 16_000_000",
    "its own result, of an outcome that is the broker's to tell": (
        "frame({'execution_id': execution_id(), 'outcome': 'timed_out'})"
    ),
    "its own result, with a value that is none": (
        "frame({'execution_id': execution_id(), 'outcome': 'ok', 'value': {'$class': 'os.system'}, 'display': ''})"
    ),
    "results of executions to come": (
        "b''.join(frame({'execution_id': f'{n:032x}', 'outcome': 'ok', 'value': 'forged'}) for n in range(1_000))"
    ),
}


@pytest.fixture
def target(arena: Arena) -> Iterator[Target]:
    """With a lane."""
    made = Target(arena, arena.shared())
    for _ in range(3):
        made.run("1")
    yield made
    with contextlib.suppress(SandboxError):
        made.close()


@pytest.mark.parametrize("kind", GARBAGE)
def test_whatever_is_said_on_the_lane_costs_the_session_at_most(arena: Arena, target: Target, kind: str) -> None:
    neighbour = Target(arena, arena.shared())
    peak = MemoryPeak()
    lost: SessionLost | None = None
    try:
        assert target.interpreter.execute(f"there = lane_raw({GARBAGE[kind]})\nthere") is True
        assert target.run("mark") == target.mark
    except SessionLost as error:
        lost = error
    # A forger's result is worth what he made of it.
    assert lost is None or kind.startswith("its own result")
    assert peak.growth_bytes() < _MOST_BYTES
    assert neighbour.run("mark") == neighbour.mark
    neighbour.close()


def test_descriptors_sent_to_the_host_do_not_arrive(target: Target) -> None:
    code = (
        "with socket.socket(fileno=os.dup(lane_fd())) as lane:\n"
        "    for _ in range(10):\n"
        "        with contextlib.suppress(OSError): socket.send_fds(lane, [frame({'type': 'x'})], [0] * 20)\n"
        "'sent'"
    )
    before = _open_descriptors()
    assert target.interpreter.execute(code) == "sent"
    assert target.run("mark") == target.mark
    assert _open_descriptors() <= before + 2


def test_a_lane_that_is_never_read_from_blocks_nobody(target: Target) -> None:
    target.run("1")
    with contextlib.suppress(SandboxError):
        target.interpreter.execute("lane_raw(frame({'type': 'x'}) * 100_000)")
    assert target.run("mark") == target.mark


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
