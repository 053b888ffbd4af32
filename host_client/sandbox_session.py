"""An open session in a sandbox, with everything that has to be closed together with it."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

from broker.protocol.messages import Attached, ClaimRequest
from host_client import endings
from host_client.attaching import Found, find_session, settle, take_over
from host_client.broker_client import BrokerClient
from host_client.call_recorder import CallRecorder
from host_client.connected_sandbox import ConnectedSandbox, connect, is_slow
from host_client.errors import (
    BadSetting,
    BrokerError,
    Fenced,
    MalformedReply,
    SandboxError,
    SessionLost,
)
from host_client.journal import MEMORY, Holder, Journal, SqliteJournal, default_path
from host_client.masking import Masker
from host_client.memory_journal import MemoryJournal
from host_client.mending import Mender
from host_client.providers.base import SandboxHandle, SandboxProvider
from host_client.settings import SandboxSettings
from host_client.sharing import Share
from host_client.snapshots import Snapshot
from host_client.tool_threads import ToolThreads
from host_client.transport import BrokerTimeout
from host_client.value_keeper import KeptState, ValueKeeper

log = logging.getLogger(__name__)

#: How long a broker may take to say who holds a session that is to be ended; one that is stuck is ended all the same.
_FENCED_WAIT_S = 1.0
#: How long the end of a sandbox may take to be known to its engine.
_DEATH_NEWS_S = 1.0


#: Reentrant, and safe to share.
_NOTHING = nullcontext()


class Loan(Protocol):
    """A place in a pool that a session was taken from, and who took it."""

    def take_back(self) -> bool:
        """Keep the session for its next user; False where it must be ended."""

    def over(self) -> None:
        """Note that the session has ended, and its sandbox is gone or somebody else's."""

    def marked(self) -> AbstractContextManager[None]:
        """Mark what runs in the block as run by the holder of this place."""


