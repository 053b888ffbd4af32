"""The few ``prctl`` calls that the sandbox's processes make. ctypes is loaded once, before any fork."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Collection

_PR_SET_PDEATHSIG = 1
_PR_GET_DUMPABLE = 3
_PR_SET_DUMPABLE = 4
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4

#: KILL, SETGID, SETUID and SETPCAP: all that the supervisor ever needs.
SUPERVISORS_CAPABILITIES = (5, 6, 7, 8)

#: ``_LINUX_CAPABILITY_VERSION_3``, for this process.
_CAPABILITY_HEADER = struct.pack("=Ii", 0x20080522, 0)
_MOST_CAPABILITIES = 64

_libc = ctypes.CDLL(None, use_errno=True)


def set_dumpable(dumpable: bool) -> None:
    """Open or close ``/proc/self`` to processes of the same user (and ptrace, where that is allowed at all)."""
    _prctl(_PR_SET_DUMPABLE, int(dumpable))


def set_parent_death_signal(number: int) -> None:
    """Send this process a signal when its parent dies. Changing the uid clears it: call it afterwards."""
    _prctl(_PR_SET_PDEATHSIG, number)


def become_subreaper() -> None:
    """Become the parent of this process's orphaned descendants, as PID 1 is anyway."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def set_no_new_privileges() -> None:
    """Let no later ``exec`` gain privileges."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def is_dumpable() -> bool:
    """Tell whether processes of the same user may look into this one."""
    return bool(_libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0))


def become_user(uid: int, gid: int) -> None:
    """Turn root, with CAP_SETUID, CAP_SETGID and CAP_SETPCAP, into a user without any capability, for good."""
    drop_bounding_set()
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    if _libc.capset(_CAPABILITY_HEADER, bytes(24)) != 0:  # some engines make them inheritable
        error = ctypes.get_errno()
        raise OSError(error, f"capset: {os.strerror(error)}")


def drop_bounding_set(keep: Collection[int] = ()) -> None:
    """Take from this process and what it starts the right to ever gain capabilities, but those to keep.

    Raises:
        OSError: CAP_SETPCAP is missing.
    """
    for capability in range(_MOST_CAPABILITIES):
        if capability not in keep and _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) != 0:
            error = ctypes.get_errno()
            if error == errno.EINVAL:  # the kernel's last one was before this
                return
            raise OSError(error, f"capability {capability} stays in the bounding set: {os.strerror(error)}")


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")
