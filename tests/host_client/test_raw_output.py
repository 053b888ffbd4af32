"""Claims about much output on its way to the host: as a blob where that is asked for, the same text whichever way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from broker.protocol import raw_output
from broker.protocol.blob_file import BlobFile
from broker.protocol.frames import FILES_UPGRADE, FRAMED_UPGRADE
from broker.testing import InProcessBroker
from host_client import SandboxInterpreter, SandboxSettings, http_wire
from host_client.broker_client import _news
from host_client.errors import MalformedReply
from host_client.providers.fake import FakeProvider
from host_client.transport import Reply

LINE = "\u00e9\u2014plain, \U0001f40b\\n\\0"
PRINT = f"print('{LINE}' * 20_000, end='')"
PRINTED = "\u00e9\u2014plain, \U0001f40b\n\0" * 20_000
#: Cuts a character in two.
LIMIT = 200_001


@pytest.fixture
def blobs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the outputs that came as a blob."""
    sizes: list[int] = []
    put_back = raw_output.put_back

    def noted(result: Any, blobs: Sequence[memoryview]) -> Sequence[memoryview]:
        if result.output_blob is not None:
            sizes.append(len(blobs[-1]))
        return put_back(result, blobs)

    monkeypatch.setattr(raw_output, "put_back", noted)
    return sizes


@pytest.mark.parametrize(
    "refused", [(), (FILES_UPGRADE,), (FILES_UPGRADE, FRAMED_UPGRADE)], ids=["file", "bytes", "json"]
)
def test_much_output_is_the_same_whichever_way_it_comes(
    interpreter: SandboxInterpreter, blobs: list[int], monkeypatch: pytest.MonkeyPatch, refused: tuple[str, ...]
) -> None:
    upgrade = http_wire.Exchange.upgrade
    monkeypatch.setattr(
        http_wire.Exchange, "upgrade", lambda self, path, name: name not in refused and upgrade(self, path, name)
    )
    for _ in range(3):  # the lane is in use from the second one on
        assert interpreter.execute(PRINT) == PRINTED
    assert blobs == ([] if FRAMED_UPGRADE in refused else [len(PRINTED.encode())] * 3)


def test_a_little_output_comes_with_the_rest(interpreter: SandboxInterpreter, blobs: list[int]) -> None:
    assert interpreter.execute("print('x' * 50_000, end='')") == "x" * 50_000
    assert blobs == []


@pytest.mark.parametrize("value", ["'v' * 30_000", "'v' * 300_000"], ids=["blob", "file"])
def test_the_value_comes_beside_it(interpreter: SandboxInterpreter, value: str) -> None:
    assert interpreter.execute(f"{PRINT}\n{value}") == eval(value)
    assert interpreter.last_result is not None
    assert interpreter.last_result.output == PRINTED


def test_what_the_limit_cuts_is_the_same(box: InProcessBroker, blobs: list[int]) -> None:
    settings = SandboxSettings(journal=":memory:", history=False, max_output_bytes=LIMIT)
    with SandboxInterpreter(provider=FakeProvider(box), settings=settings) as interpreter:
        interpreter.execute(PRINT)
        record = interpreter.last_result
    assert record is not None
    whole = PRINTED.encode()
    assert record.output == whole[:LIMIT].decode("utf-8", "ignore")
    assert record.discarded_output_bytes == len(whole) - LIMIT
    assert blobs == [len(record.output.encode())]


def test_where_the_descriptor_of_a_reply_gets_lost_it_is_asked_for_again(
    interpreter: SandboxInterpreter, blobs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    received = http_wire.descriptors

    def lost(ancillary: Any) -> list[int]:
        http_wire.close_all(received(ancillary))
        return []

    monkeypatch.setattr(http_wire, "descriptors", lost)
    assert interpreter.execute(f"times = globals().get('times', 0) + 1\n{PRINT}") == PRINTED
    monkeypatch.undo()
    assert interpreter.execute("times") == 1


@pytest.mark.parametrize("index", [0, 2, 10**9])
def test_a_broker_that_names_another_blob_is_refused(index: int) -> None:
    result = {"outcome": "ok", "output_blob": index}
    header = {"execution_id": "e", "running": False, "result": result}
    with pytest.raises(MalformedReply, match="not the last one"):
        _news(Reply(200, header, [memoryview(b"value"), memoryview(b"output")]))


def test_no_file_is_left_open(interpreter: SandboxInterpreter, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[BlobFile] = []
    worth = BlobFile.worth

    def noted(blobs: Any) -> BlobFile | None:
        file = worth(blobs)
        made.extend(() if file is None else (file,))
        return file

    monkeypatch.setattr(BlobFile, "worth", noted)
    assert interpreter.execute(PRINT) == PRINTED
    assert interpreter._session is not None
    interpreter._session.client.sessions()  # answered when the broker is done with that
    assert [file.fd for file in made] == [-1]
