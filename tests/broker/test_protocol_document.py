"""``docs/protocol.md`` is the authority: its routes are the code's, and its examples run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from flask import Flask

from broker.guest_api import make_guest_app
from broker.host_api import make_host_app
from broker.logs import Log
from broker.protocol import PROTOCOL_VERSION, limits
from broker.sessions import Sessions
from broker.testing import FakeSpawner, InProcessBroker
from broker.testing.fake_worker import ok

DOCUMENT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
HOST_PART, GUEST_PART = DOCUMENT.split("## Host plane")[1].split("## Guest plane")


def documented(part: str) -> set[str]:
    return {f"{method} {path}" for method, path in re.findall(r"^### `(\w+) (\S+)`", part, re.MULTILINE)}


def routed(app: Flask) -> set[str]:
    return {
        f"{method} {rule.rule}" for rule in app.url_map.iter_rules() for method in (rule.methods or set()) - {"HEAD"}
    }


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    spawner = FakeSpawner(lambda execution: ok(), tmp_path / "guest.sock")
    return Sessions(spawner, max_sessions=1, log=Log())


def test_the_host_planes_routes_are_those_of_the_document(sessions: Sessions) -> None:
    assert routed(make_host_app(sessions, Log(), name=None)) == documented(HOST_PART)


def test_the_guest_planes_routes_are_those_of_the_document(sessions: Sessions) -> None:
    assert routed(make_guest_app(sessions, Log())) == documented(GUEST_PART)


def test_the_document_has_the_version_and_the_limits_of_the_code() -> None:
    assert f"# The protocol of the broker, version {PROTOCOL_VERSION}\n" in DOCUMENT
    assert f"deeper than {limits.MAX_JSON_DEPTH} levels" in DOCUMENT
    assert f"more than {limits.MAX_JSON_CONTAINERS:,} lists and objects" in DOCUMENT
    assert f"{limits.MAX_TOOL_CALL_BYTES >> 20} MiB" in DOCUMENT
    assert f"| one long poll | {limits.MAX_WAIT_S:g} s" in DOCUMENT
    assert f"| open tool calls of a session | {limits.MAX_PENDING_TOOL_CALLS:,}" in DOCUMENT
    assert f"The last {limits.STORED_EXECUTIONS}\nexecutions" in DOCUMENT


def test_the_documents_curl_examples_run_from_top_to_bottom() -> None:
    assert shutil.which("curl"), "this test needs curl"
    script = "\n".join(["set -euo pipefail", *re.findall(r"```bash\n(.*?)```", DOCUMENT, re.DOTALL)])
    with InProcessBroker() as box:
        # curl is no process of the session; let it speak as one.
        box.spawner.slot_of = lambda peer: 0  # type: ignore[method-assign]
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOST_SOCKET": str(box.host_socket),
            "GUEST_SOCKET": str(box.guest_socket),
        }
        ran = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert '"error":{"code"' not in ran.stdout, ran.stdout
    assert '"output":"2\\n"' in ran.stdout
    assert '"value":"JANE AUSTEN"' in ran.stdout
    assert '"state":"done","value":"Jane Austen, too"' in ran.stdout
    assert '"outcome":"interrupted"' in ran.stdout
    assert ran.stdout.rstrip().endswith('"state":"closed"}')
