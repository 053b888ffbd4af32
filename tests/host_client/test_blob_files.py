"""Claims about large values on their way: in a file where that is possible, as bytes where it is not."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from broker.protocol import blob_file
from broker.protocol.blob_file import BlobFile
from broker.protocol.frames import FILES_UPGRADE
from broker.testing import InProcessBroker
from host_client import SandboxInterpreter, SandboxSettings, http_wire, transport, wait_for_endings
from host_client.providers.fake import FakeProvider

VALUES = ["a" * 300_000, "\u00e9" * 100_000, b"\0\xff" * 80_000, ["b" * 200_000, "c"], {"k": "d" * 150_000}]
CODE = "[len(values[0]), values[1][-1], values[2][-1], [len(v) for v in values[3]], len(values[4]['k'])]"
EXPECTED = [300_000, "\u00e9", 255, [200_000, 1], 150_000]


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the files that were written."""
    sizes: list[int] = []
    original = BlobFile.of

    def of(blobs: Sequence[Any]) -> BlobFile:
        file = original(blobs)
        sizes.append(file.size)
        return file

    monkeypatch.setattr(transport.BlobFile, "of", of)
    return sizes


def test_large_values_arrive_in_a_file(interpreter: SandboxInterpreter, files: list[int]) -> None:
    assert interpreter.execute(CODE, {"values": VALUES}) == EXPECTED
    assert len(files) == 1
    assert interpreter.execute(CODE, {"values": VALUES}) == EXPECTED
    assert sum(files[1:]) == 0  # a reference crosses, not the value
    interpreter.execute("1", {"small": "x" * 5_000})
    assert len(files) == 1


def test_where_descriptors_get_lost_they_arrive_as_bytes(
    interpreter: SandboxInterpreter, files: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_wire, "rights", lambda fds: ())
    assert interpreter.execute(CODE, {"values": VALUES}) == EXPECTED
    assert interpreter.execute("len(other)", {"other": "z" * 400_000}) == 400_000
    assert len(files) == 1  # not tried again


