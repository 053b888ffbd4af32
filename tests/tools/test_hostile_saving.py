"""Claims about what a session, or a file, that lies about what it holds achieves on the host: nothing."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.protocol.messages import Outcome
from host_client import RestoreFailed, SavedFileDamaged, SaveFailed
from host_client.aside import REQUEST, Aside
from host_client.files import Link
from host_client.masking import NOTHING_TO_MASK
from host_client.results import ExecutionRecord
from host_client.saved_file import open_file
from host_client.saving import restore_session, save_session
from tests.tools.saved_files import rewrite, write

GOOD = {"saved": [["x", "int", 4]], "not_saved": {}, "packages": {}, "python": "3.13.5", "size": 4}


def spelt(data: bytes, end: bool = True) -> str:
    return f"{len(data)}:{end:d}\n{base64.b64encode(data).decode()}"


def session(**answers: Any) -> Link:
    """A session that gives these answers by step, whatever it is asked."""

    def run(code: str, variables: dict[str, Any]) -> ExecutionRecord:
        request = variables[REQUEST]
        answer = answers.get(request.get("step", request["operation"]))
        value = answer(request) if isinstance(answer, Callable) else answer  # type: ignore[arg-type]
        return ExecutionRecord(outcome=Outcome.OK, value=value if isinstance(value, str) else {"answer": value})

    return Link(Aside(run), NOTHING_TO_MASK)


def save(path: Path, **answers: Any) -> Any:
    return save_session(session(**answers), path, overwrite=False, timeout_s=60.0)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "session.saved"


@pytest.fixture
def whole(target: Path) -> Path:
    """A file that an honest session made."""
    assert save(target, save={"report": GOOD}, part=spelt(b"data")).saved == ("x",)
    return target


@pytest.mark.parametrize(
    "change",
    [
        {"saved": None},
        {"saved": [["x", "int"]]},
        {"saved": [["x", "int", -1]]},
        {"saved": [["x", "int", True]]},
        {"saved": [[5, "int", 1]]},
        {"saved": [["x" * 2000, "int", 1]]},
        {"saved": [["x", "int", 1]] * 100_001},
        {"saved": {"x": 1}},
        {"not_saved": []},
        {"not_saved": {"x": 5}},
        {"packages": {"numpy": None}},
        {"python": 3.13},
        {"size": "4"},
        {"size": -1},
        {"size": 1 << 80},
    ],
)
def test_a_report_that_is_none_writes_nothing(target: Path, change: dict[str, Any]) -> None:
    with pytest.raises(SaveFailed, match="no account"):
        save(target, save={"report": {**GOOD, **change}}, part=spelt(b"data"))
    assert os.listdir(target.parent) == []


@pytest.mark.parametrize("answer", [None, 5, "text", [], {"report": None}, {"report": []}, {"report": {}}])
def test_an_answer_of_another_kind_writes_nothing(target: Path, answer: Any) -> None:
    with pytest.raises(SaveFailed):
        save(target, save=answer)
    assert os.listdir(target.parent) == []


@pytest.mark.parametrize(
    "part", ["", "4:1", spelt(b"dat"), spelt(b"data!"), "4:1\nnot base64", None, {"a": 1}, spelt(b"")]
)
def test_a_part_that_is_none_writes_nothing(target: Path, part: Any) -> None:
    with pytest.raises(SaveFailed):
        save(target, save={"report": GOOD}, part=part)
    assert os.listdir(target.parent) == []


def test_a_session_that_claims_a_giant_payload_is_refused_at_once(target: Path) -> None:
    with pytest.raises(SaveFailed, match="claims"):
        save(target, save={"report": {**GOOD, "size": 1 << 40}}, part=lambda request: spelt(bytes(request["length"])))
    assert os.listdir(target.parent) == []


def test_a_session_that_is_never_done_meets_the_deadline(target: Path) -> None:
    waited = []

    def wait(request: dict[str, Any]) -> Any:
        waited.append(request["wait_s"])
        return {"at": "\x1b[2J" * 1000}

    with pytest.raises(SaveFailed, match=r"execution_timeout_s=0\.05") as caught:
        save_session(session(save=wait, wait=wait), target, overwrite=False, timeout_s=0.05)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert all(seconds <= 0.05 for seconds in waited)
    assert os.listdir(target.parent) == []


def test_texts_of_a_session_are_shown_without_control_characters(target: Path) -> None:
    report = {**GOOD, "saved": [["\x1b[2J", "\n", 1]], "not_saved": {"\u202e": "\x07"}}
    saved = save(target, save={"report": report}, part=spelt(b"data"))
    assert all(text.isprintable() for text in (*saved.saved, *saved.not_saved, *saved.not_saved.values()))
    with pytest.raises(SaveFailed) as caught:
        save(target.with_name("other"), save={"report": {"failed": "\x1b[2J\nerror: all is well"}})
    assert "\x1b" not in str(caught.value)
    assert "\nerror" not in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"5",
        b"NaN",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b"[[]," * 600_000,
        b'{"made_at": ' + b"9" * 100_000 + b"}",
    ],
)
def test_a_header_that_is_none_is_named(target: Path, header: bytes) -> None:
    write(target, header)
    with pytest.raises(SavedFileDamaged), open_file(target):
        pass


@pytest.mark.parametrize(
    "change",
    [
        {"made_at": 5},
        {"packages": {"numpy": 1}},
        {"variables": [["x", "int", 1.5]]},
        {"variables": "x"},
        {"payload_bytes": 3},
        {"payload_sha256": None},
        {"python": ["3"]},
    ],
)
def test_a_forged_header_is_named(whole: Path, change: dict[str, Any]) -> None:
    rewrite(whole, lambda header: header.update(change))
    with pytest.raises(SavedFileDamaged), open_file(whole):
        pass


def test_a_file_that_claims_a_giant_header_or_payload_takes_no_memory(target: Path) -> None:
    write(target, b"{}")
    data = bytearray(target.read_bytes())
    for at in (16, 24):  # sizes of payload and header
        forged = data.copy()
        forged[at : at + 8] = (1 << 62).to_bytes(8, "little")
        target.write_bytes(forged)
        with pytest.raises(SavedFileDamaged), open_file(target):
            pass
    target.write_bytes(data)
    os.truncate(target, 1 << 40)  # sparse
    with pytest.raises(SavedFileDamaged), open_file(target):
        pass


@pytest.mark.parametrize(
    "answers",
    [
        {},
        {"versions": 5},
        {"versions": {"python": "3.13.5"}},
        {"versions": {"python": 5, "can": True, "packages": {}}},
        {"versions": {"python": "3.13.5", "can": True, "packages": []}},
        {"restore": 5},
        {"restore": {}},
        {"restore": {"restored": "abc", "failed": {}}},
        {"restore": {"restored": [5], "failed": {}}},
        {"restore": {"restored": [], "failed": {"x": 5}}},
        {"restore": {"problem": 5}},
    ],
)
def test_a_session_that_gives_no_account_of_what_it_restored_is_told_apart(
    whole: Path, answers: dict[str, Any]
) -> None:
    honest = {"versions": {"python": "3.13.5", "can": True, "packages": {}}}
    with open_file(whole) as saved, pytest.raises(RestoreFailed):
        restore_session(session(**{**honest, **answers}), saved, ignore_versions=False, timeout_s=60.0)


def test_a_file_that_changes_while_it_is_read_is_noticed_before_the_session_loads_it(whole: Path) -> None:
    asked: list[str] = []

    def note(request: dict[str, Any]) -> Any:
        asked.append(request.get("step", request["operation"]))
        return {"python": "3.13.5", "can": True, "packages": {}}

    with open_file(whole) as saved:
        data = bytearray(whole.read_bytes())
        data[65] ^= 1
        whole.write_bytes(data)
        link = session(versions=note, restore=note, restore_part=note)
        with pytest.raises(SavedFileDamaged, match="not what was saved"):
            restore_session(link, saved, ignore_versions=False, timeout_s=60.0)
    assert asked == ["versions", "restore", "restore_part", "restore"]  # begun, and forgotten; never loaded
