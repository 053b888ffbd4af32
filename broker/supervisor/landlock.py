"""Landlock: a process takes away its own access to files, beyond what users and mounts allow. Where the kernel has it.

The rules are made once, by PID 1; a worker or the broker then needs one system call to be bound by them for good,
with everything that it starts. The numbers are the kernel's (``linux/landlock.h``) and the same on all architectures.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG = 1
_RULE_PATH_BENEATH = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << bit for bit in range(6))
_MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO, _MAKE_BLOCK, MAKE_SYM = (1 << bit for bit in range(6, 13))
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15

READ = EXECUTE | READ_FILE | READ_DIR
USE_DEVICES = READ_FILE | READ_DIR | WRITE_FILE | TRUNCATE | IOCTL_DEV
#: Everything but devices of one's own.
CHANGE = READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SOCK | MAKE_FIFO | MAKE_SYM
CHANGE |= REFER | TRUNCATE | IOCTL_DEV
MAKE_SOCKETS = READ_DIR | MAKE_SOCK | REMOVE_FILE
#: What a rule for a file, rather than for a folder, may name.
_FOR_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV

#: By the ABI that brought them: every right up to it must be named, or it stays free.
_ALL_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
#: Abstract sockets made, and processes started, outside stay out of reach; from this ABI on.
_SCOPES, _SCOPES_ABI = 0b11, 6
#: Denials are not logged, from this ABI on: generated code could fill the host's audit log with them.
_QUIET, _QUIET_ABI = 0b101, 7

Rule = tuple[str, int]

_libc = ctypes.CDLL(None, use_errno=True)


class Ruleset:
    """Rules that a process can bind itself by.

    Args:
        rules: Folders and files, and the rights below each; paths that do not exist are left out.

    Raises:
        OSError: The kernel has no Landlock (``abi`` is 0), or refuses the rules.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._abi = abi()
        handled = _ALL_RIGHTS[max((known for known in _ALL_RIGHTS if known <= self._abi), default=1)]
        attributes = struct.pack("=QQQ", handled, 0, _SCOPES if self._abi >= _SCOPES_ABI else 0)
        self._fd = _syscall(_CREATE_RULESET, attributes, self._attribute_bytes(), 0)
        for path, rights in rules:
            self._allow(path, rights & handled)

    def fileno(self) -> int:
        """Return the descriptor, which must stay open until ``restrict_self``."""
        return self._fd

    def restrict_self(self) -> None:
        """Bind this process, and what it starts from now on, for good. Needs no-new-privileges."""
        _syscall(_RESTRICT_SELF, self._fd, _QUIET if self._abi >= _QUIET_ABI else 0)
        self.close()

    def close(self) -> None:
        """Forget the rules; who is bound by them stays so."""
        os.close(self._fd)

    def _allow(self, path: str, rights: int) -> None:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return
        try:
            if not os.path.isdir(f"/proc/self/fd/{fd}"):
                rights &= _FOR_FILES
            _syscall(_ADD_RULE, self._fd, _RULE_PATH_BENEATH, struct.pack("=Qi", rights, fd), 0)
        finally:
            os.close(fd)

    def _attribute_bytes(self) -> int:
        # An older kernel knows a shorter structure, and refuses what it does not know.
        return 24 if self._abi >= _SCOPES_ABI else 16 if self._abi >= 4 else 8


def abi() -> int:
    """Return the version of Landlock in this kernel, 0 where there is none or it may not be used."""
    try:
        return _syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)
    except OSError:
        return 0


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    typed = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *typed)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"landlock: {os.strerror(code)}")
    return result
