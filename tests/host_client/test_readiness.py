"""Waiting for a sandbox: woken by the kernel, and never longer than it lives."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.protocol.directory_watch import DirectoryWatch
from host_client.providers.readiness import Died, NotReady, TimedOut, wait_until_ready


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def test_it_wakes_when_the_file_appears(directory: Path) -> None:
    probed = threading.Event()

    def probe(left_s: float) -> str:
        if not (directory / "here").exists():
            probed.set()
            raise NotReady("not there")
        return "ready"

    def create() -> None:
        probed.wait(5)
        (directory / "here").touch()

    creator = threading.Thread(target=create)
    with DirectoryWatch(directory) as watch:
        creator.start()
        assert wait_until_ready(probe, watch=watch, pid=None, is_running=lambda: True, timeout_s=5) == "ready"
    creator.join()


def never(left_s: float) -> str:
    raise NotReady("nothing listens")


def test_a_process_that_ends_is_noticed_without_waiting_for_the_timeout(directory: Path) -> None:
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    assert process.stdin is not None

    def probe(left_s: float) -> str:
        assert process.stdin is not None
        process.stdin.close()
        raise NotReady("not there")

    with DirectoryWatch(directory) as watch, pytest.raises(Died):
        wait_until_ready(probe, watch=watch, pid=process.pid, is_running=lambda: False, timeout_s=60)
    process.wait()


def test_a_pid_that_is_somebody_elses_does_not_count(directory: Path) -> None:
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    asked = []

    def is_running() -> bool:
        asked.append(True)
        (directory / "here").touch()
        return True

    def probe(left_s: float) -> str:
        if not (directory / "here").exists():
            raise NotReady("not there")
        return "ready"

    with DirectoryWatch(directory) as watch:
        assert wait_until_ready(probe, watch=watch, pid=ended.pid, is_running=is_running, timeout_s=5) == "ready"
    assert asked
    ended.wait()


def test_without_a_pid_the_engine_is_asked(directory: Path) -> None:
    with DirectoryWatch(directory) as watch, pytest.raises(Died):
        wait_until_ready(never, watch=watch, pid=0, is_running=lambda: False, timeout_s=60)


def test_the_timeout_says_what_was_tried_last(directory: Path) -> None:
    with DirectoryWatch(directory) as watch, pytest.raises(TimedOut, match="nothing listens"):
        wait_until_ready(never, watch=watch, pid=os.getpid(), is_running=lambda: True, timeout_s=0.01)


def test_a_directory_that_is_gone_is_an_error_and_leaves_no_descriptor(directory: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        DirectoryWatch(directory / "missing")
    with DirectoryWatch(directory):
        pass
    assert len(os.listdir("/proc/self/fd")) == before
