"""The journal without a file: for ``journal=":memory:"``, where no record is to outlast the process."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from host_client import journal
from host_client.errors import CallGone, Fenced
from host_client.journal import REQUEUED, CallKey, CallRecord, Holder

#: Records between two prunings.
_PRUNE_EVERY = 1_000


class MemoryJournal:
    """A ``Journal`` in this process' memory, with the same answers and bounds as the one in a file.

    Args:
        clock: Wall-clock seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        # Guards all below.
        self._lock = threading.Lock()
        self._pid = os.getpid()
        #: Epoch, whether all of it is known here, and when it was taken, by sandbox and session.
        self._holders: dict[tuple[str, str], tuple[int, bool, float]] = {}
        self._calls: OrderedDict[CallKey, CallRecord] = OrderedDict()
        #: How many attempts of a call were made and not requeued: as long as there is one, it may not start again.
        self._begun: dict[tuple[str, str], int] = {}
        self._recorded = 0

    def hold(self, holder: Holder) -> bool:
        """See ``Journal.hold``."""
        who = (holder.sandbox_id, holder.session_id)
        with self._lock:
            self._forget_parent()
            epoch, complete, _ = self._holders.get(who, (0, holder.epoch == 1, 0.0))
            if epoch >= holder.epoch:
                raise _fenced(holder)
            complete = complete and epoch == holder.epoch - 1
            self._holders[who] = (holder.epoch, complete, self._clock())
            return complete

    def intend(self, holder: Holder, call: CallRecord) -> None:
        """See ``Journal.intend``."""
        with self._lock:
            self._forget_parent()
            held = self._holders.get((holder.sandbox_id, holder.session_id))
            if held is not None and held[0] != holder.epoch:
                raise _fenced(holder)
            if (call.sandbox_id, call.call_id) in self._begun:
                raise CallGone(f"the call {call.call_id} was started before", status=410)
            self._put(call)

    def conclude(self, call: CallRecord) -> None:
        """See ``Journal.conclude``."""
        if call.outcome is not None and len(call.outcome) > journal.MAX_OUTCOME_BYTES:
            call = dataclasses.replace(call, outcome=None)
        with self._lock:
            self._forget_parent()
            self._put(call)

    def delivered(self, call: CallKey) -> None:
        """See ``Journal.delivered``."""
        with self._lock:
            record = self._calls.get(call)
            if record is not None:
                record.delivered, record.outcome = True, None

    def resolve(self, call: CallKey, state: str) -> None:
        """See ``Journal.resolve``."""
        with self._lock:
            record = self._calls.get(call)
            if record is not None:
                self._count(record, -1)
                record.state = state
                self._count(record, 1)

    def find(self, call: CallKey) -> CallRecord | None:
        """See ``Journal.find``."""
        with self._lock:
            record = self._calls.get(call)
            return None if record is None else record.copy()

    def calls(self, limit: int) -> list[CallRecord]:
        """See ``Journal.calls``."""
        with self._lock:
            newest = sorted(self._calls.values(), key=lambda each: (each.started_at, each.call_id))[-limit:]
            return [dataclasses.replace(each, outcome=None) for each in newest]

    def prune(self) -> None:
        """Forget what is old, or more than is kept; happens by itself, once in a thousand records."""
        with self._lock:
            self._prune()

    def close(self) -> None:
        """See ``Journal.close``. Nothing is written, and nothing forgotten."""

    def _put(self, call: CallRecord) -> None:
        """Keep a copy: the caller goes on with its own, which may change without being recorded."""
        key = call.key
        before = self._calls.get(key)
        if before is not None:
            self._count(before, -1)
        self._calls[key] = kept = call.copy()
        self._count(kept, 1)
        self._recorded += 1
        if self._recorded % _PRUNE_EVERY == 0:
            self._prune()

    def _count(self, record: CallRecord, by: int) -> None:
        if record.state == REQUEUED:
            return
        which = (record.sandbox_id, record.call_id)
        count = self._begun.get(which, 0) + by
        if count:
            self._begun[which] = count
        else:
            del self._begun[which]

    def _prune(self) -> None:
        """As in the file: where a call's beginning is forgotten, its session counts as incomplete."""
        by_age = sorted(self._calls.values(), key=lambda each: each.started_at)
        old = self._clock() - journal.MAX_AGE_S
        for who in sorted(self._holders, key=lambda each: self._holders[each][2])[: -journal.MAX_SESSIONS]:
            del self._holders[who]
        if len(by_age) > journal.MAX_CALLS:
            old = max(old, by_age[-journal.MAX_CALLS - 1].started_at)
        held_bytes = 0
        for record in reversed(by_age):
            if record.started_at <= old:
                self._forget(record)
                continue
            held_bytes += len(record.outcome or b"")
            if held_bytes > journal.MAX_BYTES:
                record.outcome = None

    def _forget(self, record: CallRecord) -> None:
        self._count(record, -1)
        del self._calls[record.key]
        who = (record.sandbox_id, record.session_id)
        if who in self._holders:
            epoch, _, held_at = self._holders[who]
            self._holders[who] = (epoch, False, held_at)

    def _forget_parent(self) -> None:
        """In a forked child: what the parent did is not this process' doing."""
        if self._pid != os.getpid():
            self._pid, self._holders, self._recorded = os.getpid(), {}, 0
            self._calls, self._begun = OrderedDict(), {}


def _fenced(holder: Holder) -> Fenced:
    return Fenced(f"epoch {holder.epoch} of the session {holder.session_id} is over", status=409)
