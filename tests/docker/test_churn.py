"""Two hundred sandboxes, eight at a time: whatever they end by, nothing of them is left."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.soak import Soak
from host_client import SandboxInterpreter, SandboxSettings, wait_for_endings
from host_client.errors import SessionLost
from host_client.journal import SqliteJournal
from host_client.providers.docker import DockerProvider
from host_client.providers.docker_engine import DockerEngine
from host_client.runtime_dir import VARIABLE, RuntimeDir
from tests.docker.sandboxes import engine, image, leaks, provider, runtime, settings

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]

__all__ = ["engine", "image", "provider", "runtime", "settings"]

SANDBOXES, AT_ONCE = 200, 8
#: Every fourth of them is killed before its host says good-bye.
KILLED = 4


def test_two_hundred_sandboxes_leave_nothing_behind(
    provider: DockerProvider,
    settings: SandboxSettings,
    engine: DockerEngine,
    runtime: RuntimeDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    journal = SqliteJournal(tmp_path / "journal.sqlite3")
    ids: list[str] = []
    killing = threading.Lock()

    def live(number: int) -> None:
        interpreter = SandboxInterpreter({"twice": _twice}, settings=settings, provider=provider, journal=journal)
        with interpreter:
            assert interpreter.execute(f"twice({number})") == 2 * number
            assert interpreter.sandbox_handle is not None
            mine = interpreter.sandbox_handle.sandbox_id
            ids.append(mine)
            if number % KILLED == 0:
                with killing:
                    engine.kill(mine)
                with pytest.raises(SessionLost, match="killed"):
                    interpreter.execute("1")

    live(1)  # whatever is loaded late, and stays
    assert wait_for_endings(60)
    engine.close()
    journal.close()
    before = _counts()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(live, range(SANDBOXES)))
    assert wait_for_endings(60)
    engine.close()
    journal.close()
    gc.collect()
    assert _counts() == before
    assert len(set(ids)) == SANDBOXES + 1
    assert list(temporary.iterdir()) == []
    assert leaks(engine, runtime) == []
    assert _traces(ids, runtime) == []


def test_the_soak_sees_what_a_process_and_the_engine_hold(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # The soak sets its own; this puts things back.
        monkeypatch.setenv(VARIABLE, folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        first, last = Soak(Path(folder), at_once=2, pooled=False).readings(count=6, every=4)
    assert (first.sandboxes, last.sandboxes) == (2, 6)
    # What tests before this one have left behind may end meanwhile.
    assert last.descriptors <= first.descriptors
    assert last.threads <= first.threads
    assert (last.containers, last.directories, last.temporary) == (0, 0, 0)
    assert last.children <= first.children
    assert last.journal_rows > first.journal_rows


def _twice(number: int) -> int:
    return 2 * number


def _counts() -> dict[str, int]:
    """What this process has."""
    children = Path("/proc/self/task").glob("*/children")
    return {
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "processes": sum(len(path.read_text().split()) for path in children),
    }


def _traces(ids: list[str], runtime: RuntimeDir) -> list[str]:
    """Where this machine still speaks of these containers: processes, mounts, control groups, sockets."""
    mounts = Path("/proc/self/mountinfo").read_text()
    sockets = Path("/proc/net/unix").read_text()
    found = [f"socket below {runtime.path}"] if str(runtime.path) in sockets else []
    commands = b"\n".join(_command(process) for process in Path("/proc").glob("[0-9]*"))
    groups = {path.name for path in Path("/sys/fs/cgroup").glob("**/docker*/*")}
    for sandbox_id in ids:
        found += [f"process of {sandbox_id}"] * (sandbox_id.encode() in commands)
        found += [f"mount of {sandbox_id}"] * (sandbox_id in mounts)
        found += [f"control group of {sandbox_id}"] * any(sandbox_id in group for group in groups)
    return found


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:  # it has just ended
        return b""
