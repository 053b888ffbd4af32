"""Claims about the memory files that a session holds."""

from __future__ import annotations

import os

from broker.held_files import HeldFiles
from broker.protocol.blob_file import BlobFile
from broker.protocol.messages import CallState, ToolCallRequest
from broker.tool_calls import ToolCallQueue


def closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False


def test_of_more_files_than_may_be_held_the_oldest_become_bytes() -> None:
    held = HeldFiles(most=2)
    kept = [held.keep(BlobFile.of([b"x" * n, "y"])) for n in (1, 2, 3)]
    assert [file.fd >= 0 for file in kept] == [False, True, True]
    assert [[bytes(view) for view in file.views()] for file in kept] == [[b"x" * n, b"y"] for n in (1, 2, 3)]
    assert len(held) == 2
    held.close()
    assert all(file.fd < 0 for file in kept)


def test_what_is_taken_over_is_not_closed_by_who_brought_it() -> None:
    held, file = HeldFiles(), BlobFile.of([b"abc"])
    fd = file.fd
    kept = held.keep(file)
    file.close()
    assert not closed(fd)
    assert bytes(kept.views()[0]) == b"abc"
    held.let_go(kept)
    assert closed(fd)
    held.let_go((b"bytes",))  # nothing to close
    assert len(held) == 0


def request(number: int) -> ToolCallRequest:
    return ToolCallRequest(key=f"k{number}", execution_id="e", tool="t")


def test_a_call_with_a_file_is_claimed_alone_and_its_file_ends_with_it() -> None:
    held = HeldFiles()
    queue = ToolCallQueue(files=held)
    file = BlobFile.of([b"x" * 100])
    for number, blobs in enumerate([(), (), file, ()]):
        queue.submit(request(number), blobs, size=len(blobs))
    claimed = []
    while queue.claimable:
        claimed.append([call.request.key for call in queue.claim(limit=10, lease_s=60, start=True)])
    assert claimed == [["k0", "k1"], ["k2"], ["k3"]]
    assert len(held) == 1
    queue.close(CallState.CANCELLED)
    assert len(held) == 0
