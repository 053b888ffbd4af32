"""A seccomp profile in Docker's format as a program for the kernel, which is what ``bwrap --seccomp`` takes.

Compiled by libseccomp, through its C interface: systemd, apt and every container engine are linked against it, it knows
the numbers of system calls on every architecture, and it compares arguments in all 64 bits. See decision 015.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from host_client.errors import BadSetting, SetupError

_ACTIONS = {
    "SCMP_ACT_ALLOW": 0x7FFF0000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_TRAP": 0x00030000,
}
_COMPARISONS = {
    name: number
    for number, name in enumerate(
        ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"),
        start=1,
    )
}
_EPERM, _ENOSYS = 1, 38
_UNKNOWN_CALL = -1
_OPTIMIZE, _BINARY_TREE = 8, 2

#: ``struct sock_filter`` and what the four instructions of ``_newer_are_unknown`` consist of.
_INSTRUCTION = struct.Struct("=HBBI")
_LOAD, _JUMP_EQUAL, _JUMP_GREATER, _RETURN = 0x20, 0x15, 0x25, 0x06
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET = 0, 4
_AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
#: Numbers from here on are the x32 interface's, which are not newer calls.
_X32 = 0x40000000


class _Argument(ctypes.Structure):
    _fields_ = (
        ("index", ctypes.c_uint),
        ("comparison", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def compiled(profile: Mapping[str, Any], capabilities: Sequence[str] = ()) -> bytes:
    """Return the program.

    Args:
        profile: In Docker's format.
        capabilities: What PID 1 holds, such as ``SETUID``: profiles have rules that depend on it.

    Raises:
        BadSetting: The profile has an action or a comparison that there is not.
        SetupError: libseccomp is not installed.
    """
    library = _library()
    machine = platform.machine()
    filters = ctypes.c_void_p(library.seccomp_init(_action(profile, "defaultAction", "defaultErrnoRet")))
    if not filters:
        raise SetupError("libseccomp cannot make a filter")
    numbers = []
    try:
        library.seccomp_attr_set(filters, _OPTIMIZE, _BINARY_TREE)  # older versions do not know it
        for rule in profile.get("syscalls", ()):
            if _applies(rule, machine, capabilities):
                numbers += list(_add(library, filters, profile, rule))
        program = _exported(library, filters)
    finally:
        library.seccomp_release(filters)
    if profile.get("defaultAction") != "SCMP_ACT_ERRNO" or machine not in _AUDIT_ARCHITECTURES or not numbers:
        return program
    return _newer_are_unknown(machine, max(numbers)) + program


def _library() -> ctypes.CDLL:
    name = ctypes.util.find_library("seccomp") or "libseccomp.so.2"
    try:
        library = ctypes.CDLL(name, use_errno=True)
    except OSError:
        raise SetupError(
            "the filter of system calls is compiled with libseccomp, which is not installed",
            help="on Debian and Ubuntu: sudo apt-get install -y libseccomp2",
        ) from None
    library.seccomp_init.restype = ctypes.c_void_p
    return library


def _applies(rule: Mapping[str, Any], machine: str, capabilities: Sequence[str]) -> bool:
    held = {f"CAP_{name}" for name in capabilities}
    docker_name = {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    if includes.get("caps") and not set(includes["caps"]) <= held:
        return False
    if includes.get("arches") and docker_name not in includes["arches"]:
        return False
    if excludes.get("caps") and set(excludes["caps"]) & held:
        return False
    return docker_name not in (excludes.get("arches") or ())


def _add(library: ctypes.CDLL, filters: Any, profile: Mapping[str, Any], rule: Mapping[str, Any]) -> Iterator[int]:
    action = _action(rule, "action", "errnoRet")
    arguments = [_argument(each) for each in rule.get("args") or ()]
    packed = (_Argument * len(arguments))(*arguments)
    default = _action(profile, "defaultAction", "defaultErrnoRet")
    for name in rule.get("names") or [rule["name"]]:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == _UNKNOWN_CALL:  # newer than the library, or not on this architecture: the default applies
            continue
        if number >= 0:
            yield number
        if action == default:
            continue  # what the default says anyway; libseccomp refuses such rules
        result = library.seccomp_rule_add_array(
            filters, ctypes.c_uint32(action), ctypes.c_int(number), ctypes.c_uint(len(arguments)), packed
        )
        if result not in (0, -17):  # EEXIST: said twice
            raise BadSetting(f"the seccomp profile's rule for {name}: {os.strerror(-result)}")


def _action(rule: Mapping[str, Any], key: str, errno_key: str) -> int:
    name = rule.get(key)
    if name not in _ACTIONS:
        raise BadSetting(f"the seccomp profile has the action {name!r:.80}; known are {', '.join(_ACTIONS)}")
    number = int(rule.get(errno_key) or _EPERM) if name == "SCMP_ACT_ERRNO" else 0
    return _ACTIONS[name] | number


def _argument(argument: Mapping[str, Any]) -> _Argument:
    name = str(argument.get("op", "")).removeprefix("SCMP_CMP_")
    if name not in _COMPARISONS:
        raise BadSetting(f"the seccomp profile has the comparison {argument.get('op')!r:.80}")
    return _Argument(argument["index"], _COMPARISONS[name], argument.get("value", 0), argument.get("valueTwo", 0))


def _exported(library: ctypes.CDLL, filters: Any) -> bytes:
    with tempfile.TemporaryFile() as file:
        result = library.seccomp_export_bpf(filters, file.fileno())
        if result != 0:
            raise SetupError(f"libseccomp cannot compile the profile: {os.strerror(-result)}")
        file.seek(0)
        return file.read()


def _newer_are_unknown(machine: str, newest: int) -> bytes:
    """Return what answers calls newer than all that the profile names as an older kernel would, like runc does."""
    jump = _INSTRUCTION.pack
    return b"".join(
        (
            jump(_LOAD, 0, 0, _ARCHITECTURE_OFFSET),
            jump(_JUMP_EQUAL, 0, 4, _AUDIT_ARCHITECTURES[machine]),
            jump(_LOAD, 0, 0, _NUMBER_OFFSET),
            jump(_JUMP_GREATER, 2, 0, _X32 - 1),
            jump(_JUMP_GREATER, 0, 1, newest),
            jump(_RETURN, 0, 0, _ACTIONS["SCMP_ACT_ERRNO"] | _ENOSYS),
        )
    )
