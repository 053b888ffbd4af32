"""``python -m benchmarks.soak``: sandbox after sandbox in one process; what that process and the engine still hold.

Each sandbox is started, runs one execution with one tool call, and is shut down. Between two steps nothing runs: every
ending is waited for and garbage is collected, so that a figure that grows from step to step is a leak and nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.agents import ROOT
from benchmarks.processes import pss_bytes, tree
from host_client import SandboxInterpreter, SandboxSettings, wait_for_endings
from host_client.engine import connect_engine
from host_client.providers.container_spec import LABEL, LABEL_DIRECTORY
from host_client.runtime_dir import VARIABLE, RuntimeDir

#: An engine that other programs keep busy ends a sandbox late, not never.
ENDINGS_S = 120.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is held after a number of sandboxes.

    Attributes:
        sandboxes: How many have come and gone.
        seconds: Since the first of them.
        rss_kib: Resident memory of this process.
        pss_kib: The same, with pages shared by n processes counted as one n-th each.
        blocks: Objects that Python's allocator has given out: exact where resident memory is rough.
        descriptors: Open descriptors of this process.
        threads: Threads of this process, Python's and others.
        children: Its child processes.
        containers: Containers of ours below this run's runtime directory.
        directories: Socket directories and uid reservations in it.
        interfaces: Network interfaces of the machine (an engine's networks and their ends are such).
        mounts: Mounts of the machine.
        journal_rows: Rows of the journal.
        journal_kib: Size of the journal's file, its log included.
        history_rows: Rows of the history of runs.
        temporary: Files left in the folder for temporary files.
    """

    sandboxes: int
    seconds: float
    rss_kib: int
    pss_kib: int
    blocks: int
    descriptors: int
    threads: int
    children: int
    containers: int
    directories: int
    interfaces: int
    mounts: int
    journal_rows: int
    journal_kib: int
    history_rows: int
    temporary: int


class Soak:
    """One run.

    Args:
        folder: Where sockets, journal, history and temporary files of the run are.
        at_once: How many threads have one sandbox after the other.
        pooled: Whether sandboxes come from a factory with its warm pool instead of being started for each.
    """

    def __init__(self, folder: Path, *, at_once: int, pooled: bool) -> None:
        self._folder, self._at_once = folder, at_once
        for name in ("r", "t"):
            (folder / name).mkdir(mode=0o700)
        os.environ[VARIABLE] = str(folder / "r")
        tempfile.tempdir = str(folder / "t")
        self._settings = SandboxSettings(
            journal=str(folder / "journal.sqlite3"), history=str(folder / "history.sqlite3"), start_timeout_s=120
        )
        self._factory = SandboxInterpreter.factory(tools={"twice": _twice}, settings=self._settings) if pooled else None

    def readings(self, count: int, every: int) -> Iterator[Reading]:
        """Run ``count`` sandboxes; yield a reading at the beginning (after one of each thread) and after each step.

        Raises:
            RuntimeError: A sandbox gave a wrong answer, or endings hang.
        """
        begin = time.monotonic()
        with ThreadPoolExecutor(self._at_once) as pool:
            done = len(list(pool.map(self._live, range(self._at_once))))  # what is loaded late, and stays
            yield self._read(done, begin)
            while done < count:
                step = min(every, count - done)
                done += len(list(pool.map(self._live, range(done, done + step))))
                yield self._read(done, begin)

    def _live(self, number: int) -> None:
        made = self._factory() if self._factory else SandboxInterpreter({"twice": _twice}, settings=self._settings)
        with made as interpreter:
            if interpreter.execute(f"twice({number})") != 2 * number:
                raise RuntimeError(f"sandbox {number} gave a wrong answer")

    def _read(self, done: int, begin: float) -> Reading:
        if not wait_for_endings(ENDINGS_S):
            raise RuntimeError("a sandbox did not end")
        gc.collect()
        journal = self._folder / "journal.sqlite3"
        return Reading(
            sandboxes=done,
            seconds=round(time.monotonic() - begin, 1),
            rss_kib=_rss_kib(),
            pss_kib=pss_bytes([os.getpid()]) >> 10,
            blocks=sys.getallocatedblocks(),
            descriptors=len(os.listdir("/proc/self/fd")),
            threads=len(os.listdir("/proc/self/task")),
            children=len(list(tree(os.getpid()))) - 1,
            containers=_containers(self._folder),
            directories=_directories(RuntimeDir.open()),
            interfaces=len(os.listdir("/sys/class/net")),
            mounts=Path("/proc/self/mountinfo").read_text().count("\n"),
            journal_rows=_rows(journal),
            journal_kib=sum(path.stat().st_size for path in self._folder.glob("journal.sqlite3*")) >> 10,
            history_rows=_rows(self._folder / "history.sqlite3"),
            temporary=len(os.listdir(self._folder / "t")),
        )


def _twice(number: int) -> int:
    return 2 * number


def _rss_kib() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1])


def _containers(folder: Path) -> int:
    with connect_engine() as engine:
        listed = engine.list({LABEL: "1"})
    return sum(Path(there["Labels"][LABEL_DIRECTORY]).is_relative_to(folder) for there in listed)


def _directories(runtime: RuntimeDir) -> int:
    return len([path for path in runtime.path.glob("**/*") if path.name not in ("lock", "uids", "bubblewrap")])


def _rows(path: Path) -> int:
    if not path.exists():
        return 0
    db = sqlite3.connect(path)
    try:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return sum(int(db.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0]) for name in names)
    finally:
        db.close()


def main(argv: list[str] | None = None) -> int:
    """Run and print one line of figures for each step; exit code 0 when all sandboxes answered."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="sandboxes in all (default: 10,000)")
    parser.add_argument("--every", type=int, default=500, help="sandboxes between two readings")
    parser.add_argument("--at-once", type=int, default=2, help="threads, each with one sandbox after the other")
    parser.add_argument("--pooled", action="store_true", help="from a factory's warm pool")
    parser.add_argument("--out", type=Path, help="JSON file of the readings, written anew after each step")
    given = parser.parse_args(argv)
    threading.current_thread().name = "soak"
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), at_once=given.at_once, pooled=given.pooled)
        for reading in soak.readings(given.count, given.every):
            found.append(dataclasses.asdict(reading))
            print(", ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
            if given.out is not None:
                given.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
