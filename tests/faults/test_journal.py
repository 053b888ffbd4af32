"""The journal itself: what it refuses, what it forgets, and what a disk under it may do."""

from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.testing import FakeClock, InProcessBroker
from host_client import SandboxInterpreter, SandboxSettings, journal, tool
from host_client.calls_view import calls
from host_client.errors import CallGone, Fenced, JournalNewer, JournalUnusable
from host_client.journal import CallKey, CallRecord, Holder, SqliteJournal, default_path
from host_client.memory_journal import MemoryJournal
from host_client.providers.fake import FakeProvider
from tests.faults.seams import count, counting

HOLDER = Holder(sandbox_id="b", session_id="s", epoch=1, sandbox="default")


def record(call_id: str = "c", attempt: int = 1, **fields: object) -> CallRecord:
    base = CallRecord(
        sandbox_id="b",
        call_id=call_id,
        attempt=attempt,
        session_id="s",
        sandbox="default",
        execution_id="e",
        tool="effect",
        started_at=1000.0,
    )
    return dataclasses.replace(base, **fields)  # type: ignore[arg-type]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(1000.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.sqlite3"


@pytest.fixture
def kept(path: Path, clock: FakeClock) -> SqliteJournal:
    made = SqliteJournal(path, clock=clock)
    made.hold(HOLDER)
    return made


@pytest.fixture(params=["file", "memory"])
def either(request: pytest.FixtureRequest, path: Path, clock: FakeClock) -> SqliteJournal | MemoryJournal:
    made = SqliteJournal(path, clock=clock) if request.param == "file" else MemoryJournal(clock=clock)
    made.hold(HOLDER)
    return made


def later(epoch: int) -> Holder:
    return dataclasses.replace(HOLDER, epoch=epoch)


def test_an_outcome_outlasts_the_process_that_wrote_it(kept: SqliteJournal, path: Path, clock: FakeClock) -> None:
    kept.intend(HOLDER, record())
    kept.conclude(record(state="done", outcome=b"result", duration_s=0.5))
    found = SqliteJournal(path, clock=clock).find(CallKey("b", "c", 1))
    assert found is not None
    assert (found.state, found.outcome, found.delivered) == ("done", b"result", False)


def test_a_replaced_holder_cannot_record_an_intent(either: SqliteJournal | MemoryJournal) -> None:
    assert either.hold(later(2)) is True
    with pytest.raises(Fenced):
        either.intend(HOLDER, record())
    assert either.find(CallKey("b", "c", 1)) is None


@pytest.mark.parametrize("state", ["started", "done", "failed", "unknown"])
def test_a_call_that_started_cannot_start_again(either: SqliteJournal | MemoryJournal, state: str) -> None:
    either.intend(HOLDER, record())
    either.conclude(record(state=state))
    for attempt in (1, 2):
        with pytest.raises(CallGone):
            either.intend(HOLDER, record(attempt=attempt))


def test_a_call_that_was_requeued_may_start_again(either: SqliteJournal | MemoryJournal) -> None:
    either.intend(HOLDER, record())
    either.resolve(CallKey("b", "c", 1), journal.REQUEUED)
    either.intend(HOLDER, record(attempt=2))


def test_ids_of_one_sandbox_touch_no_other(either: SqliteJournal | MemoryJournal) -> None:
    either.intend(HOLDER, record())
    other = dataclasses.replace(HOLDER, sandbox_id="other")
    either.intend(other, record(sandbox_id="other"))
    either.conclude(record(sandbox_id="other", state="done"))
    found = either.find(CallKey("b", "c", 1))
    assert found is not None
    assert found.state == "started"


def test_a_session_held_elsewhere_meanwhile_is_not_completely_known(either: SqliteJournal | MemoryJournal) -> None:
    assert either.hold(later(3)) is False


def test_forgetting_a_beginning_makes_its_session_incomplete(
    either: SqliteJournal | MemoryJournal, clock: FakeClock
) -> None:
    either.intend(HOLDER, record())
    clock.advance(journal.MAX_AGE_S - 10)
    either.hold(later(2))
    clock.advance(20)
    either.prune()
    assert either.find(CallKey("b", "c", 1)) is None
    assert either.hold(later(3)) is False


def test_a_clock_that_jumps_forgets_but_never_lets_a_tool_run_again(
    either: SqliteJournal | MemoryJournal, clock: FakeClock
) -> None:
    either.intend(HOLDER, record())
    clock.advance(1e9)
    either.prune()
    clock.advance(-2e9)
    either.prune()
    assert either.hold(later(2)) is False


