"""Artefacts of a session: figures, tables and files that generated code made for people to look at."""

from __future__ import annotations

import dataclasses
import logging
import mimetypes
import os
from pathlib import Path
from typing import Any

from host_client.errors import FileRefused, MalformedReply, SandboxError
from host_client.files import Link, SessionFiles, get_through
from host_client.session_paths import check_relative

log = logging.getLogger(__name__)

#: Folder of the session that is looked at, in the folder that it started in.
FOLDER = "artifacts"
#: More of them than this is not for people to look at.
MAX_ARTIFACTS = 200
#: Of one artefact: what is larger is data, for ``files.get``.
MAX_ARTIFACT_BYTES = 64 << 20

INSTRUCTIONS = (
    " Files written into artifacts/ (relative to where the code starts) are handed to the user; so are open matplotlib "
    "figures at the end of an execution, and a DataFrame that is the last expression's value."
)

#: What a model's code makes, and Python's own table may lack or get from the machine.
_MIME_TYPES = {
    ".csv": "text/csv",
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".md": "text/markdown",
    ".parquet": "application/vnd.apache.parquet",
    ".svg": "image/svg+xml",
    ".tsv": "text/tab-separated-values",
    ".webp": "image/webp",
    ".xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
}
_TABLES = frozenset({"text/csv", "text/tab-separated-values", _MIME_TYPES[".parquet"], _MIME_TYPES[".xlsx"]})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One artefact.

    Attributes:
        name: Path below the folder ``artifacts/``.
        kind: ``figure``, ``table`` or ``file``, by the name's ending.
        mime: Type, such as ``image/png``, by the name's ending; nothing was looked at.
        size_bytes: What the session says.
        host_path: Where it was saved, with ``artifacts_to``; else None.
        files: Where it is read from.
    """

    name: str
    kind: str
    mime: str
    size_bytes: int
    host_path: Path | None = None
    files: SessionFiles | None = dataclasses.field(default=None, repr=False, compare=False)

    def read(self) -> bytes:
        """Return its content: what was saved, else what the session has now.

        Raises:
            FileRefused: It is gone, or too large.
            SandboxError: What ``files.read`` raises.
        """
        if self.host_path is not None:
            return self.host_path.read_bytes()
        if self.files is None:
            raise FileRefused("there is nothing to read it from", path=self.name)
        return self.files.read(f"{FOLDER}/{self.name}", max_bytes=MAX_ARTIFACT_BYTES)

    def save(self, host_path: str | os.PathLike[str]) -> None:
        """Write it to a file of the host.

        Raises:
            FileRefused, SandboxError: As ``files.get``.
        """
        if self.host_path is not None:
            Path(host_path).write_bytes(self.read())
        elif self.files is not None:
            self.files.get(f"{FOLDER}/{self.name}", host_path, max_bytes=MAX_ARTIFACT_BYTES)


class Artifacts:
    """The artefacts of one interpreter.

    Args:
        files: Of its session.
        folder: Where they are saved on the host, or None to leave them in the session.
    """

    def __init__(self, files: SessionFiles, folder: str | os.PathLike[str] | None) -> None:
        self._files, self._folder = files, None if folder is None else Path(folder)
        self._known: dict[str, tuple[int, int]] = {}
        self.latest: list[Artifact] = []

    @property
    def saves(self) -> bool:
        """Whether they are saved on the host after each execution."""
        return self._folder is not None

    def collect(self, link: Link) -> list[Artifact]:
        """Return the artefacts that there are, and save those that are new or changed.

        Raises:
            MalformedReply: The session gave no list of them.
            FileRefused: A name that is not safe here.
            SandboxError: What an execution raises.
        """
        found = _read(link.aside.ask("artifacts", max_entries=MAX_ARTIFACTS))
        if self._folder is not None:
            for name, stamp in found.items():
                if self._known.get(name) != stamp and self._save(link, name, self._folder):
                    self._known[name] = stamp
        self.latest = [self._artifact(name, size) for name, (size, _) in found.items()]
        return self.latest

    def collect_quietly(self, link: Link) -> None:
        """Collect after an execution, whose own result is what matters: problems are logged."""
        try:
            self.collect(link)
        except SandboxError as error:
            log.warning("the session's artefacts were not collected: %s", error)

    def _save(self, link: Link, name: str, folder: Path) -> bool:
        target = folder / name
        try:
            _make_folders(folder, name)
            get_through(link, f"{FOLDER}/{name}", target, max_bytes=MAX_ARTIFACT_BYTES)
        except FileRefused as refused:
            log.warning("an artefact was not saved: %s", refused)
            return False
        return True

    def _artifact(self, name: str, size: int) -> Artifact:
        mime = mime_of(name)
        kind = "figure" if mime.startswith("image/") else "table" if mime in _TABLES else "file"
        path = None if self._folder is None or name not in self._known else self._folder / name
        return Artifact(name=name, kind=kind, mime=mime, size_bytes=size, host_path=path, files=self._files)


def mime_of(name: str) -> str:
    """Return the type that a name's ending stands for."""
    ending = os.path.splitext(name)[1].lower()
    return _MIME_TYPES.get(ending) or mimetypes.guess_type(name)[0] or "application/octet-stream"


def _make_folders(root: Path, name: str) -> None:
    """Make the folders around an artefact; a link among them would lead elsewhere."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        around = root
        for part in name.split("/")[:-1]:
            around = around / part
            if around.is_symlink():
                raise FileRefused("a link is in the way", path=str(around))
            around.mkdir(exist_ok=True)
    except OSError as error:
        raise FileRefused(error.strerror or str(error), path=str(root / name)) from error


def _read(answer: Any) -> dict[str, tuple[int, int]]:
    if not isinstance(answer, list) or len(answer) > MAX_ARTIFACTS:
        raise MalformedReply("the session gave no list of artefacts")
    found = {}
    for item in answer:
        if not isinstance(item, list) or [type(part) for part in item] != [str, int, int] or item[1] < 0:
            raise MalformedReply("the session gave no list of artefacts")
        check_relative(item[0])
        found[item[0]] = (item[1], item[2])
    return found
