"""Claims about descriptors that generated code sends: believed only as far as the kernel vouches for them."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from broker.protocol import blob_file
from broker.protocol.blob_file import BlobFile, check
from broker.protocol.frames import FILES_UPGRADE, FrameError, dump_frame
from broker.testing import FakeExecution, InProcessBroker
from tests.broker.conftest import Client

SIZE = 200_000


def sealed() -> int:
    return BlobFile.of([b"x" * SIZE]).fd


def unsealed() -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(fd, b"x" * SIZE)
    return fd


def half_sealed() -> int:
    fd = unsealed()
    fcntl.fcntl(fd, blob_file._ADD_SEALS, blob_file._SEALED & ~0x8)  # may still be written to
    return fd


def sparse() -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    fcntl.fcntl(fd, blob_file._ADD_SEALS, blob_file._SEALED)
    return fd


def write_only() -> int:
    fd = sealed()
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
    finally:
        os.close(fd)


def path_only() -> int:
    fd = sealed()
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_PATH)
    finally:
        os.close(fd)


def longer() -> int:
    return BlobFile.of([b"x" * (SIZE + 1)]).fd


def shorter() -> int:
    return BlobFile.of([b"x" * (SIZE - 1)]).fd


def pipe() -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


def procfs() -> int:
    return os.open("/proc/self/status", os.O_RDONLY)


def device() -> int:
    return os.open("/dev/zero", os.O_RDWR)


def directory() -> int:
    return os.open("/proc/self", os.O_RDONLY)


def connection() -> int:
    one, other = socket.socketpair()
    other.close()
    return one.detach()


WRONG = (
    unsealed,
    half_sealed,
    sparse,
    write_only,
    path_only,
    longer,
    shorter,
    pipe,
    procfs,
    device,
    directory,
    connection,
)


def descriptors() -> int:
    """Those of this process, which is the broker's too."""
    return len(os.listdir("/proc/self/fd"))


def none_are_left(before: int) -> bool:
    """Whether there come to be no more than before: connections end a moment after their sessions."""
    give_up_at = time.monotonic() + 20
    while descriptors() > before and time.monotonic() < give_up_at:
        os.sched_yield()
    return descriptors() <= before


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
def test_what_is_no_sealed_memory_file_of_the_announced_size_is_refused(make: Callable[[], int]) -> None:
    fd = make()
    with pytest.raises(FrameError):
        check(fd, SIZE)
    os.close(fd)


def test_what_is_one_is_taken() -> None:
    fd = sealed()
    check(fd, SIZE)
    os.close(fd)


def test_an_empty_file_is_refused() -> None:
    fd = BlobFile.of([]).fd
    with pytest.raises(FrameError):
        check(fd, 0)
    os.close(fd)


