"""Small requests of many threads that travel together: one write, one wake-up of the broker, one read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from broker.protocol.frames import FrameError
from broker.protocol.reading import BadRequest
from host_client.batches import Batches
from host_client.errors import SandboxError
from host_client.http_wire import BadReply

#: A message up to here is small.
SMALL_BYTES = 4 << 10
#: With messages of this size far below what a socket takes at once: it is sent before the first reply is read.
_MOST_TOGETHER = 16

Reply = TypeVar("Reply")


class _Ticket(Generic[Reply]):
    """A message on its way, and what came of it."""

    __slots__ = ("error", "message", "reply", "settled", "timeout_s")

    def __init__(self, message: bytes, timeout_s: float) -> None:
        self.message, self.timeout_s = message, timeout_s
        self.reply: Reply | None = None
        self.error: BaseException | None = None
        self.settled = False


class Together(Generic[Reply]):
    """Sends what gathers while an exchange is under way with the next one.

    Args:
        exchange: Sends messages within so many seconds and returns their replies in order, or None where that
            cannot be done; raises ``OSError`` or what a malformed reply raises.
    """

    def __init__(self, exchange: Callable[[Sequence[bytes], float], Sequence[Reply] | None]) -> None:
        self._exchange = exchange
        self._batches: Batches[_Ticket[Reply]] = Batches(self._send, _MOST_TOGETHER)

    def send(self, message: bytes, timeout_s: float) -> Reply | None:
        """Send a message and return its reply, or None where ``exchange`` could do nothing.

        Raises:
            OSError, BadReply: The exchange failed, with this message or with one that travelled with it.
        """
        ticket: _Ticket[Reply] = _Ticket(message, timeout_s)
        self._batches.join(ticket)
        if ticket.error is not None:
            raise _again(ticket.error)
        if not ticket.settled:  # whoever had it in hand may be interrupted at any instruction
            raise ConnectionError("the exchange was cut short")
        return ticket.reply

    def _send(self, batch: list[_Ticket[Reply]]) -> None:
        try:
            replies = self._exchange([each.message for each in batch], max(each.timeout_s for each in batch))
            for ticket, reply in zip(batch, replies or (), strict=replies is not None):
                ticket.reply = reply
            for ticket in batch:
                ticket.settled = True
        except BaseException as error:
            for ticket in batch:
                ticket.error = error
            if not isinstance(error, Exception):
                raise


def _again(error: BaseException) -> Exception:
    """Return an error of the same meaning: one exception must not be raised by several threads."""
    if isinstance(error, TimeoutError):
        return TimeoutError(str(error))
    if isinstance(error, (BadReply, FrameError, BadRequest)):
        return BadReply(str(error))
    if isinstance(error, SandboxError):
        return error
    return ConnectionError(getattr(error, "strerror", None) or str(error) or type(error).__name__)
