"""Taking over a session whose host is gone: finding it, and settling the calls that were under way."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from broker.protocol.messages import Attached, StartedCall, Verdict
from host_client.broker_client import BrokerClient, SessionInfo
from host_client.call_recorder import unpack
from host_client.errors import CallGone, LeaseExpired, SandboxError, SessionLost, UnknownSession
from host_client.journal import REQUEUED, STARTED, UNKNOWN, CallKey, Holder, Journal
from host_client.providers.base import SandboxHandle

log = logging.getLogger(__name__)

Connect = Callable[[SandboxHandle], BrokerClient]

#: Of the sessions that there are, an error names so many.
_MAX_NAMES = 20


class Found(NamedTuple):
    """A session, and a client that speaks to its broker."""

    handle: SandboxHandle
    client: BrokerClient
    session: SessionInfo

    @property
    def address(self) -> str:
        """What finds it again: its sandbox, and its name or id."""
        return f"{self.handle.name}/{self.session.name or self.session.session_id}"


def find_session(address: str, handles: Iterable[SandboxHandle], connect: Connect) -> Found:
    """Find a session in running sandboxes.

    Args:
        address: A session's name or id, or a sandbox's name or id with one session in it; or both, as
            ``sandbox/session``.
        handles: Where to look.
        connect: Returns a client for a sandbox.

    Raises:
        UnknownSession: None, or several, are meant; names those that there are.
        SessionLost: The one that is meant has lost its namespace.
    """
    everything = sessions_in(handles_of(address, handles), connect)
    try:
        found = the_only(everything, address)
        if found.session.lost is not None:
            reason = found.session.lost
            raise SessionLost(f"the session {address!r} is lost ({reason}); its variables are gone", reason=reason)
    except BaseException:
        close_clients(everything)
        raise
    close_clients(everything, but=found)
    return found


def handles_of(address: str, handles: Iterable[SandboxHandle]) -> list[SandboxHandle]:
    """Return the sandboxes in which a session of this address may be."""
    sandbox, slash, _ = address.rpartition("/")
    return [handle for handle in handles if not slash or sandbox in (handle.name, handle.sandbox_id)]


def sessions_in(handles: Iterable[SandboxHandle], connect: Connect, *, memory: bool = False) -> list[Found]:
    """Return all sessions of some sandboxes, those of one with the same client; a broker that is gone has none.

    Args:
        handles: The sandboxes.
        connect: Returns a client for one.
        memory: Whether to have the memory read that each takes.
    """
    return [found for handle in handles for found in _ask(handle, connect, memory=memory)]


def the_only(everything: Sequence[Found], address: str) -> Found:
    """Return the session that is meant: the living one, or where none lives the one that was lost last.

    Raises:
        UnknownSession: None, or several, are meant; names those that there are.
    """
    wanted = address.rpartition("/")[2]
    found = [each for each in everything if wanted in (each.session.session_id, each.session.name)]
    if not found and "/" not in address:
        found = [each for each in everything if wanted in (each.handle.name, each.handle.sandbox_id)]
    living = [each for each in found if each.session.lost is None]
    if len(living) > 1:
        raise UnknownSession(f"{address!r} could mean {_names(living)}", help="say which one of these")
    if not found:
        there = [each for each in everything if each.session.lost is None]
        raise UnknownSession(
            f"there is no session {address!r}; " + (f"there are {_names(there)}" if there else "there are none"),
            help="a sandbox whose host is gone ends after a minute; rlm-sandbox sessions shows what is there",
        )
    return (living or found)[-1]


def close_clients(everything: Iterable[Found], *, but: Found | None = None) -> None:
    """Close the clients of what was found; one client speaks for all sessions of its sandbox."""
    for each in everything:
        if but is None or each.client is not but.client:
            each.client.close()


def settle(
    calls: Iterable[StartedCall], sandbox_id: str, client: BrokerClient, journal: Journal, *, complete: bool
) -> None:
    """Say of each call that the old client had started what became of it.

    Args:
        calls: Those calls.
        sandbox_id: Where they were made.
        client: The broker, which takes our word.
        journal: What is known.
        complete: Whether a call that the journal does not know of never started.

    Raises:
        SandboxError: Journal or broker do not answer.
    """
    for call in calls:
        with contextlib.suppress(CallGone, LeaseExpired):  # it ended meanwhile: its execution was over
            _settle(call, CallKey(sandbox_id, call.call_id, call.attempt), client, journal, complete=complete)


def take_over(found: Found, journal: Journal) -> tuple[Attached, Holder]:
    """Attach to a session and settle its calls.

    Raises:
        Fenced: Somebody else attached at the same moment.
        SandboxError: The session is lost, or journal or broker do not answer.
    """
    attached = found.client.attach(found.session.session_id, found.session.epoch)
    holder = Holder(
        sandbox_id=found.handle.sandbox_id,
        session_id=found.session.session_id,
        epoch=attached.epoch,
        sandbox=found.handle.name,
    )
    # From here on the old client can note no start any more; what it has noted, we see.
    complete = journal.hold(holder)
    settle(attached.started, found.handle.sandbox_id, found.client, journal, complete=complete)
    return attached, holder


def _settle(call: StartedCall, key: CallKey, client: BrokerClient, journal: Journal, *, complete: bool) -> None:
    record = journal.find(key)
    if record is not None and record.outcome is not None:
        result, blobs = unpack(record.outcome)
        client.answer(call.call_id, result, blobs)
        journal.delivered(key)
        log.info("call %s of %s: its recorded result was posted", call.call_id, call.tool)
        return
    never_ran = record is None and complete
    again = never_ran or (call.idempotent and (record is None or record.state == STARTED))
    verdict, state = (Verdict.QUEUED, REQUEUED) if again else (Verdict.UNKNOWN, UNKNOWN)
    client.resolve(call.call_id, call.attempt, verdict)
    if record is not None:
        journal.resolve(key, state)
    log.info("call %s of %s: %s", call.call_id, call.tool, state)


def _ask(handle: SandboxHandle, connect: Connect, *, memory: bool) -> list[Found]:
    client = connect(handle)
    try:
        sessions = client.sessions(memory=memory)
    except SandboxError as error:
        log.debug("%s was not searched: %s", handle.name, error)
        sessions = []
    if not sessions:
        client.close()
    return [Found(handle, client, session) for session in sessions]


def _names(found: Sequence[Found]) -> str:
    names = [each.address for each in found]
    return ", ".join(names[:_MAX_NAMES]) + (f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else "")
