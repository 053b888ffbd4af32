"""Attacks through the lane, of whose two ends generated code holds one: the other one is in the user's own process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

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


#: Tool calls made by hand: the code, and how many tools may run because of it.
CALLS = {
    "told to the host alone": ("lane_raw(lane_call('a1'))", 1),
    "told to the broker alone": ("send_raw(lane_call('a1'))", 0),
    "told to both, twenty times": ("[(send_raw(c), lane_raw(c)) for c in [lane_call('a1')] * 20]", 1),
    "of a tool that is not there": ("lane_raw(lane_call('a1', 'rm'))", 0),
    "under a key that is a path": ("lane_raw(lane_call('../../health'))", 0),
    "of another execution": ("lane_raw(lane_call('a1', execution_id='0' * 32))", 0),
    "with arguments that are none": ("lane_raw(lane_call('a1', args=5, kwargs=[]))", 0),
    "with values that are none": ("lane_raw(lane_call('a1', args=[{'$class': 'os.system'}]))", 0),
    "with 30 KB of nested lists": ("lane_raw(lane_call('a1', 'shape', *[json.loads('[' * 90 + ']' * 90)] * 100))", 1),
    "a thousand at once": ("lane_raw(b''.join(lane_call(f'{n:x}') for n in range(0xA000, 0xA3E8)))", 1_000),
}


@pytest.mark.parametrize("kind", CALLS)
def test_calls_made_by_hand_run_once_at_most_and_cost_the_session_at_most(
    arena: Arena, target: Target, kind: str
) -> None:
    neighbour = Target(arena, arena.shared())
    peak = MemoryPeak()
    code, most = CALLS[kind]
    target.tools.reset()
    # Its own call goes behind them.
    assert isinstance(target.interpreter.execute(f"there = lane_fd() is not None\n{code}\nthere and tally()"), int)
    assert target.run("mark") == target.mark
    assert target.tools.runs["tally"] <= most + 1
    assert peak.growth_bytes() < _MOST_BYTES
    assert neighbour.run("mark") == neighbour.mark
    neighbour.close()


def test_calls_that_hang_take_the_places_of_their_own_execution_only(target: Target) -> None:
    target.tools.reset()
    target.run("lane_raw(b''.join(lane_call(f'{n:x}', 'hang') for n in range(0xA000, 0xA0C8)))")
    assert target.run("[tally() for _ in range(5)][0]") > 0
    assert target.tools.runs["tally"] <= target.interpreter.settings.max_concurrent_tools + 5
    target.tools.released.set()
    assert target.run("mark") == target.mark


@pytest.mark.parametrize(
    "code",
    [
        "with contextlib.suppress(BlockingIOError): os.write(bell, b'x' * 4096)",
        "os.set_blocking(bell, False); attempt(lambda: os.read(bell, 1)); attempt(lambda: os.write(bell, b'x'))",
        "os.set_blocking(bell, True); attempt(lambda: os.read(bell, 1)); os.write(bell, b'x')",
    ],
)
def test_a_bell_that_is_rung_without_end_holds_nobody_up(arena: Arena, target: Target, code: str) -> None:
    neighbour = Target(arena, arena.shared())
    loop = f"bell, end = inbox()._bell, time.monotonic() + 1\nwhile time.monotonic() < end:\n    {code}\n'rung'"
    with ThreadPoolExecutor(1) as threads:
        ringing = threads.submit(target.run, loop)
        answered = 0
        while not ringing.done():
            assert neighbour.run("tally()") > 0
            answered += 1
        assert ringing.result() == "rung"
    assert answered > 0
    assert target.run("mark") == target.mark
    neighbour.close()


def test_without_its_bell_a_session_goes_on(target: Target) -> None:
    target.run("os.close(inbox()._bell)")
    for number in range(5):
        assert target.run(f"print({number})") == str(number)
        assert target.run("mark") == target.mark


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
