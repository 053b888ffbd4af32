"""Claims about large variables on their way: in a file where that is possible, as bytes where it is not."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from broker.protocol import blob_file
from broker.protocol.blob_file import BlobFile
from broker.protocol.frames import FILES_UPGRADE
from broker.testing import InProcessBroker
from host_client import SandboxInterpreter, SandboxSettings, http_wire, transport
from host_client.providers.fake import FakeProvider

VALUES = ["a" * 300_000, "\u00e9" * 100_000, b"\0\xff" * 80_000, ["b" * 200_000, "c"], {"k": "d" * 150_000}]
CODE = "[len(values[0]), values[1][-1], values[2][-1], [len(v) for v in values[3]], len(values[4]['k'])]"
EXPECTED = [300_000, "\u00e9", 255, [200_000, 1], 150_000]


@pytest.fixture(scope="module")
def box() -> Iterator[InProcessBroker]:
    with InProcessBroker() as running:
        yield running


@pytest.fixture
def interpreter(box: InProcessBroker) -> Iterator[SandboxInterpreter]:
    settings = SandboxSettings(journal=":memory:", history=False)
    with SandboxInterpreter(provider=FakeProvider(box), settings=settings) as made:
        yield made


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
    def lose(sock: socket.socket, pieces: Sequence[Any], fds: Sequence[int]) -> int:
        return sock.sendmsg(pieces)

    monkeypatch.setattr(http_wire.socket, "send_fds", lose)
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
    assert len(files) == 1


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
