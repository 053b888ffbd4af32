"""The few ``prctl`` calls that the sandbox's processes make. ctypes is loaded once, before any fork."""

from __future__ import annotations

import ctypes
import os

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38

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


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")
