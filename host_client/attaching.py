"""Taking over a session whose host is gone: finding it, and settling the calls that were under way."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

from broker.protocol.messages import Attached, StartedCall, Verdict
from host_client.broker_client import BrokerClient, SessionInfo
from host_client.call_recorder import unpack
from host_client.errors import CallGone, LeaseExpired, SandboxError, SessionLost, UnknownSession
from host_client.journal import REQUEUED, STARTED, UNKNOWN, CallKey, Holder, Journal
from host_client.providers.base import SandboxHandle

log = logging.getLogger(__name__)

Connect = Callable[[SandboxHandle], BrokerClient]


class Found(NamedTuple):
    """A session, and a client that speaks to its broker."""

    handle: SandboxHandle
    client: BrokerClient
    session: SessionInfo


def find_session(address: str, handles: Iterable[SandboxHandle], connect: Connect) -> Found:
    """Find a session in running sandboxes.

    Args:
        address: A session's name or id, or a sandbox's name or id with one session in it; or both, as
            ``sandbox/session``.
        handles: Where to look.
        connect: Returns a client for a sandbox.

    Raises:
        UnknownSession: None, or several, are meant.
        SessionLost: The one that is meant has lost its namespace.
    """
    sandbox, slash, wanted = address.rpartition("/")
    found: list[Found] = []
    for handle in handles:
        if not slash or sandbox in (handle.name, handle.sandbox_id):
            found += _search(handle, connect, lambda session: wanted in (session.session_id, session.name))
    if not found and not slash:
        for handle in handles:
            if wanted in (handle.name, handle.sandbox_id):
                found += _search(handle, connect, lambda session: True)
    return _the_only(found, address)


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


def _search(handle: SandboxHandle, connect: Connect, matches: Callable[[SessionInfo], bool]) -> list[Found]:
    """Return the sessions of one sandbox that match, each with a client; a broker that is gone has none."""
    client = connect(handle)
    try:
        sessions = [session for session in client.sessions() if matches(session)]
    except SandboxError as error:
        log.debug("%s was not searched: %s", handle.name, error)
        sessions = []
    if not sessions:
        client.close()
    return [Found(handle, client, session) for session in sessions]


def _the_only(found: list[Found], address: str) -> Found:
    living = [each for each in found if each.session.lost is None]
    for each in found:
        # One client speaks for all sessions of its sandbox.
        if len(living) != 1 or each.client is not living[0].client:
            each.client.close()
    if len(living) == 1:
        return living[0]
    if found and not living:
        reason = found[-1].session.lost or "unknown"
        raise SessionLost(f"the session {address!r} is lost ({reason}); its variables are gone", reason=reason)
    if not found:
        raise UnknownSession(
            f"there is no session {address!r} to attach to",
            help="a sandbox whose host is gone ends after a minute; rlm-sandbox status shows what is running",
        )
    meant = ", ".join(f"{each.handle.name}/{each.session.name or each.session.session_id}" for each in living)
    raise UnknownSession(f"{address!r} could mean {meant}", help="attach to one of these")
