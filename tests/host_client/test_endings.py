"""What is ended in the background is ended: in time, once, and whoever waits for it knows."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from functools import partial
from pathlib import Path

import pytest

from host_client.endings import Endings

ROOT = Path(__file__).resolve().parents[2]


def test_submit_does_not_wait_and_wait_does() -> None:
    endings, go, done = Endings(), threading.Event(), threading.Event()
    endings.prepare()

    def end() -> None:
        go.wait(10)
        done.set()

    ending = endings.submit(end)
    assert not ending.wait(0.0)
    assert not endings.wait(0.0)
    go.set()
    assert endings.wait(10)
    assert done.is_set()


def test_one_that_fails_keeps_no_other_from_ending(caplog: pytest.LogCaptureFixture) -> None:
    endings, done = Endings(), threading.Event()
    endings.prepare()

    def fail() -> None:
        raise ValueError("broken")

    endings.submit(fail)
    endings.submit(done.set)
    assert endings.wait(10)
    assert done.is_set()
    assert "could not be ended" in caplog.text


def test_many_at_once_are_ended_side_by_side_and_leave_no_thread() -> None:
    endings, together = Endings(), threading.Barrier(4, timeout=10)
    endings.prepare()
    before = threading.active_count()
    for _ in range(40):
        endings.submit(partial(together.wait, 10))
    assert endings.wait(10)
    assert not together.broken
    assert threading.active_count() == before


def test_an_ending_may_submit_another_which_is_waited_for_too() -> None:
    endings, done = Endings(), threading.Event()
    endings.prepare()
    endings.submit(partial(endings.submit, done.set))
    assert endings.wait(10)
    assert done.is_set()


def test_the_garbage_collector_may_submit() -> None:
    class Held:
        pass

    endings, done = Endings(), threading.Event()
    endings.prepare()
    held = Held()
    held.itself = held  # type: ignore[attr-defined]
    weakref.finalize(held, endings.submit, done.set)
    del held
    with endings._lock:  # whatever the interrupted thread holds
        gc.collect()
    assert done.wait(10)


@pytest.mark.parametrize("prepared", [True, False])
def test_the_exit_of_the_process_waits(prepared: bool, tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\n"
        "from host_client import endings\n"
        "from host_client.at_exit import at_exit\n"
        "mine = endings.of_this_process()\n"
        f"if {prepared}: mine.prepare()\n"
        "at_exit(endings.wait_for_endings)\n"
        "at_exit(lambda: mine.submit(lambda: pathlib.Path(sys.argv[1]).touch()) and None)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, tmp_path / "done"], check=True, timeout=60, env=environment)
    assert (tmp_path / "done").exists()
