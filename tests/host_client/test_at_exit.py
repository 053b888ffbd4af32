"""What runs when the process exits: once, in the process that asked for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.docker.sandboxes import ROOT

HOST = """
import os, sys, threading
from host_client.at_exit import at_exit
lock = threading.Lock()

def run():
    with lock:
        print("ran in", "the parent" if os.getpid() == parent else "a child", flush=True)

parent = os.getpid()
cancel = at_exit(run)
"""


@pytest.mark.parametrize(
    ("then", "printed"),
    [
        ("", ["ran in the parent"]),
        ("cancel(); cancel()", []),
        ("sys.exit(0 if os.fork() == 0 else os.waitstatus_to_exitcode(os.wait()[1]))", ["ran in the parent"]),
        # As where another thread of the parent held it: nobody in the child would ever release it.
        (
            "with lock: child = os.fork()\nif child == 0: lock.acquire(); sys.exit()\nos.waitpid(child, 0)",
            ["ran in the parent"],
        ),
        ("at_exit(run) if os.fork() == 0 else os.wait()", ["ran in a child", "ran in the parent"]),
        (
            "import multiprocessing; multiprocessing.get_context('fork').Process(target=at_exit, args=(run,)).run()",
            ["ran in the parent"] * 2,
        ),
        (
            "import multiprocessing\n"
            "child = multiprocessing.get_context('fork').Process(target=at_exit, args=(run,))\n"
            "child.start(); child.join(); assert child.exitcode == 0",
            ["ran in a child", "ran in the parent"],
        ),
    ],
)
def test_hooks_run_once_in_the_process_that_asked(then: str, printed: list[str]) -> None:
    host = subprocess.run(
        [sys.executable, "-c", HOST + then], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert (host.returncode, host.stdout.splitlines()) == (0, printed), host.stderr
