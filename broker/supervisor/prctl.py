"""The few ``prctl`` calls that the sandbox's processes make. ctypes is loaded once, before any fork."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Set

_PR_SET_PDEATHSIG = 1
_PR_GET_DUMPABLE = 3
_PR_SET_DUMPABLE = 4
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4

#: ``_LINUX_CAPABILITY_VERSION_3``, for this process.
_CAPABILITY_HEADER = struct.pack("=Ii", 0x20080522, 0)
_MOST_CAPABILITIES = 64

CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SETPCAP = 5, 6, 7, 8
#: All that the supervisor ever needs.
SUPERVISORS_CAPABILITIES = frozenset({CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SETPCAP})

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
    clear_capabilities()  # some engines make them inheritable


def clear_capabilities() -> None:
    """Give up every capability but those that the kernel lets nobody without CAP_SETPCAP take from the bounding set."""
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _set_capabilities(0)


@contextlib.contextmanager
def acting_as(uid: int, *, group: int | None = None) -> Iterator[None]:
    """Have another effective user for a while. The real and the saved one stay, so that user can do nothing to us.

    Args:
        uid: The user.
        group: The effective group, where that matters too; with our own user it stays as it is.
    """
    own, own_group = os.geteuid(), os.getegid()
    if group is not None and uid != own:
        os.setegid(group)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(own)
        if os.getegid() != own_group:
            os.setegid(own_group)


def keep_capabilities(kept: Set[int]) -> None:
    """Give up every capability but these, for good. Needs CAP_SETPCAP.

    Args:
        kept: Numbers below 32, of capabilities that this process holds.
    """
    drop_bounding_set(kept)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _set_capabilities(sum(1 << capability for capability in kept))


def _set_capabilities(mask: int) -> None:
    """Make the effective and the permitted set these, and the inheritable one empty."""
    # effective, permitted, inheritable; then those above 31
    if _libc.capset(_CAPABILITY_HEADER, struct.pack("=6I", mask, mask, 0, 0, 0, 0)) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"capset: {os.strerror(error)}")


def drop_bounding_set(kept: Set[int] = frozenset()) -> None:
    """Take from this process and what it starts the right to ever gain capabilities, but those to keep.

    Raises:
        OSError: CAP_SETPCAP is missing.
    """
    for capability in sorted(set(range(_MOST_CAPABILITIES)) - kept):
        if _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) != 0:
            error = ctypes.get_errno()
            if error == errno.EINVAL:  # the kernel's last one was before this
                return
            raise OSError(error, f"capability {capability} stays in the bounding set: {os.strerror(error)}")


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")
