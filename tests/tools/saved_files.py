"""Saved files that somebody has tampered with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from host_client.saved_file import _PREFIX, FORMAT, MAGIC, open_file


def rewrite(path: Path, change: Callable[[dict[str, Any]], None], payload: bytes | None = None) -> None:
    """Change header and payload of a saved file, with digests that fit: as a forger would."""
    with open_file(path) as saved:
        header, before = saved.header.to_json(), b"".join(saved.chunks())
    payload = before if payload is None else payload
    header.update(payload_bytes=len(payload), payload_sha256=hashlib.sha256(payload).hexdigest())
    change(header)
    write(path, json.dumps(header).encode(), payload)


def write(path: Path, header: bytes, payload: bytes = b"", *, found_format: int = FORMAT) -> None:
    """Write a file with any header."""
    digest = hashlib.sha256(header).digest()
    prefix = _PREFIX.pack(MAGIC, found_format, 0, len(payload), len(header), digest)
    path.write_bytes(prefix + payload + header)