def test_results_are_bounded_together_the_oldest_go_first(
    either: SqliteJournal | MemoryJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MAX_BYTES", 2500)
    for number in range(4):
        either.conclude(record(f"c{number}", state="done", outcome=b"x" * 1000, started_at=1000.0 + number))
    either.prune()
    found = [either.find(CallKey("b", f"c{number}", 1)) for number in range(4)]
    assert [each is not None and each.outcome is not None for each in found] == [False, False, True, True]
    assert all(each is not None and each.state == "done" for each in found)


def test_calls_are_bounded_in_number(either: SqliteJournal | MemoryJournal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_CALLS", 3)
    for number in range(10):
        either.conclude(record(f"c{number}", state="done", started_at=1000.0 + number))
    either.prune()
    assert [each.call_id for each in either.calls(99)] == ["c7", "c8", "c9"]


def test_a_result_that_is_too_large_is_not_kept(
    either: SqliteJournal | MemoryJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MAX_OUTCOME_BYTES", 10)
    either.conclude(record(state="done", outcome=b"x" * 11))
    found = either.find(CallKey("b", "c", 1))
    assert found is not None
    assert (found.state, found.outcome) == ("done", None)


def test_a_delivered_result_is_not_kept_any_longer(kept: SqliteJournal, path: Path, clock: FakeClock) -> None:
    kept.conclude(record(state="done", outcome=b"result"))
    kept.delivered(CallKey("b", "c", 1))
    kept.close()
    found = SqliteJournal(path, clock=clock).find(CallKey("b", "c", 1))
    assert found is not None
    assert (found.delivered, found.outcome) == (True, None)


def test_many_threads_share_flushes_and_lose_nothing(kept: SqliteJournal, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = 0
    commit = kept._commit_now

    def counted(*batch: object) -> None:
        nonlocal commits
        commits += 1
        commit(*batch)  # type: ignore[arg-type]

    monkeypatch.setattr(kept, "_commit_now", counted)
    together = threading.Barrier(32)

    def work(number: int) -> None:
        together.wait()
        kept.intend(HOLDER, record(f"c{number}"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(32)]
    kept._writing.acquire()  # as if a flush were under way while all of them arrive
    for thread in threads:
        thread.start()
    while kept._batches.waiting < 31:
        os.sched_yield()
    kept._writing.release()
    for thread in threads:
        thread.join()
    assert len(kept.calls(99)) == 32
    assert commits == 2  # the first one's, and everybody else's


def test_who_is_interrupted_with_the_changes_of_others_in_hand_lets_none_of_them_count_as_written(
    kept: SqliteJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[BaseException] = []
    entered, go_on = threading.Event(), threading.Event()
    commit = kept._commit_now

    def struck(*batch: object) -> None:
        if not entered.is_set():
            entered.set()
            assert go_on.wait(20)
            commit(*batch)  # type: ignore[arg-type]
        else:
            raise KeyboardInterrupt  # before it has noted anything

    def work(number: int) -> None:
        try:
            kept.intend(HOLDER, record(f"c{number}"))
        except BaseException as error:
            errors.append(error)

    monkeypatch.setattr(kept, "_commit_now", struck)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    threads[0].start()
    assert entered.wait(20)
    for thread in threads[1:]:
        thread.start()
    while kept._batches.waiting < 5:
        os.sched_yield()
    go_on.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert sorted(type(error).__name__ for error in errors) == ["JournalUnusable"] * 4 + ["KeyboardInterrupt"]
    assert len(kept.calls(9)) == 1


def test_a_forked_child_opens_a_connection_of_its_own(kept: SqliteJournal) -> None:
    kept.intend(HOLDER, record("parent"))
    child = os.fork()
    if child == 0:
        try:
            kept.intend(HOLDER, record("child"))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    kept.intend(HOLDER, record("parent again"))
    assert sorted(each.call_id for each in kept.calls(9)) == ["child", "parent", "parent again"]


def test_only_its_user_can_read_it(kept: SqliteJournal, path: Path) -> None:
    kept.conclude(record(state="done", outcome=b"private"))
    assert {file.stat().st_mode & 0o077 for file in [*path.parent.iterdir(), path.parent]} == {0}


def test_a_journal_in_memory_is_a_forked_childs_own_and_hands_out_copies(clock: FakeClock) -> None:
    made = MemoryJournal(clock=clock)
    made.hold(HOLDER)
    mine = record()
    made.intend(HOLDER, mine)
    mine.state = "done"
    found = made.find(mine.key)
    assert found is not None
    assert found.state == "started"
    made.conclude(mine)
    mine.state = "failed"  # of a conclusion that is never recorded
    assert [each.state for each in made.calls(9)] == ["done"]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            made.intend(HOLDER, record())  # the parent's start is not this process'
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_journal_in_memory_notes_what_was_delivered(clock: FakeClock) -> None:
    made = MemoryJournal(clock=clock)
    made.conclude(record(state="done", outcome=b"result"))
    made.delivered(CallKey("b", "c", 1))
    made.close()
    [found] = made.calls(9)
    assert (found.state, found.delivered) == ("done", True)
    assert made.find(CallKey("b", "c", 2)) is None


# What cannot be used is said before anything starts.


def test_a_newer_version_is_refused_and_left_alone(path: Path, kept: SqliteJournal) -> None:
    kept.close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version={journal.SCHEMA_VERSION + 1}")
    before = path.read_bytes()
    with pytest.raises(JournalNewer, match="version 2"):
        SqliteJournal(path)
    assert path.read_bytes() == before


def test_a_damaged_file_says_what_helps(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b"no database at all, but long enough to be read as one" * 100)
    with pytest.raises(JournalUnusable, match="damaged"):
        SqliteJournal(path)


@pytest.fixture
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker() as box:
        yield box


def test_nothing_starts_with_a_journal_that_cannot_be_used(
    broker: InProcessBroker, path: Path, kept: SqliteJournal
) -> None:
    kept.close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=99")
    provider = FakeProvider(broker)
    with (
        pytest.raises(JournalNewer),
        SandboxInterpreter(provider=provider, settings=SandboxSettings(journal=str(path))),
    ):
        pass
    assert provider.started == 0


# A disk of its own.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "journal-test", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody mount")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return filler


CODE = """
kept = 1
try:
    seen = effect("x")
except Exception as error:
    seen = f"{type(error).__name__}: {error}"
"""


def test_on_a_full_disk_the_tool_does_not_run_and_the_host_is_told(
    broker: InProcessBroker, small_disk: Path, tmp_path: Path
) -> None:
    counter = tmp_path / "counter"
    settings = SandboxSettings(journal=str(small_disk / "journal"))
    tools = {"effect": counting(counter)}
    with SandboxInterpreter(tools=tools, provider=FakeProvider(broker), settings=settings) as interpreter:
        interpreter.execute("kept = 0")
        filler = fill(small_disk)
        with pytest.raises(JournalUnusable, match="the disk is full"):
            interpreter.execute(CODE)
        assert count(counter) == 0
        filler.unlink()
        assert interpreter.execute("kept") in (0, 1)  # ALIVE
        assert interpreter.execute("effect('x')") == "X"
        assert count(counter) == 1


def test_a_tool_whose_outcome_cannot_be_recorded_ends_as_unknown(
    broker: InProcessBroker, small_disk: Path, tmp_path: Path
) -> None:
    counter = tmp_path / "counter"
    work = counting(counter)

    def effect(text: str) -> str:
        fill(small_disk)
        return work(text) * 100_000

    settings = SandboxSettings(journal=str(small_disk / "journal"))
    with SandboxInterpreter(tools={"effect": effect}, provider=FakeProvider(broker), settings=settings) as interpreter:
        with pytest.raises(JournalUnusable, match="the disk is full"):
            interpreter.execute(CODE)
        assert count(counter) == 1
        (small_disk / "filler").unlink()
        assert "X" not in str(interpreter.execute("globals().get('seen', '')"))


def test_a_read_only_disk_is_told_before_anything_starts(broker: InProcessBroker, small_disk: Path) -> None:
    path = small_disk / "journal"
    SqliteJournal(path).close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    provider = FakeProvider(broker)
    with (
        pytest.raises(JournalUnusable, match="cannot be written"),
        SandboxInterpreter(provider=provider, settings=SandboxSettings(journal=str(path))),
    ):
        pass
    assert provider.started == 0


# The command.


def test_the_command_shows_what_was_called_and_no_result(
    broker: InProcessBroker, capsys: pytest.CaptureFixture[str], state_folder: Path
) -> None:
    @tool(idempotent=True)
    def look_up(word: str) -> str:
        return "a private answer"

    def fails() -> None:
        raise ValueError("a private error")

    with SandboxInterpreter(tools={"look_up": look_up, "fails": fails}, provider=FakeProvider(broker)) as interpreter:
        interpreter.execute("look_up('x')\ntry: fails()\nexcept ValueError: pass")
    assert default_path().is_relative_to(state_folder)
    assert calls(SandboxSettings(), limit=10, as_json=True) == 0
    shown = capsys.readouterr().out
    assert "private" not in shown
    rows = [json.loads(line) for line in shown.splitlines()]
    assert [(row["tool"], row["state"], row["attempt"], row["delivered"]) for row in rows] == [
        ("look_up", "done", 1, True),
        ("fails", "failed", 1, True),
    ]
    calls(SandboxSettings(), limit=1, as_json=False)
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split()[:4] == ["TIME", "SANDBOX", "SESSION", "TOOL"]
    assert "fails" in row


def test_a_name_from_a_sandbox_cannot_write_to_the_terminal(
    capsys: pytest.CaptureFixture[str], path: Path, kept: SqliteJournal
) -> None:
    kept.conclude(record(tool="\x1b[2Jevil\n", state="done"))
    kept.close()
    calls(SandboxSettings(journal=str(path)), limit=1, as_json=False)
    assert "\x1b" not in capsys.readouterr().out
