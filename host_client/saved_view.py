"""``rlm-sandbox inspect``: what is in a saved session. The header is read, the payload only counted and compared."""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from pathlib import Path

from host_client.saved_file import SavedFile, open_file


def inspect(path: Path, *, as_json: bool) -> int:
    """Print what is in a file and return the exit status.

    Raises:
        SavedFileDamaged, SavedFileNewer: It is not what was saved.
    """
    with open_file(path) as saved:
        deque(saved.chunks(), maxlen=0)  # raises where it is not what was saved
        print(_json(saved) if as_json else "\n".join(_lines(saved)))
    return 0


def _json(saved: SavedFile) -> str:
    variables = [dataclasses.asdict(each) for each in saved.header.variables]
    return json.dumps({**saved.header.to_json(), "variables": variables, "size": saved.size})


def _lines(saved: SavedFile) -> list[str]:
    header = saved.header
    packages = ", ".join(f"{name} {version}" for name, version in header.packages.items())
    lines = [
        f"{saved.path}: {saved.size:,} bytes, saved {header.made_at} with rlm-sandbox {header.version}",
        f"needs Python {'.'.join(header.python.split('.')[:2])}{', ' + packages if packages else ''}",
        f"{len(header.variables)} variables:",
    ]
    width = max((len(each.name) for each in header.variables), default=0)
    lines += [f"  {each.name:<{width}}  {each.size_bytes:>13,} bytes  {each.type}" for each in header.variables]
    if header.not_saved:
        lines.append(f"{len(header.not_saved)} not saved:")
        lines += [f"  {name}: {reason}" for name, reason in header.not_saved.items()]
    return lines
