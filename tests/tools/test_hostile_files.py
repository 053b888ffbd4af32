"""Claims about what a session that lies about its files achieves on the host: nothing."""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.protocol.messages import Outcome
from host_client import FileRefused
from host_client.artifacts import Artifacts
from host_client.aside import REQUEST, Aside
from host_client.errors import MalformedReply
from host_client.files import MAX_ENTRIES, Link, SessionFiles
from host_client.masking import NOTHING_TO_MASK
from host_client.results import ExecutionRecord

Answer = Callable[[dict[str, Any]], Any]


def session(answer: Answer) -> tuple[SessionFiles, Link]:
    """Return the files of a session that answers as it likes."""

    def run(code: str, variables: dict[str, Any]) -> ExecutionRecord:
        return ExecutionRecord(outcome=Outcome.OK, value=answer(variables[REQUEST]))

    link = Link(Aside(run), NOTHING_TO_MASK)

    @contextlib.contextmanager
    def connect() -> Iterator[Link]:
        yield link

    return SessionFiles(connect), link


def part(*parts: tuple[bytes, bool]) -> str:
    """Spell parts of files as a session does."""
    sizes = " ".join(f"{len(data)}:{end:d}" for data, end in parts)
    return f"{sizes}\n{base64.b64encode(b''.join(data for data, _ in parts)).decode()}"


def folder(entries: Any, data: bytes = b"evil") -> SessionFiles:
    """A session with a folder of these entries."""

    def answer(request: dict[str, Any]) -> Any:
        if request["operation"] == "list":
            return {"answer": {"kind": "folder", "size": 0, "entries": entries}}
        wanted = [length for _, _, length in request["parts"]]
        assert set(wanted) <= {len(data)}
        return part(*[(data, True)] * len(wanted))

    return session(answer)[0]


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A folder to write to, beside something that must stay as it is."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "here").mkdir()
    yield tmp_path / "here" / "out"
    assert (tmp_path / "precious").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["here", "precious"]
    assert [name for name in os.listdir(tmp_path / "here") if name != "out"] == []


@pytest.mark.parametrize(
    "name",
    [
        "../precious",
        "..",
        ".",
        "",
        "/etc/evil",
        "a//b",
        "a/../../precious",
        "./x",
        "x/",
        "line\nbreak",
        "\x1b[31mred",
        "nul\0",
        "back\\slash",
        "\ud800",
        "n" * 256,
    ],
)
def test_a_name_that_leads_elsewhere_or_is_not_safe_writes_nothing(target: Path, name: str) -> None:
    with pytest.raises(FileRefused) as caught:
        folder([[name, "file", 4, 0]]).get("d", target)
    assert caught.value.path == name
    assert str(caught.value).isprintable()
    assert not target.exists()


@pytest.mark.parametrize(
    "entries",
    [
        [["a", "file", 4, 0], ["a/b", "file", 4, 0]],  # a file that is a folder too
        [["a", "link", 4, 0], ["a/b", "file", 4, 0]],
        [["a/b", "file", 4, 0]],  # a folder that nobody mentioned
        [["a", "folder", 0, 0], ["a", "folder", 0, 0]],
        [["a", "socket", 0, 0]],
        [["a", "file", -1, 0]],
        [["a", "file", "4", 0]],
        [["a", "file", True, 0]],
        [[5, "file", 4, 0]],
        [["a"]],
        ["a"],
        "abc",
        None,
        [["a", "file", 1, 0]] * (MAX_ENTRIES + 1),
    ],
)
def test_a_listing_that_contradicts_itself_or_is_none_writes_nothing(target: Path, entries: Any) -> None:
    with pytest.raises(MalformedReply):
        folder(entries).get("d", target)
    assert not target.exists()


def test_a_file_that_is_listed_twice_is_made_once_and_refused(target: Path) -> None:
    with pytest.raises(FileRefused, match="exists"):
        folder([["a", "file", 4, 0], ["a", "file", 4, 0]]).get("d", target)
    assert not target.exists()