class Script:
    """A worker that sends what a test says."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        self.lengths = [SIZE]
        self.pieces = 1

    def __call__(self, execution: FakeExecution) -> None:
        header = {
            "type": "result",
            "execution_id": execution.header["execution_id"],
            "outcome": "ok",
            "value": {"$blob": [0, "str"]},
            "file": True,
            "blobs": self.lengths,
        }
        [frame] = dump_frame(header)
        execution.send_descriptors(bytes(frame), self.fds, pieces=self.pieces)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def box(script: Script) -> Iterator[InProcessBroker]:
    with InProcessBroker(script) as running:
        yield running


def result_of(client: Client) -> dict[str, Any]:
    status, progress, blobs = client.post("anything")
    assert status == 200
    return {**progress["result"], "blobs": [bytes(blob) for blob in blobs]}


def test_a_worker_s_result_in_a_file_gets_through_and_is_stored(box: InProcessBroker, script: Script) -> None:
    client = Client.open(box)
    before = descriptors()
    script.fds = [sealed()]
    assert result_of(client)["blobs"] == [b"x" * SIZE]
    os.close(script.fds[0])
    for _ in range(2):
        _, again, blobs = box.host.request("GET", f"/v1/executions/{client.session_id}-1")
        assert (again["result"]["outcome"], bytes(blobs[0])) == ("ok", b"x" * SIZE)
    assert client.close() == 200
    del blobs
    assert none_are_left(before)


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
def test_a_worker_that_sends_another_file_loses_its_session_and_nobody_else(
    box: InProcessBroker, script: Script, make: Callable[[], int]
) -> None:
    hostile, other = Client.open(box), Client.open(box)
    before = descriptors()
    script.fds = [make()]
    assert result_of(hostile)["session_lost"] == "protocol"
    os.close(script.fds[0])
    script.fds = [sealed()]
    assert result_of(other)["blobs"] == [b"x" * SIZE]
    os.close(script.fds[0])
    hostile.close()
    other.close()
    assert none_are_left(before)


@pytest.mark.parametrize(("count", "pieces"), [(2, 1), (100, 1), (1, 40)])
def test_more_descriptors_than_one_end_the_session(
    box: InProcessBroker, script: Script, count: int, pieces: int
) -> None:
    client = Client.open(box)
    before = descriptors()
    fd = sealed()
    script.fds, script.pieces = [fd] * count, pieces
    assert result_of(client)["session_lost"] == "protocol"
    os.close(fd)
    client.close()
    assert none_are_left(before)


def test_more_than_the_limit_is_refused_however_it_comes(box: InProcessBroker, script: Script) -> None:
    client = Client.open(box)
    script.fds, script.lengths = [sealed()], [257 << 20]
    assert result_of(client)["session_lost"] == "protocol"
    os.close(script.fds[0])


def test_a_lost_descriptor_ends_the_execution_with_an_error_and_keeps_the_session(
    box: InProcessBroker, script: Script
) -> None:
    client = Client.open(box)
    result = result_of(client)
    assert (result["outcome"], result["session_lost"]) == ("raised", None)
    assert "out of descriptors" in result["error"]["message"]
    script.fds = [sealed()]
    assert result_of(client)["outcome"] == "ok"
    os.close(script.fds[0])


def test_files_of_forgotten_results_are_closed(
    box: InProcessBroker, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.executions.limits.STORED_EXECUTIONS", 3)
    client = Client.open(box)
    script.fds = [sealed()]
    counts = []
    for _ in range(12):
        assert result_of(client)["outcome"] == "ok"
        counts.append(descriptors())
    assert min(counts[8:]) <= max(counts[:4])  # a leak would have added four and more
    os.close(script.fds[0])


GUEST = """
import os, socket, struct, json
def connect():
    sock = socket.socket(socket.AF_UNIX)
    sock.connect({path!r})
    sock.sendall(b"GET /v1/frames HTTP/1.1\\r\\nHost: x\\r\\nConnection: Upgrade\\r\\nUpgrade: {upgrade}\\r\\n\\r\\n")
    assert sock.recv(4096).startswith(b"HTTP/1.1 101 ")
    return sock
def frame(**header):
    head = json.dumps(header).encode()
    return struct.pack(">I", len(head)) + head
body = {{"key": "k", "execution_id": {execution!r}, "tool": "search", "args": [{{"$blob": [0, "bytes"]}}], "wait_s": 0}}
call = frame(request="POST /v1/tool-calls", body=body, file=True, blobs=[5])
plain = frame(request="GET /v1/tool-calls/none", body={{}})
fd = os.memfd_create("x")
os.write(fd, b"12345")
sock = connect()
"""


def run_guest(client: Client, code: str) -> Any:
    prelude = GUEST.format(path=str(client.box.guest_socket), upgrade=FILES_UPGRADE, execution=f"{client.session_id}-1")
    progress = client.run(prelude + code)
    assert progress.result is not None
    assert progress.result.error is None, progress.result.error
    return progress.result.value


def test_generated_code_that_sends_a_file_which_can_change_is_refused(real: InProcessBroker) -> None:
    client = Client.open(real)
    code = "socket.send_fds(sock, [call], [fd]); json.loads(sock.recv(9000)[4:])['status']"
    assert run_guest(client, code) == 400
    assert client.close() == 200


def test_generated_code_that_sends_no_descriptor_is_told_so(real: InProcessBroker) -> None:
    client = Client.open(real)
    assert run_guest(client, "sock.sendall(call); json.loads(sock.recv(9000)[4:])['status']") == 424
    assert client.close() == 200


@pytest.mark.parametrize(
    "code",
    [
        # With half a frame: such a descriptor would be held for as long as the other half does not come.
        "socket.send_fds(sock, [call[:20]], [fd]); sock.recv(1) == b''",
        "socket.send_fds(sock, [call[:20]], [fd] * 200); sock.recv(1) == b''",
        # With frames that announce none.
        "[(socket.send_fds(sock, [plain], [fd]), sock.recv(9000)) for _ in range(50)] != []",
    ],
)
def test_descriptors_of_generated_code_do_not_pile_up_in_the_broker(real: InProcessBroker, code: str) -> None:
    client = Client.open(real)
    before = descriptors()
    assert run_guest(client, code + " and connect() is not None") is True
    assert client.close() == 200
    assert none_are_left(before)