def test_a_broker_that_does_not_know_files_gets_bytes(
    interpreter: SandboxInterpreter, files: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = http_wire.Exchange.upgrade

    def upgrade(self: http_wire.Exchange, path: str, protocol: str) -> bool:
        return protocol != FILES_UPGRADE and original(self, path, protocol)

    monkeypatch.setattr(http_wire.Exchange, "upgrade", upgrade)
    assert interpreter.execute(CODE, {"values": VALUES}) == EXPECTED
    assert files == []


def test_without_memory_files_they_arrive_as_bytes(
    interpreter: SandboxInterpreter, files: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "BLOB_FILES", False)
    interpreter.shutdown()
    settings = SandboxSettings(journal=":memory:", history=False)
    with SandboxInterpreter(provider=interpreter._provider, settings=settings) as other:
        assert other.execute(CODE, {"values": VALUES}) == EXPECTED
    assert files == []


def test_where_no_file_can_be_had_they_arrive_as_bytes(
    interpreter: SandboxInterpreter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(blob_file.os, "memfd_create", refuse)
    assert interpreter.execute(CODE, {"values": VALUES}) == EXPECTED


TEXTS = ["x" * 300_000, "\u00e9" * 200_000]


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the files that the host was given."""
    sizes: list[int] = []
    original = BlobFile.received

    def take(fds: Sequence[int], lengths: Sequence[int]) -> BlobFile:
        file = original(fds, lengths)
        sizes.append(file.size)
        return file

    monkeypatch.setattr(http_wire.BlobFile, "received", take)
    return sizes


class Tools:
    """What the tools of a session were given."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def turn(self, text: str) -> str:
        self.given.append(text)
        return text[::-1] + "!"


@pytest.fixture
def tools() -> Tools:
    return Tools()


@pytest.fixture
def calling(box: InProcessBroker, tools: Tools) -> Iterator[SandboxInterpreter]:
    settings = SandboxSettings(journal=":memory:", history=False)
    with SandboxInterpreter({"turn": tools.turn}, provider=FakeProvider(box), settings=settings) as made:
        yield made


@pytest.mark.parametrize("text", TEXTS)
def test_large_results_come_in_a_file(interpreter: SandboxInterpreter, received: list[int], text: str) -> None:
    assert interpreter.execute(f"{text[0]!r} * {len(text)}") == text
    assert interpreter.execute(f"[{text[0]!r} * {len(text)}, 1]") == [text, 1]
    assert interpreter.execute(f"SUBMIT(a={text[0]!r} * {len(text)}, b=b'y' * 200_000)").output == {
        "a": text,
        "b": b"y" * 200_000,
    }
    assert len(received) >= 3  # in this process the broker takes them over too
    count = len(received)
    assert interpreter.execute("'x' * 100_000") == "x" * 100_000
    assert len(received) == count


@pytest.mark.parametrize("text", TEXTS)
def test_large_arguments_and_answers_go_in_files(
    calling: SandboxInterpreter, tools: Tools, received: list[int], files: list[int], text: str
) -> None:
    assert calling.execute(f"answer = turn({text[0]!r} * {len(text)}); len(answer), answer[-1]") == [len(text) + 1, "!"]
    assert tools.given == [text]
    assert received
    assert files == [len((text + "!").encode())]


def test_small_arguments_with_large_answers_and_the_reverse(calling: SandboxInterpreter) -> None:
    calling.tools["grow"] = lambda n: "g" * n
    calling.tools["size"] = len
    assert calling.execute("len(grow(500_000)), size('s' * 400_000), grow(3)") == [500_000, 400_000, "ggg"]


def test_many_calls_at_once_with_large_arguments_are_all_served(calling: SandboxInterpreter, tools: Tools) -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "sizes = [150_000 + n if n % 2 else n for n in range(1, 41)]\n"
        "with ThreadPoolExecutor(20) as pool:\n"
        "    answers = list(pool.map(lambda n: turn('t' * n), sizes))\n"
        "[len(answer) - 1 for answer in answers] == sizes"
    )
    assert calling.execute(code) is True
    assert len(tools.given) == 40


def test_a_host_whose_descriptors_get_lost_asks_for_bytes(
    calling: SandboxInterpreter, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(ancillary: blob_file.Ancillary) -> list[int]:
        blob_file.close_all(blob_file.descriptors(ancillary))
        return []

    monkeypatch.setattr(http_wire, "descriptors", lose)
    for _ in range(2):
        assert calling.execute("'x' * 300_000") == "x" * 300_000
    assert calling.execute("len(turn('y' * 300_000))") == 300_001
    assert tools.given == ["y" * 300_000]


@pytest.mark.parametrize(
    "without",
    [
        "import os\ndef refuse(*_): raise OSError(24, 'too many open files')\nos.memfd_create = refuse",
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))",
    ],
)
def test_a_worker_that_can_make_no_file_sends_bytes(calling: SandboxInterpreter, tools: Tools, without: str) -> None:
    calling.execute(without)
    assert calling.execute("'x' * 300_000") == "x" * 300_000
    assert calling.execute("len(turn('y' * 300_000))") == 300_001
    assert tools.given == ["y" * 300_000]


def test_a_worker_whose_descriptors_get_lost_gets_and_sends_bytes(calling: SandboxInterpreter, tools: Tools) -> None:
    calling.execute(
        "import sys\nmodule = sys.modules['broker.worker.guest_http']\nmodule.descriptors = lambda ancillary: []\n"
    )
    assert calling.execute("answer = turn('y' * 300_000); len(answer), answer == 'y' * 300_000 + '!'") == [
        300_001,
        True,
    ]
    calling.execute("module.rights = lambda fds: ()")
    assert calling.execute("len(turn('z' * 300_000))") == 300_001
    assert tools.given == ["y" * 300_000, "z" * 300_000]  # asked for again by its key, it ran once


def test_too_large_a_result_comes_as_its_text(interpreter: SandboxInterpreter) -> None:
    interpreter.execute("import sys\nsys.modules['broker.protocol.limits'].MAX_TOOL_CALL_BYTES = 1_000_000")
    assert "left out" in interpreter.execute("'x' * 2_000_000")
    assert interpreter.execute("'x' * 700_000") == "x" * 700_000


def test_no_descriptor_is_left_of_a_session(box: InProcessBroker, tools: Tools) -> None:
    settings = SandboxSettings(journal=":memory:", history=False)

    def one() -> None:
        with SandboxInterpreter({"turn": tools.turn}, provider=FakeProvider(box), settings=settings) as made:
            for _ in range(3):
                assert len(made.execute("turn('y' * 300_000)")) == 300_001

    one()
    assert wait_for_endings(30)
    assert memory_files() == []


def memory_files() -> list[str]:
    """The memory files that this process, which is the broker's too, has open."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # it has just been closed
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return [target for target in found if target.startswith("/memfd:rlm-sandbox")]
