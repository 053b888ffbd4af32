"""The sessions that there are, whoever holds them: list and close.

What gives an interpreter is there: ``SandboxInterpreter.create`` opens a named session that stays,
``SandboxInterpreter.attach`` goes on with one. ``docs/sessions.md`` shows all four together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from host_client.attaching import Found, close_clients, handles_of, sessions_in, the_only
from host_client.broker_client import SessionInfo
from host_client.connected_sandbox import connect
from host_client.errors import BadSetting, Fenced, SessionBusy
from host_client.program import is_gone
from host_client.providers.base import SandboxHandle, SandboxProvider
from host_client.sandbox_session import default_provider
from host_client.settings import SandboxSettings

#: With ``force``, how often somebody may attach between our look and our word.
_MOST_TRIES = 5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SessionStatus:
    """A session, as it was when it was asked for.

    Attributes:
        name: Its name, or None.
        session_id: The broker's id; ``attach`` takes it too.
        sandbox: Name of its sandbox.
        state: ``idle``, ``running`` (an execution) or ``lost`` (its variables are gone).
        lost: Why it is lost, or None; see ``SessionLost``.
        age_s: Seconds since it was opened.
        idle_s: Seconds since something was last done with it; 0 while an execution runs.
        ttl_s: Idle time in seconds after which it ends, or None.
        ends_in_s: Seconds until then, if nothing is done; None where it has no end.
        holder: The program that opened it, or attached to it last, and has not let go, such as ``analysis.py``; None
            for nobody.
        holder_pid: Its process id, or None.
        holder_gone: Whether that process has certainly ended, so that nobody holds the session any more.
        kept: Whether it stays when the program ends that holds it.
        executions: How many it has begun; putting and getting files takes some, too.
        memory_bytes: What its worker takes besides files, or None where that cannot be told. What it shares with other
            sessions of its sandbox counts for each.
    """

    name: str | None
    session_id: str
    sandbox: str
    state: str
    lost: str | None
    age_s: float
    idle_s: float
    ttl_s: float | None
    ends_in_s: float | None
    holder: str | None
    holder_pid: int | None
    holder_gone: bool
    kept: bool
    executions: int
    memory_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """Return it as ``rlm-sandbox sessions --json`` prints it."""
        return dataclasses.asdict(self)


def list_sessions(
    sandbox: str | None = None, *, settings: SandboxSettings | None = None, provider: SandboxProvider | None = None
) -> list[SessionStatus]:
    """Return the sessions in this user's running sandboxes, whoever opened them.

    Lost ones are there too, with their reason, until somebody closes them.

    Args:
        sandbox: Name or id of one sandbox, or None for all.
        settings: Where sandboxes come from; by default what ``RLM_SANDBOX_*`` says.
        provider: The same, made already.

    Raises:
        UnknownSandbox: No sandbox of that name runs.
        ForeignSession: It is another user's.
        SandboxError: The engine does not answer.
    """
    asked = _provider(settings, provider)
    found = sessions_in(_handles(asked, sandbox), lambda handle: connect(asked, handle), memory=True)
    close_clients(found)
    return sorted((_status(each.handle, each.session) for each in found), key=_order)


def close_session(
    name_or_id: str,
    *,
    sandbox: str | None = None,
    force: bool = False,
    settings: SandboxSettings | None = None,
    provider: SandboxProvider | None = None,
) -> SessionStatus:
    """End a session for good: its processes and files are gone at the return, and its name is free.

    Whoever holds it is told at the next execution: ``SessionLost``, reason ``removed``.

    Args:
        name_or_id: As for ``SandboxInterpreter.attach``.
        sandbox: Name or id of its sandbox, where the name alone could mean several.
        force: End it while an execution runs in it, too.
        settings: As for ``list_sessions``.
        provider: The same, made already.

    Returns:
        What it was before.

    Raises:
        UnknownSession: It is not there, or several are meant; names those that there are.
        SessionBusy: An execution is running in it; says whose.
        Fenced: Somebody attached at the same moment.
        SandboxError: Engine or broker do not answer.
    """
    if not isinstance(name_or_id, str) or not name_or_id:
        raise BadSetting(f"a session is closed by its name or id, got {name_or_id!r:.80}")
    asked = _provider(settings, provider)
    address = name_or_id if sandbox is None else f"{sandbox}/{name_or_id}"
    for tries_left in reversed(range(_MOST_TRIES if force else 1)):
        with _found(asked, address) as found:
            try:
                _close(found, force=force)
            except Fenced:
                if not tries_left:
                    raise
            else:
                return _status(found.handle, found.session)
    raise AssertionError("unreachable")


@contextmanager
def _found(provider: SandboxProvider, address: str) -> Iterator[Found]:
    handles = handles_of(address, provider.reachable(address))
    everything = sessions_in(handles, lambda handle: connect(provider, handle))
    try:
        yield the_only(everything, address)
    finally:
        close_clients(everything)


def _close(found: Found, *, force: bool) -> None:
    session = found.session
    try:
        found.client.close_session(session.session_id, epoch=session.epoch, if_idle=not force)
    except SessionBusy as error:
        raise SessionBusy(
            f"an execution is running in the session {found.address!r}, which {_holder_text(session)} holds",
            status=error.status,
            help="to end it all the same: force=True, or rlm-sandbox sessions close --force",
        ) from error


def _holder_text(session: SessionInfo) -> str:
    held_by = session.held_by
    if held_by is None:
        return "nobody"
    return f"{held_by}, which has ended," if is_gone(held_by) else str(held_by)


def _handles(provider: SandboxProvider, sandbox: str | None) -> list[SandboxHandle]:
    handles = provider.reachable(sandbox or "")
    if sandbox is None:
        return handles
    # The provider knows best what helps where there is none.
    return [each for each in handles if sandbox in (each.name, each.sandbox_id)] or [provider.find(sandbox)]


def _provider(settings: SandboxSettings | None, provider: SandboxProvider | None) -> SandboxProvider:
    return provider or default_provider(settings or SandboxSettings.from_environment())


def _order(status: SessionStatus) -> tuple[str, str, float]:
    return status.sandbox, status.name or "", -status.age_s


def _status(handle: SandboxHandle, session: SessionInfo) -> SessionStatus:
    held_by = session.held_by
    ends = session.ttl_s is not None and session.lost is None and session.running is None
    return SessionStatus(
        name=session.name,
        session_id=session.session_id,
        sandbox=handle.name,
        state="lost" if session.lost is not None else "idle" if session.running is None else "running",
        lost=session.lost,
        age_s=session.age_s,
        idle_s=session.idle_s,
        ttl_s=session.ttl_s,
        ends_in_s=max(0.0, (session.ttl_s or 0.0) - session.idle_s) if ends else None,
        holder=None if held_by is None else held_by.program,
        holder_pid=None if held_by is None else held_by.pid,
        holder_gone=held_by is not None and is_gone(held_by),
        kept=session.keep,
        executions=session.executions,
        memory_bytes=session.memory_bytes,
    )
