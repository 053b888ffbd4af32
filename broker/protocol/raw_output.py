"""Much output travels as a blob, where the host asks for that: as JSON 4 MiB take 14 ms to write, send and read.

A framed request with ``"raw_output": true`` may be answered like that: ``output`` is empty then, and ``output_blob`` is
the index of the blob that holds it as UTF-8, the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from broker.protocol.blob_file import WORTH_BYTES, BlobFile, Blobs
from broker.protocol.executions import ExecutionResult
from broker.protocol.frames import Blob
from broker.protocol.reading import BadRequest

#: The member of a framed request that asks for it.
ASKED = "raw_output"


def lifted(body: dict[str, Any], blobs: Blobs) -> Sequence[Blob] | None:
    """Take much output out of a progress, and return the reply's blobs; None where there is no need.

    Args:
        body: The progress; changed.
        blobs: Those of its value, which leave no room for another one where they are in a file.
    """
    result = body["result"]
    if result is None or len(result["output"]) < WORTH_BYTES or isinstance(blobs, BlobFile):
        return None
    output = result["output"].encode()
    body["result"] = {**result, "output": "", "output_blob": len(blobs)}
    return [*blobs, output]


def put_back(result: ExecutionResult, blobs: Sequence[memoryview]) -> Sequence[memoryview]:
    """Undo ``lifted``, and return the blobs of the value.

    Raises:
        BadRequest: There is no such blob.
    """
    if result.output_blob is None:
        return blobs
    if result.output_blob != len(blobs) - 1:
        raise BadRequest("execution result: its output is in a blob that is not the last one")
    result.output, result.output_blob = str(blobs[-1], "utf-8", "replace"), None
    return blobs[:-1]
