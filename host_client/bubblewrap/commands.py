"""The commands about running sandboxes where there is no engine: ``up``, ``down``, ``status``, ``logs``."""

from __future__ import annotations

import datetime
import time

from host_client.bubblewrap.records import Record, Records
from host_client.errors import SandboxError, SetupError, UnknownSandbox
from host_client.log_view import lines_of, readable
from host_client.providers.bubblewrap import BubblewrapProvider
from host_client.providers.launch import NameTaken, check_name
from host_client.reaper import in_use_by_its_broker
from host_client.runtime_dir import RuntimeDir
from host_client.settings import SandboxSettings
from host_client.status_table import size
from host_client.transport import UnixSocketTransport

_ASK_TIMEOUT_S = 1.0
_LOG_LINES = 500


def up(name: str, settings: SandboxSettings) -> int:
    """Start a named sandbox that outlives this process; one that runs already is left as it is.

    Raises:
        SandboxError: It cannot be started; nothing is left behind.
    """
    from host_client.daemon import print_usage

    started = time.monotonic()
    try:
        BubblewrapProvider().start(settings, name=name)
    except NameTaken:
        _say(f"sandbox {name!r} is already up")
    else:
        _say(
            f"sandbox {name!r} is up ({time.monotonic() - started:.1f} s): {size(settings.memory)} of memory, "
            f"{settings.cpus:g} cores, no network, made with bubblewrap"
        )
    print_usage(name)
    return 0


def down(name: str) -> int:
    """Stop a sandbox and remove all of it; one that is not there is fine."""
    check_name(name)
    records = Records(RuntimeDir.open())
    found = _lookup(records, name)
    if found is None:
        _say(f"no sandbox {name!r} is running; nothing to do")
        return 0
    records.remove(found)
    _say(f"sandbox {name!r} is stopped and removed")
    return 0


def status() -> int:
    """Print a table of this user's sandboxes that no engine knows."""
    records = Records(RuntimeDir.open())
    records.reap(in_use=in_use_by_its_broker)
    found = records.all()
    if not found:
        print("no sandbox is running")
        return 0
    print(f"{'name':<20}{'started by':<12}{'since':<18}{'sessions':<10}state")
    for record in found:
        since = datetime.datetime.fromisoformat(record.created).astimezone().strftime("%Y-%m-%d %H:%M")
        starter = "a process" if record.owned else "up"
        state = records.why_dead(record.sandbox_id) or "running"
        print(f"{record.name:<20}{starter:<12}{since:<18}{_sessions(records, record):<10}{state}")
    return 0


def logs(name: str, follow: bool = False) -> int:
    """Print a sandbox's newest lines for a person, also of one that has ended.

    Raises:
        UnknownSandbox: There is none of that name.
        SetupError: ``follow`` was asked for, which needs an engine.
    """
    if follow:
        raise SetupError("only an engine can follow a log", help=f"rlm-sandbox logs {name}")
    records = Records(RuntimeDir.open())
    found = _lookup(records, name)
    if found is None:
        raise UnknownSandbox(f"there is no sandbox {name!r}", help="those that there are: rlm-sandbox status")
    text = records.log_text(found.sandbox_id)
    for line in list(lines_of([text.encode()]))[-_LOG_LINES:]:
        print(readable(line))
    return 0


def devsh(name: str) -> int:
    """Say that there is no shell to be had.

    Raises:
        SetupError: Always.
    """
    raise SetupError(
        f"a shell in {name!r} needs a container engine: nobody can enter a sandbox of bubblewrap's from outside",
        help="RLM_SANDBOX_PROVIDER=docker rlm-sandbox devsh",
    )


def remove_all() -> list[str]:
    """Stop and remove every sandbox of this user that no engine knows, and return their names."""
    records = Records(RuntimeDir.open())
    found = records.all()
    for record in found:
        records.remove(record)
    return [record.name for record in found]


def _lookup(records: Records, name: str) -> Record | None:
    owned = (record for record in records.all() if record.name == name)
    return records.named(name) or next(owned, None)


def _sessions(records: Records, record: Record) -> str:
    transport = UnixSocketTransport(records.socket_path(record))
    try:
        sessions = transport.request("GET", "/v1/sessions", timeout_s=_ASK_TIMEOUT_S).header.get("sessions")
    except SandboxError:
        return "?"
    finally:
        transport.close()
    return str(len(sessions)) if isinstance(sessions, list) else "?"


def _say(text: str) -> None:
    print(f"[sandbox] {text}", flush=True)
