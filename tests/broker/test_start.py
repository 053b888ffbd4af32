"""What a start loads, and what it does not: time to the first answer is mostly time spent importing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from broker.supervisor.broker_child import start_broker

ROOT = str(Path(__file__).parents[2])


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-S", "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def environment() -> dict[str, str]:
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    return {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join((ROOT, packages))}


def test_before_the_broker_is_started_little_is_loaded() -> None:
    heavy = ("dataclasses", "inspect", "typing", "pathlib", "broker.supervisor.core", "broker.worker", "gevent")
    found = python(f"import sys, broker.supervisor.__main__; print([m for m in {heavy} if m in sys.modules])")
    assert found == "[]"


def test_the_broker_loads_no_templates_no_command_lines_and_no_openssl() -> None:
    code = (
        "import sys, gc, broker.__main__\n"
        "unused = ('jinja2.environment', 'click.core', 'itsdangerous.signer', 'http.server', '_ssl', '_hashlib')\n"
        "print([name for name in unused if name in sys.modules], gc.isenabled(), gc.get_freeze_count() > 1000)"
    )
    assert python(code) == "[] True True"


def test_what_is_left_out_says_so_when_it_is_used() -> None:
    code = "import broker.__main__, jinja2\ntry:\n jinja2.Environment()\nexcept RuntimeError as error:\n print(error)"
    assert python(code) == "jinja2.Environment is left out of the broker: see broker/lean_imports.py"


def test_whoever_imports_the_broker_as_a_library_has_all_of_flask() -> None:
    assert python("import broker.daemon, jinja2, flask.cli; print(flask.cli.AppGroup('x').name)") == "x"


@pytest.mark.parametrize(
    ("config", "said"),
    [("{", "not JSON"), ('{"max_sessions": 0}', "max_sessions"), ('{"preload": "numpy"}', "preload")],
)
def test_a_configuration_that_cannot_be_read_ends_the_start(config: str, said: str) -> None:
    command = [sys.executable, "-m", "broker.supervisor", config]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize("uid", [0, -1, True, "1000"])
def test_a_broker_that_would_be_root_is_not_started(uid: object, capfd: pytest.CaptureFixture[str]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        pid = start_broker(json.dumps({"broker_uid": uid, "broker_gid": uid}), theirs)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 71
    assert "a user that is not root" in capfd.readouterr().err
