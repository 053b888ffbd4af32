"""The small parts: stopwatch, frames in pieces, output, logs, configuration, exit reasons."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import gevent
import pytest

from broker.errors import BrokerError, SessionLost, TooManySessions
from broker.logs import BURST_LINES, LINES_PER_S, Log
from broker.output import MAX_LEFT_OVER_PIPES, OutputBuffer, OutputPipes
from broker.protocol import limits
from broker.protocol.frames import FrameAssembler, FrameError, dump_frame, parse_json_object
from broker.protocol.reading import BadRequest
from broker.sessions import Slots
from broker.stopwatch import Stopwatch
from broker.supervisor import sweeping
from broker.supervisor.config import SupervisorConfig
from broker.supervisor.core import exit_reason
from broker.supervisor.oom import OomCounter
from broker.testing import FakeClock
from broker.unix_server import UnixServer
from broker.waiting import Alarm, Bell


def frame(header: dict[str, Any], blobs: tuple[bytes, ...] = ()) -> bytes:
    return b"".join(bytes(piece) for piece in dump_frame(header, blobs))


def turn() -> None:
    """Let the event loop go round a few times, without waiting."""
    for _ in range(5):
        gevent.sleep(0)


# Stopwatch


def test_a_stopwatch_stands_still_while_paused() -> None:
    clock = FakeClock(100)
    watch = Stopwatch(10, clock)
    assert watch.deadline() == 110
    clock.advance(4)
    watch.pause()
    watch.pause()
    assert watch.deadline() is None
    clock.advance(1000)
    watch.resume()
    watch.resume()
    assert watch.deadline() == clock.now + 6


def test_a_stopwatch_without_budget_has_no_deadline() -> None:
    watch = Stopwatch(None, FakeClock())
    watch.pause()
    watch.resume()
    assert watch.deadline() is None


# Frames that arrive in pieces


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_frames_are_put_together_from_pieces_of_any_size(size: int) -> None:
    sent = [({"n": 1}, ()), ({"n": 2}, (b"abc", b"", b"d" * 50)), ({"n": 3}, (b"last",))]
    stream = b"".join(frame(header, blobs) for header, blobs in sent)
    assembler, got = FrameAssembler(), []
    for start in range(0, len(stream), size):
        assembler.add(stream[start : start + size])
        while (whole := assembler.next()) is not None:
            header, blobs = whole
            got.append((header["n"], [bytes(blob) for blob in blobs]))
    assert got == [(header["n"], list(blobs)) for header, blobs in sent]
    assert assembler.missing == 0


def test_what_is_missing_to_the_end_of_a_frame_is_known() -> None:
    assembler = FrameAssembler()
    stream = frame({}, (b"x" * 100,))
    assembler.add(stream[:-40])
    assert assembler.next() is None
    assert assembler.missing == 40


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\0\0\0\x02[]",
        b"\0\0\0\x03{,}",
        b"\0\0\0\x11" + b'{"blobs":["abc"]}',
        b"\0\0\0\x12" + b'{"blobs":[100001]}',
    ],
)
def test_bytes_that_are_no_frame_are_refused_at_once(data: bytes) -> None:
    assembler = FrameAssembler(max_bytes=100_000)
    assembler.add(data)
    with pytest.raises(FrameError):
        assembler.next()


def test_json_that_could_not_be_sent_on_is_refused() -> None:
    deep = b'{"a":' + b"[" * limits.MAX_JSON_DEPTH + b"]" * limits.MAX_JSON_DEPTH + b"}"
    for data in (b'{"a": 1e400}', b'{"a": -1e400}', b'{"a": Infinity}', deep, b'{"a": "\xff"}'):
        with pytest.raises(FrameError):
            parse_json_object(data)
    wide = b'{"a":[' + b"[]," * 5000 + b"[]]}"
    assert len(parse_json_object(wide)["a"]) == 5001


# Output


def test_the_first_bytes_are_kept_and_the_rest_is_counted() -> None:
    buffer = OutputBuffer(5)
    for data in (b"abc", b"def", b"ghi"):
        buffer.add(data)
    assert (buffer.output().text, buffer.output().discarded_bytes) == ("abcde", 4)


def test_bytes_that_are_no_text_are_replaced() -> None:
    buffer = OutputBuffer(100)
    buffer.add(b"a\xffb\xc3")
    assert buffer.output().text == "a\ufffdb\ufffd"


def test_what_was_written_before_the_end_is_taken_without_waiting_for_the_writers() -> None:
    pipes = OutputPipes(lambda: None)
    held = os.dup(pipes.open(1 << 20).write_end)
    os.write(held, b"x" * 100_000)
    assert len(pipes.take().text) == 100_000
    os.write(held, b"later")  # a left-over process is neither blocked nor killed
    turn()
    assert pipes.take().text == ""
    os.close(held)
    pipes.close()


def test_only_a_few_left_over_pipes_are_kept_open() -> None:
    pipes, held = OutputPipes(lambda: None), []
    for _ in range(MAX_LEFT_OVER_PIPES + 2):
        held.append(os.dup(pipes.open(10).write_end))
        pipes.take()
    for fd in held[:2]:
        with pytest.raises(BrokenPipeError):
            os.write(fd, b"x")
    for fd in held[2:]:
        os.write(fd, b"x")
    pipes.close()
    for fd in held:
        os.close(fd)


def test_endless_output_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_DISCARDED_OUTPUT_BYTES", 1000)
    overflows: list[int] = []
    bell = Bell()

    def overflowed() -> None:
        overflows.append(1)
        bell.ring()

    pipes = OutputPipes(overflowed)
    held = os.dup(pipes.open(10).write_end)
    os.write(held, b"x" * 1500)
    assert bell.wait_until(lambda: bool(overflows), 20)
    os.write(held, b"x" * 1200)
    output = pipes.take()
    assert overflows == [1]
    assert (output.text, output.discarded_bytes) == ("x" * 10, 2690)
    os.close(held)
    pipes.close()


# Waiting


def test_a_bell_wakes_everybody_who_waits() -> None:
    bell, news = Bell(), []
    waiting = [gevent.spawn(bell.wait_until, lambda: bool(news), 20) for _ in range(3)]
    turn()
    news.append(1)
    bell.ring()
    gevent.joinall(waiting, timeout=20)
    assert [greenlet.value for greenlet in waiting] == [True] * 3
    assert not bell.wait_until(lambda: False, 0.001)


def test_an_alarm_follows_its_deadline() -> None:
    clock, due, fired = FakeClock(0), [5.0], gevent.event.Event()
    seen: list[float] = []

    def ring() -> None:
        seen.append(clock.now)
        due.clear()
        fired.set()

    alarm = Alarm(lambda: due[0] if due else None, ring, clock)
    alarm.check()
    due[0] = 0.0  # nearer
    alarm.check()
    assert fired.wait(20)
    alarm.check()
    assert seen == [0]
    due.append(0.0)
    alarm.close()
    alarm.check()
    turn()
    assert seen == [0]


# The server


def test_a_client_that_sends_requests_in_a_row_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    served: list[str] = []
    all_served = gevent.event.Event()

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        served.append(environ["PATH_INFO"])
        if len(served) == 101:
            all_served.set()
        start_response("200 OK", [("Content-Length", "0")])
        return []

    path = str(tmp_path / "test.sock")
    server = UnixServer(path, 0o600, app, log=Log(), admit=lambda peer: None, left=lambda peer: None)  # type: ignore[arg-type]
    with socket.socket(socket.AF_UNIX) as greedy, socket.socket(socket.AF_UNIX) as modest:
        for sock, sent in ((greedy, b"GET /greedy HTTP/1.1\r\n\r\n" * 100), (modest, b"GET /modest HTTP/1.1\r\n\r\n")):
            sock.connect(path)
            sock.sendall(sent)
        server.start()
        assert all_served.wait(20)
        server.close_all()
    assert served.index("/modest") < 10


# Slots


def test_the_lowest_slot_is_taken_and_an_unclean_one_never_again() -> None:
    slots = Slots(2)
    assert [slots.take(), slots.take()] == [0, 1]
    with pytest.raises(TooManySessions):
        slots.take()
    slots.sweeping(1)
    slots.swept(1, True)
    assert slots.take() == 1
    slots.sweeping(0)
    slots.swept(0, False)
    with pytest.raises(TooManySessions):
        slots.take()


def test_a_slot_that_is_being_swept_is_waited_for() -> None:
    slots = Slots(1)
    slots.sweeping(slots.take())
    gevent.spawn(slots.swept, 0, True)
    assert slots.take() == 0


# Errors


def test_every_error_has_a_code_and_a_status_of_its_own() -> None:
    kinds = BrokerError.__subclasses__()
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert all(400 <= kind.status < 600 for kind in kinds)
    assert SessionLost("oom").to_json()["error"] == {
        "code": "session_lost",
        "message": "the session is lost: oom",
        "reason": "oom",
    }


# Logs


def test_the_log_is_one_escaped_json_object_per_line() -> None:
    stream = io.StringIO()
    Log(stream).event("hello", text="a\n\x1b[31mb", long="x" * 10_000)
    [line] = stream.getvalue().splitlines()
    assert "\x1b" not in line
    assert json.loads(line)["text"] == "a\n\x1b[31mb"
    assert len(line) < 5000


def test_the_log_is_bounded_in_rate_and_says_what_it_dropped() -> None:
    stream, clock = io.StringIO(), FakeClock()
    log = Log(stream, clock)
    for _ in range(BURST_LINES + 50):
        log.event("flood")
    assert len(stream.getvalue().splitlines()) == BURST_LINES
    clock.advance(2 / LINES_PER_S)
    log.event("later")
    assert json.loads(stream.getvalue().splitlines()[-1])["dropped_before"] == 50


def test_a_defect_is_logged_with_its_traceback() -> None:
    stream = io.StringIO()
    try:
        raise ValueError("broken")
    except ValueError as error:
        Log(stream).defect("here", error)
    logged = json.loads(stream.getvalue())
    assert (logged["event"], logged["where"]) == ("defect", "here")
    assert "ValueError: broken" in logged["traceback"]


# The supervisor's parts


def test_a_configuration_survives_its_way() -> None:
    config = SupervisorConfig(
        broker_uid=1000,
        broker_gid=1000,
        guest_uid_base=70_000,
        environment={"A": "b"},
        linger_s=60,
        name="n",
        allowed_host_uids=(0, 1000),
    )
    assert SupervisorConfig.from_json(config.to_json()) == config
    assert (config.guest_uid(3), config.sweeper_uid(3)) == (70_003, 70_019)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ('{"guests": 1}', "guests"),
        ('{"broker_uid": 0, "broker_gid": 1, "guest_uid_base": 2}', "broker_uid"),
        ('{"broker_uid": 1000}', "together"),
        ('{"max_sessions": 0}', "max_sessions"),
        ('{"environment": {"A=B": "c"}}', "A=B"),
        ('{"environment": {"A": 1}}', "A"),
        ('{"allowed_host_uids": ["root"]}', "allowed_host_uids"),
        ('{"linger_s": 0}', "linger_s"),
    ],
)
def test_a_configuration_that_cannot_be_is_named(text: str, named: str) -> None:
    with pytest.raises(BadRequest, match=named):
        SupervisorConfig.from_json(text)


@pytest.mark.parametrize(
    ("status", "oom", "reason"),
    [
        (3 << 8, False, "exited(3)"),
        (signal.SIGSEGV, False, "crashed(SIGSEGV)"),
        (signal.SIGKILL, False, "killed"),
        (signal.SIGKILL, True, "oom"),
        (signal.SIGSEGV, True, "crashed(SIGSEGV)"),
        (60, False, "crashed(60)"),
    ],
)
def test_the_exit_reason_is_typed(status: int, oom: bool, reason: str) -> None:
    assert exit_reason(status, oom=oom) == reason


@pytest.mark.parametrize("text", ["oom_kill_disable 0\nunder_oom 0\noom_kill {n}\n", "low 0\noom 3\noom_kill {n}\n"])
def test_a_shortage_names_every_process_that_it_kills_and_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    now = 100.0
    file = tmp_path / "counter"
    file.write_text(text.format(n=2))
    monkeypatch.setattr("broker.supervisor.oom._COUNTERS", (tmp_path / "none", file))
    counter = OomCounter(clock=lambda: now)
    assert not counter.rose()
    file.write_text(text.format(n=4))
    assert counter.rose()
    assert counter.rose(), "the second one"
    now += 1.5
    assert not counter.rose()
    file.unlink()
    assert not counter.rose()


def test_removing_what_is_owned_takes_trees_of_any_depth_and_no_link(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "tmp", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    (folder / "link").symlink_to(elsewhere)
    (folder / "file").touch()
    here = os.getcwd()
    os.mkdir(folder / "deep")
    os.chdir(folder / "deep")
    for _ in range(1500):
        os.mkdir("d" * 20)
        os.chdir("d" * 20)
    os.chdir(here)
    os.chmod(folder / "deep", 0)
    sweeping.remove_owned(str(folder), os.geteuid() + 1)
    assert len(os.listdir(folder)) == 3
    sweeping.remove_owned(str(folder), os.geteuid(), prefix="fi")
    assert sorted(os.listdir(folder)) == ["deep", "link"]
    sweeping.remove_owned(str(folder), os.geteuid())
    assert os.listdir(folder) == []
    assert (elsewhere / "file").exists()
