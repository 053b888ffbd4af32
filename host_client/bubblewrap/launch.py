"""From settings to a healthy sandbox without an engine, or to nothing at all."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import secrets
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from broker.protocol import PROTOCOL_VERSION
from broker.protocol.directory_watch import DirectoryWatch
from host_client import runtime_dir
from host_client.bubblewrap import cgroups
from host_client.bubblewrap.plan import Plan
from host_client.bubblewrap.records import Record, Records, labels
from host_client.errors import ProtocolMismatch, ProviderError
from host_client.owner import Owner
from host_client.providers.base import SandboxHandle
from host_client.providers.container_spec import ContainerSpec
from host_client.providers.exits import log_tail
from host_client.providers.isolation import Isolation
from host_client.providers.launch import NameTaken, probe, self_test
from host_client.providers.readiness import Died, TimedOut, wait_until_ready
from host_client.providers.self_test import require
from host_client.runtime_dir import RuntimeDir
from host_client.settings import SandboxSettings
from host_client.transport import UnixSocketTransport

_KEEPER = Path(__file__).with_name("keeper.py")
_MAX_ANNOUNCEMENT_BYTES = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class Launched:
    """A sandbox that has started.

    Attributes:
        handle: The sandbox.
        keeper: Its keeper, a child of this process.
    """

    handle: SandboxHandle
    keeper: subprocess.Popen[bytes]


def launch(
    runtime: RuntimeDir,
    settings: SandboxSettings,
    *,
    tree: Path,
    bwrap: str,
    name: str | None,
    isolation: Isolation,
    own: Callable[[SandboxHandle], None],
) -> Launched:
    """Start a sandbox and return once its broker answers.

    Args:
        runtime: Where its socket will be.
        settings: Limits.
        tree: Folder with its files.
        bwrap: The program.
        name: None for an owned sandbox.
        isolation: What stands between generated code and the machine.
        own: Told of an owned sandbox, so that none is ever without somebody to stop it.

    Raises:
        NameTaken: A sandbox of that name runs.
        SandboxTooWeak: It started, but does not hold what was asked for; nothing is left behind.
        ProviderError: It did not start; nothing is left behind.
    """
    records = Records(runtime)
    _make_way(records, name)
    owner = Owner.current()
    directory = runtime.create(owner)
    sandbox_id = directory.path.name
    record = Record(
        sandbox_id=sandbox_id,
        name=name or secrets.token_hex(4),
        owned=name is None,
        owner=owner.label(),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds"),
        tree=str(tree),
        max_sessions=settings.max_sessions,
    )
    keeper: subprocess.Popen[bytes] | None = None
    try:
        records.write(record)
        groups = cgroups.create(sandbox_id, settings) if isolation.enforced or os.geteuid() == 0 else cgroups.Groups()
        record = dataclasses.replace(record, groups=tuple(map(str, groups.folders)))
        records.write(record)
        spec = ContainerSpec(
            settings=settings,
            image=str(tree),
            name=record.name,
            owned=record.owned,
            owner=record.owner,
            directory=directory.path,
            guest_uid_base=directory.guest_uid_base,
            broker_uid=runtime_dir.broker_uid(),
            created=record.created,
            isolation=isolation,
        )
        plan = Plan(
            spec=spec,
            groups=groups,
            log=records.file(sandbox_id, "log"),
            exit=records.file(sandbox_id, "exit"),
            bwrap=bwrap,
        )
        with DirectoryWatch(directory.path) as watch:
            keeper = _start_keeper(plan, settings)
            record = _announced(keeper, record, records, settings.start_timeout_s)
            _wait_until_healthy(record, records, watch, settings.start_timeout_s)
            with contextlib.closing(UnixSocketTransport(directory.socket_path)) as transport:
                require(self_test(transport, settings, isolation), enforced=isolation.enforced)
        handle = records.handle(record)
        if handle.owned:
            own(handle)
        return Launched(handle, keeper)
    except BaseException:
        if keeper is not None and not record.processes:
            keeper.kill()  # what it has begun dies with it
        records.remove(record)
        if keeper is not None:
            keeper.wait()
        raise


def _make_way(records: Records, name: str | None) -> None:
    taken = None if name is None else records.named(name)
    if taken is None:
        return
    if taken.runs:
        raise NameTaken(f"a sandbox {name!r} is already running", help=f"to stop it: rlm-sandbox down {name}")
    records.remove(taken)  # it ended by itself: nobody uses it


def _start_keeper(plan: Plan, settings: SandboxSettings) -> subprocess.Popen[bytes]:
    prefix = [] if plan.groups.folders else cgroups.command_prefix(settings)
    command = [*prefix, sys.executable, "-I", "-S", str(_KEEPER)]
    # A session of its own: Ctrl-C in a terminal is for the host's program.
    keeper = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert keeper.stdin is not None
    with contextlib.suppress(BrokenPipeError), keeper.stdin:
        keeper.stdin.write(plan.to_json().encode())
    return keeper


def _announced(keeper: subprocess.Popen[bytes], record: Record, records: Records, timeout_s: float) -> Record:
    """Return the record with the processes that the keeper has made."""
    assert keeper.stdout is not None
    with keeper.stdout:
        ready, _, _ = select.select([keeper.stdout], [], [], timeout_s)
        line = os.read(keeper.stdout.fileno(), _MAX_ANNOUNCEMENT_BYTES) if ready else b""
    try:
        record = dataclasses.replace(record, keeper=Owner.of(keeper.pid).label(), processes=labels(json.loads(line)))
    except (ValueError, LookupError):
        raise ProviderError(
            f"the sandbox could not be built{log_tail(records.log_text(record.sandbox_id))}",
            help="rlm-sandbox doctor says what this machine lacks",
        ) from None
    records.write(record)
    return record


def _wait_until_healthy(record: Record, records: Records, watch: DirectoryWatch, timeout_s: float) -> None:
    sandbox_id = record.sandbox_id
    first = Owner.parse(record.processes[0])
    transport = UnixSocketTransport(records.socket_path(record))
    try:
        health = wait_until_ready(
            lambda left_s: probe(transport, left_s),
            watch=watch,
            pid=None if first is None else first.pid,
            is_running=lambda: record.runs,
            timeout_s=timeout_s,
        )
    except Died:
        reason = records.why_dead(sandbox_id)
        raise ProviderError(
            f"the sandbox ended while it started: {reason}{log_tail(records.log_text(sandbox_id))}"
        ) from None
    except TimedOut as late:
        raise ProviderError(
            f"the sandbox did not answer within {timeout_s:g} s ({late}){log_tail(records.log_text(sandbox_id))}",
            help="a slow machine? Give it more time: RLM_SANDBOX_START_TIMEOUT_S=120",
        ) from None
    if health.get("protocol") != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"the sandbox speaks protocol {health.get('protocol')!r}, this package {PROTOCOL_VERSION}",
            help="put its files together again: rlm-sandbox image",
        )
