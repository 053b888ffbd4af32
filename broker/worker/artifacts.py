"""Artefacts: what generated code leaves in ``artifacts/`` of its session's folder, and figures and tables it showed."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from broker.worker import files, shown

FOLDER = "artifacts"

#: More open figures than this are a leak of the code's, not something to look at.
_MAX_FIGURES = 20
#: A table for people; whoever wants all of a larger one writes a file.
_MAX_ROWS = 100_000
#: Numbers of generated names; beyond it the code has filled the folder itself.
_MAX_NUMBER = 10_000


def collect(max_entries: int) -> list[list[Any]]:
    """Keep what was shown, then list the folder.

    Open figures of matplotlib become PNG files and are closed, as notebooks do; a table that was the value of the last
    expression becomes a CSV file.

    Args:
        max_entries: At most so many are listed.

    Returns:
        ``[relative path, size in bytes, time of the last change in ns]`` of each regular file.
    """
    shown.keep_from_now_on()
    for save in (_save_figures, _save_table):
        with contextlib.suppress(Exception):  # code of a library, which generated code may have changed
            save()
    folder = os.path.join(files.home(), FOLDER)
    if not os.path.isdir(folder) or os.path.islink(folder):
        return []
    found: list[list[Any]] = []
    for path, kind, size, changed_ns in files.walk(folder):
        if len(found) >= max_entries:
            break
        if kind == files.FILE:
            found.append([path, size, changed_ns])
    return found


def _save_figures() -> None:
    pyplot: Any = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return
    for number in list(pyplot.get_fignums())[:_MAX_FIGURES]:
        figure = pyplot.figure(number)
        if figure.axes or getattr(figure, "texts", None):  # an empty one shows nothing
            figure.savefig(_new_path("figure", "png"))
        pyplot.close(figure)


def _save_table() -> None:
    table = shown.take()
    if table is not None:
        table.head(_MAX_ROWS).to_csv(_new_path("table", "csv"))


def _new_path(stem: str, ending: str) -> str:
    folder = os.path.join(files.home(), FOLDER)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    for number in range(1, _MAX_NUMBER):
        path = os.path.join(folder, f"{stem}-{number}.{ending}")
        if not os.path.lexists(path):
            return path
    raise FileExistsError(folder)
