"""The commands about running sandboxes: ``up``, ``down``, ``status``, ``logs``, ``devsh``."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from host_client.engine import connect_engine
from host_client.errors import SetupError, UnknownSandbox
from host_client.image import image_tag
from host_client.log_view import lines_of, readable
from host_client.providers.container_spec import GUEST_SITE, LABEL, LABEL_HOST_UID, LABEL_NAME
from host_client.providers.docker import DockerProvider
from host_client.providers.docker_engine import ContainerNotFound
from host_client.providers.engine_api import Engine
from host_client.providers.launch import NameTaken, check_name, find_named
from host_client.reaper import reap, remove_directory
from host_client.runtime_dir import UIDS_PER_SANDBOX, RuntimeDir
from host_client.settings import SandboxSettings
from host_client.status_table import describe, size, table

Connect = Callable[[], Engine]
ImageOf = Callable[[SandboxSettings], str]

#: As many lines as one wants to read before scrolling.
_LOG_LINES = 500


def up(
    name: str, settings: SandboxSettings, *, connect: Connect = connect_engine, image_of: ImageOf = image_tag
) -> int:
    """Start a named sandbox that outlives this process, and say what to type next.

    One that runs already is fine, and is left as it is.

    Raises:
        SandboxError: It cannot be started; nothing is left behind.
    """
    started = time.monotonic()
    provider = DockerProvider(connect=connect, image_of=image_of)
    try:
        provider.start(settings, name=name)
    except NameTaken:
        _say_running(name, connect, image_of(settings))
    else:
        _say(
            f"sandbox {name!r} is up ({time.monotonic() - started:.1f} s): {size(settings.memory)} of memory, "
            f"{settings.cpus:g} cores, up to {settings.max_sessions} sessions, no network"
        )
    print_usage(name)
    return 0


def down(name: str, *, connect: Connect = connect_engine) -> int:
    """Stop a sandbox and remove its container, its socket and its uids; one that is not there is fine.

    Raises:
        SandboxError: The engine does not answer, or refuses.
    """
    check_name(name)
    with _engine(connect) as engine:
        found = _lookup(engine, name)
        if found is None:
            _say(f"no sandbox {name!r} is running; nothing to do")
            return 0
        engine.remove(found["Id"])
        remove_directory(found)
    _say(f"sandbox {name!r} is stopped and removed")
    return 0


def status(*, connect: Connect = connect_engine) -> int:
    """Print a table of this user's sandboxes: named ones, and those that running processes own.

    Raises:
        SandboxError: The engine does not answer.
    """
    now = datetime.datetime.now(datetime.timezone.utc).astimezone()
    with _engine(connect) as engine:
        reap(engine, RuntimeDir.open())
        rows = []
        for container in _mine(engine):
            # One that ended between the list and the question is not there to be shown.
            with contextlib.suppress(ContainerNotFound):
                rows.append(describe(engine, container, now=now))
    if not rows:
        print(f"no sandbox is running\nto start one: {_command()} up")
        return 0
    print("\n".join(table(sorted(rows, key=lambda row: (row.started_by, row.name)))))
    return 0


def logs(name: str, follow: bool = False, *, connect: Connect = connect_engine) -> int:
    """Print a sandbox's logs for a person, also of one that has ended.

    Args:
        name: The sandbox.
        follow: Go on until it ends or Ctrl-C.
        connect: Returns the engine.

    Raises:
        UnknownSandbox: There is none of that name.
        SandboxError: The engine does not answer.
    """
    with _engine(connect) as engine:
        found = _known(engine, name)["Id"]
        chunks = engine.follow_logs(found, _LOG_LINES) if follow else [engine.logs(found, _LOG_LINES).encode()]
        with contextlib.suppress(KeyboardInterrupt):
            for line in lines_of(chunks):
                print(readable(line), flush=follow)
    return 0


def devsh(
    name: str,
    *,
    connect: Connect = connect_engine,
    which: Callable[[str], str | None] = shutil.which,
    execute: Callable[..., Any] = os.execvp,
) -> int:
    """Replace this process with a shell in a sandbox, under a uid like generated code's; start the sandbox if need be.

    Raises:
        SetupError: There is no ``docker`` command to open a terminal with.
        SandboxError: The sandbox cannot be started.
    """
    docker = which("docker")
    if docker is None:
        raise SetupError(
            "a shell needs the command-line program `docker`, which is not on the PATH",
            help="on Debian and Ubuntu: sudo apt-get install -y docker-cli || sudo apt-get install -y docker.io",
        )
    check_name(name)
    with _engine(connect) as engine:
        found = _lookup(engine, name)
    if found is None or found["State"] != "running":
        _say(f"sandbox {name!r} is not running: starting it (to remove it: {_command()} down {name})")
        DockerProvider(connect=connect).start(SandboxSettings.from_environment(), name=name)
    with _engine(connect) as engine:
        details = engine.inspect(_known(engine, name)["Id"])
    uid = _spare_uid(details)
    _say(f"a shell in {name!r} as uid {uid}, confined like generated code; Ctrl-D ends it")
    sys.stdout.flush()
    execute(docker, _shell_command(details["Id"], uid, terminal=sys.stdin.isatty()))
    return 0


def _shell_command(container_id: str, uid: int, *, terminal: bool) -> list[str]:
    environment = {"HOME": "/tmp", "PYTHONPATH": GUEST_SITE, "PYTHONDONTWRITEBYTECODE": "1", "PS1": "sandbox:\\w\\$ "}  # noqa: S108
    options = [part for name, value in environment.items() for part in ("-e", f"{name}={value}")]
    flags = "-it" if terminal else "-i"
    return ["docker", "exec", flags, "-u", f"{uid}:{uid}", "-w", "/tmp", *options, container_id, "bash", "--norc"]  # noqa: S108


def _spare_uid(details: dict[str, Any]) -> int:
    """Return a uid of this sandbox's own that no session has, so that no session's end takes the shell with it."""
    config = json.loads(details["Args"][-1])
    return int(config["guest_uid_base"]) + min(2 * int(config["max_sessions"]), UIDS_PER_SANDBOX - 1)


def _say_running(name: str, connect: Connect, current_image: str) -> None:
    with _engine(connect) as engine:
        row = describe(engine, _known(engine, name), now=datetime.datetime.now(datetime.timezone.utc).astimezone())
    if row.state == "running":
        _say(f"sandbox {name!r} is already up since {row.since}, with {row.sessions} sessions")
    else:
        _say(f"sandbox {name!r} is already there, but: {row.state}; see why: {_command()} logs {name}")
    if row.image != current_image:
        _say(f"it runs {row.image}; these settings and sources now give {current_image}")
        _say(f"to renew it: {_command()} down {name} && {_command()} up {name}")


def print_usage(name: str) -> None:
    """Say what to type next."""
    # DSPy 3.3 took a factory; before, an interpreter.
    argument = f'interpreter_factory=SandboxInterpreter.factory(sandbox="{name}")'
    if _dspy_version() < (3, 3):
        argument = f'interpreter=SandboxInterpreter(sandbox="{name}")'
    print(
        f"""
