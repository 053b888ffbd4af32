"""Copies of workers: who they are, and when and why they end. The kernel tells it, not they.

A copy's first bytes on its channel carry its pid and uid (SCM_CREDENTIALS), which no process here can forge. PID 1
looks at these alone: what was said stays for the broker to read.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from typing import NamedTuple

from broker.supervisor import prctl

#: The last field of /proc/<pid>/stat, counted from the state; for those who may look into the process, so its user.
_EXIT_CODE = 49
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
#: Room for the credentials, and none for descriptors that somebody might attach: the kernel closes those.
_ANCILLARY_BYTES = socket.CMSG_SPACE(_CREDENTIALS.size)


class Newborn(NamedTuple):
    """Who sent the first bytes."""

    pid: int
    uid: int


class Birth:
    """A copy that is expected.

    Args:
        message_id: Of the broker's message.
        slot: The slot that it belongs to.
        channel: The broker's end of the copy's channel; ours is closed by ``close``.
    """

    def __init__(self, message_id: int, slot: int, channel: socket.socket) -> None:
        self.message_id, self.slot = message_id, slot
        self._channel = channel

    def fileno(self) -> int:
        """Return what becomes readable when it has come, or never will."""
        return self._channel.fileno()

    def look(self) -> Newborn | None:
        """Return who it is, or None where the channel has ended before anybody spoke."""
        with contextlib.suppress(OSError):
            flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            data, ancillary, _, _ = self._channel.recvmsg(1, _ANCILLARY_BYTES, flags)
            for level, kind, payload in ancillary:
                if data and (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                    return Newborn(*_CREDENTIALS.unpack(payload[: _CREDENTIALS.size])[:2])
        return None

    def close(self) -> None:
        """Let go of the channel, which is the broker's."""
        self._channel.close()


class Copy:
    """A process that a worker forked. It is that one's child, or ours once that one has ended.

    Args:
        pid: Its pid; it has just spoken, so it is no other's.
        slot: Where it belongs.
        uid: Whose it is, and in whose name it is signalled: the kernel lets that hit nobody else.

    Raises:
        OSError: It has ended, or the kernel cannot watch it (before Linux 5.3).
    """

    def __init__(self, pid: int, slot: int, uid: int) -> None:
        self.pid, self.slot, self._uid = pid, slot, uid
        self._fd = os.pidfd_open(pid)

    def fileno(self) -> int:
        """Return what becomes readable when it has ended."""
        return self._fd

    def signal(self, number: int) -> None:
        """Send it a signal; one that has ended gets none."""
        with contextlib.suppress(ProcessLookupError, PermissionError), prctl.acting_as(self._uid):
            signal.pidfd_send_signal(self._fd, number)

    def status(self) -> int | None:
        """Return its status after its end, as ``waitpid`` has it, or None where its parent was faster than we."""
        with contextlib.suppress(ChildProcessError):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            return status if pid else None
        with contextlib.suppress(OSError, ValueError, IndexError), prctl.acting_as(self._uid, group=self._uid):
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            return int(fields[_EXIT_CODE]) if fields[0] in (b"Z", b"X") else None
        return None

    def close(self) -> None:
        """Watch it no longer."""
        os.close(self._fd)