class SandboxSession:
    """A session and its connections, threads and kept values.

    Attributes:
        handle: The sandbox.
        client: Speaks to its broker.
        session_id: The session in it.
        threads: Where this session's tools run.
        keeper: What the worker holds.
        known_fields: The output fields that the broker has, or None before any were sent.
        tools_sent: Whether the broker has the current tools.
        recorder: Where its tool calls are recorded.
        masker: Takes its secrets out of what it gives.
        unfinished: The execution that another client posted last, until its reply was fetched; or None.
        loan: The place in a pool that it was taken from, or None.
        keep: Whether closing leaves it as it is in its sandbox, for whoever attaches.
        mender: Mends the way to the broker, where that can break without it; or None.
    """

    def __init__(
        self,
        provider: SandboxProvider,
        handle: SandboxHandle,
        client: BrokerClient,
        holder: Holder,
        journal: Journal,
        masker: Masker,
        attached: Attached | None = None,
        *,
        keep: bool = False,
    ) -> None:
        self.keep = keep
        self.handle, self.client, self.session_id = handle, client, holder.session_id
        self.threads, self.keeper = ToolThreads(), ValueKeeper(holder.epoch)
        self.masker = masker
        self.recorder = CallRecorder(journal, holder, masker)
        self._journal = journal
        self.mender = Mender.of(client, self._take_over_from_ourselves)
        self.unfinished = None if attached is None else attached.execution_id
        self._epoch = holder.epoch
        self.known_fields: Any = None
        self.tools_sent = False
        self.loan: Loan | None = None
        self._provider = provider
        self._pid = os.getpid()
        self._endings = endings.of_this_process() if handle.owned and is_slow(provider) else None
        if self._endings is not None:
            self._endings.prepare()
        self._ending: endings.Ending | None = None
        # Guards _closing: whoever sets it closes; it is cleared again if closing was cut short.
        self._lock = threading.Lock()
        self._closing = False
        self._share = Share(self.session_id, holder.epoch)
        self._is_last: bool | None = None  # of those who share the sandbox; known once it closes
        self._journal, self._holder = journal, holder
        # While somebody refers to them.
        self._snapshots: weakref.WeakValueDictionary[str, Snapshot] = weakref.WeakValueDictionary()

    @classmethod
    def open(
        cls,
        provider: SandboxProvider,
        settings: SandboxSettings,
        name: str | None,
        *,
        journal: Journal,
        session_name: str | None = None,
        secrets: Mapping[str, str] | None = None,
        keep: bool = False,
    ) -> SandboxSession:
        """Start a sandbox of our own, or find the named one, and open a session in it.

        Args:
            provider: Where sandboxes come from.
            settings: How a new one is made.
            name: Of a running sandbox, or None.
            journal: Records the session's tool calls.
            session_name: To attach to the session by, or None.
            secrets: Values by name, for its code to read.
            keep: Whether it is to outlive this program; see ``keep`` of ``SandboxInterpreter``.

        Raises:
            SandboxError: What the provider and the broker client raise; nothing is left behind.
        """
        sandbox = ConnectedSandbox.start(provider, settings, name)
        # A sandbox of our own ends with us anyway.
        ttl_s = None if name is None else settings.session_ttl_s
        return cls.open_in(sandbox, journal=journal, session_name=session_name, secrets=secrets, keep=keep, ttl_s=ttl_s)

    @classmethod
    def open_in(
        cls,
        sandbox: ConnectedSandbox,
        *,
        journal: Journal,
        session_name: str | None = None,
        secrets: Mapping[str, str] | None = None,
        keep: bool = False,
        ttl_s: float | None = None,
    ) -> SandboxSession:
        """Open a session in a sandbox; see ``open``. Where that fails, the sandbox is ended if it is ours."""
        with sandbox.ended_on_failure():
            session_id = sandbox.client.open_session(session_name, secrets, keep=keep, ttl_s=ttl_s)
            handle = sandbox.handle
            holder = Holder(sandbox_id=handle.sandbox_id, session_id=session_id, epoch=1, sandbox=handle.name)
            journal.hold(holder)
            return cls(sandbox.provider, handle, sandbox.client, holder, journal, Masker(secrets or {}), keep=keep)

    @classmethod
    def attach(
        cls,
        provider: SandboxProvider,
        address: str,
        *,
        journal: Journal,
        secrets: Mapping[str, str] | None = None,
    ) -> SandboxSession:
        """Take over a session that another client opened, which is fenced from now on.

        Args:
            provider: Where sandboxes come from.
            address: See ``find_session``.
            journal: Knows how the older client's tool calls ended, if that client used the same one.
            secrets: Those that the session was opened with, to mask them; they are not sent again.

        Raises:
            BadSetting: The session has a secret that is not among these; it is left as it is.
            UnknownSession, ForeignSession: It is not there, or not ours.
            Fenced: Somebody else attached at the same moment.
            SandboxError: What provider, broker client and journal raise.
        """
        handles = provider.reachable(address)
        found = find_session(address, handles, lambda handle: connect(provider, handle))
        try:
            found.client.check()
            _check_secrets(found, secrets or {})
            attached, holder = take_over(found, journal)
        except BaseException:
            found.client.close()
            raise
        # It ends with this process from now on, where it ended with the older client's before.
        provider.adopt(found.handle)
        masker, keep = Masker(secrets or {}), found.session.keep
        return cls(provider, found.handle, found.client, holder, journal, masker, attached, keep=keep)

    def fork(self, count: int) -> list[SandboxSession]:
        """Return sessions that begin with this one's namespace; the sandbox ends with the last of all of them.

        Raises:
            SandboxError: There are none.
        """
        forked = [self._forked(session_id) for session_id in self.client.fork(self.session_id, count)]
        try:
            for session in forked:
                self._journal.hold(session._holder)
        except BaseException:
            for session in forked:
                session.close()
            raise
        return forked

    def snapshot(self, name: str | None) -> Snapshot:
        """Remember the namespace as it is.

        Raises:
            SandboxError: It was not.
        """
        info = self.client.snapshot(self.session_id, name)
        info = info._replace(not_kept=tuple(map(self.masker.text, info.not_kept)))
        snapshot = Snapshot(self.client, self.session_id, info, self.keeper.state())
        self._snapshots[info.snapshot_id] = snapshot
        return snapshot

    def snapshots(self) -> list[Snapshot]:
        """Return those that there are, also an older client's; of what these hold of its values, nothing is known."""
        unknown = KeptState({}, ())
        known = self.client.snapshots(self.session_id)
        return [self._snapshots.get(i.snapshot_id) or Snapshot(self.client, self.session_id, i, unknown) for i in known]

    def roll_back(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot.

        Raises:
            UnknownSnapshot: It is not this session's (any more).
            SandboxError: The namespace is as it was, or lost.
        """
        snapshot.check(self.session_id)
        self.client.roll_back(self.session_id, snapshot.snapshot_id)
        self.keeper.go_back(snapshot.kept)
        self.tools_sent, self.known_fields = False, None

    def _forked(self, session_id: str) -> SandboxSession:
        handle = self.handle
        holder = Holder(sandbox_id=handle.sandbox_id, session_id=session_id, epoch=1, sandbox=handle.name)
        client = connect(self._provider, handle)
        session = SandboxSession(self._provider, handle, client, holder, self._journal, self.masker)
        session.keeper = self.keeper.copy()
        session._share = self._share
        self._share.join(session_id)
        return session

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closing

    def close(self, *, wait: bool = False) -> None:
        """End the session, and its sandbox if it is ours; or let go of one that is kept. Idempotent.

        Safe from any thread and at exit.

        A sandbox that takes long to end does so in the background; the exit of the process waits for it. In a process
        that was forked off, only this process' own connections and threads end.

        Args:
            wait: Return when it is gone.
        """
        if self._begin_closing():
            try:
                self._close()
            except BaseException:
                self._closing = False
                raise
        if wait and self._ending is not None:
            self._ending.wait(endings.EXIT_WAIT_S)

    def end_now(self) -> None:
        """As ``close``, on this thread, and gone at the return."""
        if self._begin_closing():
            self._end_and_let_go()

    def release(self, loan: Loan | None, *, keep: bool = True, wait: bool = False) -> None:
        """Give the session back to the pool that it is from, or close it. Idempotent.

        Args:
            loan: What ``loan`` was when the caller got the session; nothing happens where it has another user by now.
            keep: Whether the pool may hand it out again; not with an execution under way.
            wait: Return when a sandbox that is not kept is gone.
        """
        if loan is not self.loan or (loan is not None and keep and loan.take_back()):
            return
        self.close(wait=wait)

    def abandon(self, loan: Loan | None) -> None:
        """As ``release``, from the garbage collector: it may have interrupted a thread that holds any lock."""
        if loan is None or self._pid != os.getpid():
            self.close()
        else:
            endings.of_this_process().submit(partial(self.release, loan))

    def is_well(self, timeout_s: float) -> bool:
        """Ask the broker whether the session is there, and ours, and not lost."""
        try:
            # Of the questions that only such a session is answered, the one that costs least.
            self.client.claim(self.session_id, ClaimRequest(limit=0), late_s=timeout_s)
        except SandboxError as error:
            log.debug("asking for %s: %s", self.session_id, error)
            return False
        return True

    def executing(self) -> AbstractContextManager[None]:
        """Mark what runs in the block, tools included, as an execution of this session."""
        return _NOTHING if self.loan is None else self.loan.marked()

    def lost(self, error: SandboxError) -> SessionLost:
        """Return why the session is gone, after an error that it does not survive, and close it."""
        if self._closing:
            return SessionLost("the interpreter was shut down during an execution", reason="shutdown")
        if isinstance(error, Fenced):
            self.leave()
            return SessionLost("another client attached to this session, and goes on with it", reason="fenced")
        reason = self._reason(error)
        self.close()
        return SessionLost(f"the sandbox's session was lost ({reason}); its variables are gone: {error}", reason=reason)

    def _take_over_from_ourselves(self, held: Collection[str]) -> Attached:
        """Go on in a new epoch, after answers of the broker were lost; see ``mending``."""
        attached = self.client.attach(self.session_id, self._epoch)
        handle = self.handle
        holder = Holder(
            sandbox_id=handle.sandbox_id, session_id=self.session_id, epoch=attached.epoch, sandbox=handle.name
        )
        complete = self._journal.hold(holder)
        self.recorder.goes_on_as(holder)
        self._epoch = attached.epoch
        self._share.goes_on(self.session_id, attached.epoch)
        unread = [call for call in attached.started if call.call_id not in held]
        settle(unread, handle.sandbox_id, self.client, self._journal, complete=complete)
        return attached

    def leave(self) -> None:
        """Let go of the session without ending it: it is another client's now."""
        if not self._begin_closing():
            return
        if self._pid == os.getpid() and self._is_last:
            self._provider.disown(self.handle)
        self._let_go()

    def _begin_closing(self) -> bool:
        with self._lock:
            first, self._closing = not self._closing, True
            if self._is_last is None:
                self._is_last = self._share.leave()
            return first

    def _close(self) -> None:
        if self._pid != os.getpid():
            self._let_go()
        elif self._endings is None:
            self._end()
            self._let_go()
        else:
            self._ending = self._endings.submit(self._end_and_let_go)

    def _end_and_let_go(self) -> None:
        try:
            self._end()
        finally:  # nobody can try again
            self._let_go()

    def _let_go(self) -> None:
        try:
            self.client.close()
            self.threads.close()
            if self._is_last:  # else others record in the same journal
                self.recorder.close()
        finally:
            if self.loan is not None and self._pid == os.getpid():
                self.loan.over()

    def _reason(self, error: SandboxError) -> str:
        if isinstance(error, SessionLost):
            return error.reason
        if isinstance(error, MalformedReply):
            return "protocol"
        return self._why_dead(wait=not isinstance(error, BrokerTimeout)) or "unresponsive"

    def _why_dead(self, *, wait: bool) -> str | None:
        """Ask the provider; a broker that hung up is dead, but its engine may learn of it a moment later."""
        give_up_at = time.monotonic() + (_DEATH_NEWS_S if wait else 0.0)
        while (reason := self._provider.why_dead(self.handle)) is None and time.monotonic() < give_up_at:
            time.sleep(_DEATH_NEWS_S / 20)
        return reason

    def _end(self) -> None:
        if self.handle.owned and self._is_last:
            if not self._is_wanted():
                self._provider.stop(self.handle)
                return
            self._provider.disown(self.handle)
        try:
            if self.keep:
                self.client.detach(self.session_id)
            else:
                self.client.close_session(self.session_id)
        except SandboxError as error:
            log.debug("closing the session %s: %s", self.session_id, error)  # then it is gone already

    def _is_wanted(self) -> bool:
        """Ask whether another client has attached to a session in it: then the sandbox is that one's affair."""
        try:
            sessions = self.client.sessions(timeout_s=_FENCED_WAIT_S)
        except SandboxError as error:
            log.debug("asking who holds %s: %s", self.session_id, error)
            return False
        return self._share.wanted_by_others(sessions)


def survives(error: SandboxError) -> bool:
    """Tell whether the session is still there, and ours, after an error of its broker client."""
    return isinstance(error, BrokerError) and not isinstance(error, Fenced)


def open_journal(settings: SandboxSettings) -> Journal:
    """Open the journal that the settings name.

    Raises:
        JournalNewer, JournalUnusable: It cannot be used; nothing was started.
    """
    if settings.journal == MEMORY:
        return MemoryJournal()
    return SqliteJournal(default_path() if settings.journal is None else settings.journal)


def default_provider(settings: SandboxSettings) -> SandboxProvider:
    """Return the provider that the settings name; its package is imported only now."""
    from host_client.providers.choice import provider_for

    return provider_for(settings)


def _check_secrets(found: Found, secrets: Mapping[str, str]) -> None:
    """Refuse to go on with a session whose secrets we could not mask."""
    unknown = sorted(set(found.session.secrets).difference(secrets))
    if unknown:
        raise BadSetting(
            f"the session was opened with the secret {', '.join(map(repr, unknown))[:500]}, which this process was "
            "not given and could not mask",
            help="attach with the same secrets=",
        )