What to type next, in Python ({_shown(Path(sys.executable))}), once dspy.configure(lm=...) is done:

    import dspy
    from host_client import SandboxInterpreter
    rlm = dspy.RLM("context, query -> answer", {argument})

To look at it: {_command()} status    To stop it: {_command()} down {name}"""
    )


def _command() -> str:
    """Return how to call this command from here: the environment that holds it need not be an active one."""
    beside = Path(sys.executable).with_name("rlm-sandbox")
    return _shown(beside) if shutil.which("rlm-sandbox") is None and beside.exists() else "rlm-sandbox"


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _dspy_version() -> tuple[int, int]:
    """Return major and minor version of the installed DSPy without importing it; very new where it is not there."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
        major, minor, *_ = importlib.metadata.version("dspy").split(".")
        return int(major), int(minor)
    return (999, 0)


def _mine(engine: Engine) -> list[dict[str, Any]]:
    return engine.list({LABEL: "1", LABEL_HOST_UID: str(os.geteuid())})


def _lookup(engine: Engine, name: str) -> dict[str, Any] | None:
    """Return the list entry of this user's sandbox of that name, named or owned, running or not."""
    owned = (container for container in _mine(engine) if container["Labels"].get(LABEL_NAME) == name)
    return find_named(engine, name) or next(owned, None)


def _known(engine: Engine, name: str) -> dict[str, Any]:
    found = _lookup(engine, name)
    if found is None:
        raise UnknownSandbox(f"there is no sandbox {name!r}", help="those that there are: rlm-sandbox status")
    return found


@contextlib.contextmanager
def _engine(connect: Connect) -> Iterator[Engine]:
    engine = connect()
    try:
        yield engine
    finally:
        engine.close()


def _say(text: str) -> None:
    print(f"[sandbox] {text}", flush=True)
