"""What the tests without an engine share: the program, the files, a runtime directory of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_client.bubblewrap.program import ensure_bwrap
from host_client.bubblewrap.records import Records
from host_client.bubblewrap.tree import ensure_tree
from host_client.endings import wait_for_endings
from host_client.errors import BubblewrapMissing
from host_client.providers.bubblewrap import BubblewrapProvider
from host_client.runtime_dir import RuntimeDir
from host_client.settings import SandboxSettings

ROOT = Path(__file__).resolve().parents[2]
CGROUPS = Path("/sys/fs/cgroup")
#: Runs a program as a user of its own kind: no rights over the machine, one number, no way to others.
ORDINARY_USER = ("unshare", "--user", "--map-user=1000", "--map-group=1000", "--")


def make_ready() -> None:
    """Bring up what sandboxes without an engine are made of; in CI, a machine that cannot have it has failed."""
    try:
        ensure_bwrap(print)
    except BubblewrapMissing as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(error.message)
    ensure_tree(SandboxSettings(), print)


@pytest.fixture(scope="session")
def ready() -> None:
    make_ready()


@pytest.fixture
def runtime(ready: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[RuntimeDir]:
    """A runtime directory of the test's own; whatever a failed test left there is removed."""
    with tempfile.TemporaryDirectory() as path:
        monkeypatch.setenv("RLM_SANDBOX_RUNTIME_DIR", f"{path}/r")
        made = RuntimeDir.open()
        yield made
        records = Records(made)
        for record in records.all():
            records.remove(record)


@pytest.fixture
def provider(runtime: RuntimeDir) -> Iterator[BubblewrapProvider]:
    made = BubblewrapProvider()
    yield made
    made.stop_all_owned()


def leaks(runtime: RuntimeDir) -> list[str]:
    """What is left of sandboxes, once they have ended: records, directories, reservations."""
    wait_for_endings()
    records = [f"bubblewrap/{path.name}" for path in runtime.path.glob("bubblewrap/*")]
    directories = [path.name for path in runtime.path.iterdir() if path.name not in ("lock", "uids", "bubblewrap")]
    reservations = [f"uids/{path.name}" for path in (runtime.path / "uids").iterdir()]
    return records + directories + reservations


def run_host(code: str, *, as_ordinary_user: bool = False, given: str | None = None) -> str:
    """Run a host process to its end, after making ``provider`` and ``settings``; return what it printed."""
    done = start_host(code, as_ordinary_user=as_ordinary_user)
    output, errors = done.communicate(given, timeout=120)
    assert done.returncode == 0, errors
    return output


def start_host(code: str, *, as_ordinary_user: bool = False) -> subprocess.Popen[str]:
    """Start a host process that runs this code after making ``provider`` and ``settings``."""
    prelude = (
        "import os, sys\n"
        "from host_client.providers.bubblewrap import BubblewrapProvider\n"
        "from host_client.settings import SandboxSettings\n"
        "provider, settings = BubblewrapProvider(), SandboxSettings()\n"
    )
    return subprocess.Popen(
        [*(ORDINARY_USER if as_ordinary_user else ()), sys.executable, "-c", prelude + code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
