"""Preloads: what generated code finds imported, what it shares with its neighbours (nothing), and what can go wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.protocol.messages import Outcome
from broker.testing import InProcessBroker
from tests.broker.conftest import Client

MODULES = {
    "shelf": "books = ['one']\nauthor = 'nobody'",
    "crashing": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "leaving": "raise SystemExit('gone')",
    "threaded": "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
}


@pytest.fixture(scope="module")
def guest_site(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("guest-site")
    for name, code in MODULES.items():
        (folder / f"{name}.py").write_text(code)
    return str(folder)


@pytest.fixture(scope="module")
def box(guest_site: str) -> Iterator[InProcessBroker]:
    with InProcessBroker(preload=("numpy", "shelf", "colorsys"), guest_site=guest_site) as box:
        yield box


@pytest.fixture
def pair(box: InProcessBroker) -> Iterator[tuple[Client, Client]]:
    pair = Client.open(box), Client.open(box)
    yield pair
    for client in pair:
        client.close()


def value(client: Client, code: str) -> Any:
    result = client.run(code).result
    assert result is not None
    assert result.outcome is Outcome.OK, result.error
    return result.value


def test_preloads_are_imported_before_generated_code_asks(pair: tuple[Client, Client]) -> None:
    loaded = "import sys; [name in sys.modules for name in ('numpy', 'shelf', 'colorsys')]"
    for client in pair:
        assert value(client, loaded) == [True] * 3
        assert value(client, "'numpy' in globals() or 'shelf' in globals()") is False


def test_what_one_session_does_to_a_preload_no_other_sees(pair: tuple[Client, Client], box: InProcessBroker) -> None:
    mine, other = pair
    value(mine, "import numpy, shelf; shelf.books.append('two'); shelf.author = 'me'; numpy.sum = None; numpy.pi = 3")
    look = "import numpy, shelf; [shelf.books, shelf.author, numpy.sum is None, numpy.pi > 3]"
    assert value(mine, look) == [["one", "two"], "me", True, False]
    assert value(other, look) == [["one"], "nobody", False, True]
    later = Client.open(box)
    assert value(later, look) == [["one"], "nobody", False, True]
    later.close()


def test_each_session_has_random_numbers_of_its_own(pair: tuple[Client, Client]) -> None:
    draw = (
        "import random, secrets, uuid, numpy\n"
        "[random.random(), float(numpy.random.random()), secrets.token_hex(8), uuid.uuid4().hex, "
        "float(numpy.random.default_rng().random())]"
    )
    for mine, others in zip(value(pair[0], draw), value(pair[1], draw), strict=True):
        assert mine != others


def test_threads_of_linear_algebra_work_in_every_session(pair: tuple[Client, Client]) -> None:
    code = "import numpy; a = numpy.ones((300, 300)); float((a @ a).sum())"
    assert [value(client, code) for client in pair] == [300.0**3] * 2


def test_what_was_loaded_before_is_no_work_for_the_garbage_collector(pair: tuple[Client, Client]) -> None:
    assert value(pair[0], "import gc; [gc.isenabled(), gc.get_freeze_count() > 10_000]") == [True, True]


def test_a_session_inherits_no_descriptor_and_no_signal_handler(pair: tuple[Client, Client]) -> None:
    # Beside the standard ones: /dev/null, the channel, the output pipe's other end, and the folder that lists them.
    opened = value(pair[1], "import os; sorted(int(fd) for fd in os.listdir('/proc/self/fd'))")
    assert len([fd for fd in opened if fd > 2]) <= 4, opened
    handlers = "import signal; [signal.getsignal(n) == signal.SIG_DFL for n in (signal.SIGCHLD, signal.SIGTERM)]"
    assert value(pair[0], handlers) == [True, True]


@pytest.mark.parametrize(
    ("preload", "reason"),
    [
        ("nowhere_to_be_found", "ModuleNotFoundError"),
        ("leaving", "SystemExit: gone"),
        ("crashing", "ended the process"),
        ("threaded", "leaves 1 threads running"),
    ],
)
def test_a_preload_that_fails_is_named_instead_of_a_broken_session(preload: str, reason: str, guest_site: str) -> None:
    with InProcessBroker(preload=("shelf", preload), guest_site=guest_site) as box:
        for _ in range(2):  # also where the process is started anew
            status, reply, _ = box.host.request("POST", "/v1/sessions")
            assert (status, reply["error"]["code"]) == (503, "session_start_failed")
            assert f"preload '{preload}'" in reply["error"]["message"]
            assert reason in reply["error"]["message"]


def test_when_the_zygote_dies_its_sessions_are_lost_and_new_ones_start(guest_site: str) -> None:
    with InProcessBroker(preload=("shelf",), guest_site=guest_site) as box:
        client = Client.open(box)
        zygote = value(client, "import os; os.getppid()")
        running = client.post("import time; time.sleep(60)", wait_s=0)
        assert running[0] == 200
        os.kill(zygote, signal.SIGKILL)
        _, reply, _ = client.claims(execution_id=running[1]["execution_id"], wait_s=20)
        assert reply["result"]["outcome"] == "worker_died"
        assert reply["result"]["session_lost"] == "killed"
        fresh = Client.open(box)
        assert value(fresh, f"import os, sys; ['shelf' in sys.modules, os.getppid() == {zygote}]") == [True, False]


def test_importing_the_supervisor_does_not_import_the_worker() -> None:
    """PID 1 stays small: workers and what they need live in the zygote."""
    code = "import sys, broker.supervisor.__main__, broker.supervisor.core; print('broker.worker' in sys.modules)"
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
