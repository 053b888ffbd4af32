"""Going on with a session after the way to its broker broke and was opened anew: a relay that died, a network.

The broker is as it was, but what it sent last may be lost: a claim that nobody read counts as started there. So the
session is taken over, from ourselves, as another process would do it (``attaching``), but for the calls that this
process holds: those it answers itself. Where the socket is shared, a broken connection means that the broker is gone.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterator

from broker.protocol.messages import Attached
from host_client.broker_client import BrokerClient
from host_client.errors import BrokerUnreachable
from host_client.transport import BrokerTimeout, SocketTransport

log = logging.getLogger(__name__)

#: Of one request, or of one execution: a way that breaks more often leads nowhere.
MOST_TRIES = 5
MOST_MENDS = 100

#: Takes the session over, given the ids of the calls that are held here.
TakeOver = Callable[[Collection[str]], Attached]


class Mender:
    """Mends one session's way. Whoever learns of a claim, or says of one that it begins, does so in ``passing()``.

    Args:
        transport: Its ``breaks`` are watched.
        take_over: See ``TakeOver``.
    """

    def __init__(self, transport: SocketTransport, take_over: TakeOver) -> None:
        self._transport, self._take_over = transport, take_over
        self._seen = transport.breaks
        # Guards _passing and _mending together: while it is mended nobody passes, so what is held does not change.
        self._changed = threading.Condition()
        self._passing = 0
        self._mending = False

    @classmethod
    def of(cls, client: BrokerClient, take_over: TakeOver) -> Mender | None:
        """Return one for a client whose way can be mended, else None."""
        transport = getattr(client, "transport", None)
        return cls(transport, take_over) if isinstance(transport, SocketTransport) and transport.can_resume else None

    @property
    def is_due(self) -> bool:
        """Whether a connection broke since the last time."""
        return self._transport.breaks != self._seen

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Keep the way from being mended while the block runs; wait first where it is being mended."""
        with self._changed:
            while self._mending:
                self._changed.wait()
            self._passing += 1
        try:
            yield
        finally:
            with self._changed:
                self._passing -= 1
                self._changed.notify_all()

    def mend(self, held: Callable[[], Collection[str]]) -> Attached:
        """Take the session over.

        Args:
            held: Returns the ids of the calls that are held here; asked once nobody passes.

        Raises:
            SandboxError: The broker is gone, or another client holds the session.
        """
        with self._changed:
            self._mending = True
            while self._passing:
                self._changed.wait()
        try:
            self._seen = self._transport.breaks
            attached = self._take_over(held())
            log.info("the way to the sandbox broke and was opened anew; its session goes on")
            return attached
        finally:
            with self._changed:
                self._mending = False
                self._changed.notify_all()


def is_broken(error: BrokerUnreachable) -> bool:
    """Tell a way that broke from a broker that is slow."""
    return not isinstance(error, BrokerTimeout)