def test_a_file_that_grows_without_end_is_cut_off_and_nothing_is_left(target: Path) -> None:
    asked = []

    def answer(request: dict[str, Any]) -> Any:
        if request["operation"] == "list":
            return {"answer": {"kind": "file", "size": 1, "entries": []}}
        [[_, _, length]] = request["parts"]
        asked.append(length)
        return part((bytes(length), False))

    with pytest.raises(FileRefused, match="more than 1,000 bytes"):
        session(answer)[0].get("f", target, max_bytes=1000)
    assert asked == [1, 999]
    assert not target.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4:1",
        "3:0\nAAAA",  # less than asked for, and yet not the end: for ever nothing
        "4:1\nAAAA",  # three bytes are no four
        "4:2\nAAAAAA==",
        "-4:1\nAAAAAA==",
        "4:1 0:1\nAAAAAA==",
        "4:1\nnot base64!",
        "5:1\nAAAAAAA=",  # more than asked for
        "9999999999999:1\nAAAA",
        "²:1\nAAAA",
    ],
)
def test_a_part_that_is_none_writes_nothing(target: Path, text: str) -> None:
    def answer(request: dict[str, Any]) -> Any:
        if request["operation"] == "list":
            return {"answer": {"kind": "file", "size": 4, "entries": []}}
        return text

    with pytest.raises(MalformedReply):
        session(answer)[0].get("f", target, max_bytes=1000)
    assert not target.exists()


@pytest.mark.parametrize("reply", [None, 5, "text", [], {"answer": None}, {}])
def test_an_answer_of_another_kind_is_malformed(target: Path, reply: Any) -> None:
    files = session(lambda request: reply)[0]
    for use in (lambda: files.get("f", target), lambda: files.list(), lambda: files.read("f")):
        with pytest.raises(MalformedReply):
            use()


def test_an_error_with_control_characters_is_shown_without_them(target: Path) -> None:
    files = session(lambda request: {"error": "no", "path": "\x1b[2J"})[0]
    with pytest.raises(FileRefused) as caught:
        files.get("f", target)
    assert str(caught.value).isprintable()


def test_code_that_broke_the_helper_is_told_apart(target: Path) -> None:
    def run(code: str, variables: dict[str, Any]) -> ExecutionRecord:
        return ExecutionRecord(outcome=Outcome.TIMED_OUT)

    link = Link(Aside(run), NOTHING_TO_MASK)
    with pytest.raises(MalformedReply, match="timed_out"):
        SessionFiles(lambda: contextlib.nullcontext(link)).list()


@pytest.mark.parametrize("name", ["../precious", "/etc/evil", "\x1b[31m", "a/../b"])
def test_artefacts_with_such_names_are_not_saved(target: Path, name: str) -> None:
    files, link = session(lambda request: {"answer": [[name, 4, 1]]})
    artifacts = Artifacts(files, target.parent)
    with pytest.raises(FileRefused):
        artifacts.collect(link)
    artifacts.collect_quietly(link)
    assert artifacts.latest == []


@pytest.mark.parametrize("answer", [None, [["a", 1]], [["a", -1, 0]], [["a", "1", 0]], [["a", 1, 0]] * 201])
def test_what_is_no_list_of_artefacts_is_malformed(target: Path, answer: Any) -> None:
    files, link = session(lambda request: {"answer": answer})
    with pytest.raises(MalformedReply):
        Artifacts(files, None).collect(link)


def test_a_link_inside_the_artefacts_folder_of_the_host_is_not_followed(tmp_path: Path) -> None:
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    out.mkdir()
    (out / "sub").symlink_to(elsewhere)

    def answer(request: dict[str, Any]) -> Any:
        if request["operation"] == "artifacts":
            return {"answer": [["sub/evil.txt", 4, 1]]}
        if request["operation"] == "list":
            return {"answer": {"kind": "file", "size": 4, "entries": []}}
        return part((b"evil", True))

    files, link = session(answer)
    [artifact] = Artifacts(files, out).collect(link)
    assert artifact.host_path is None
    assert os.listdir(elsewhere) == []
