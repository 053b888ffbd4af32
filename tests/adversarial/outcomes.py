"""The words of THREATS.md, as checks: each raises ``Broken`` where it does not hold."""

from __future__ import annotations

import reprlib
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from host_client import SandboxInterpreter
from host_client.errors import SandboxError, SessionLost
from tests.adversarial.arena import Aftermath, Target
from tests.adversarial.attack import ANYTHING

#: What the kernel says where somebody may not, or where there is no such thing for him.
PERMISSION = frozenset({"EPERM", "EACCES", "EROFS", "ENOSYS", "EAFNOSUPPORT"})
#: DEAD comes this long after the deadline at the latest.
DEAD_AFTER_S = 2.0
#: What this machine may add: two cores run everything, and the container's end has to be noticed.
_SLACK_S = 3.0
#: A lost session's later calls raise without asking anybody.
_AT_ONCE_S = 0.25
SIBLING_S = 2.0
HOST_GROWTH_BYTES = 64 << 20


class Broken(AssertionError):
    """An outcome that was promised is not there."""


class Witnesses:
    """What must be untouched by every attack.

    Args:
        canary: The host's secret.
        canary_file: Where it stands.
        sibling: A session in a sandbox of its own.
    """

    def __init__(self, canary: str, canary_file: Path, sibling: SandboxInterpreter) -> None:
        self.canary, self.canary_file, self.sibling = canary, canary_file, sibling


def check(after: Aftermath, witnesses: Witnesses) -> None:
    """Check every word that the attack expects; of alternatives, one."""
    for alternatives in after.attack.words():
        broken = []
        for word in alternatives:
            try:
                check_word(word, after, witnesses)
                break
            except Broken as error:
                broken.append(f"{word}: {error}")
        else:
            raise Broken(
                f"{after.attack.name}: {'; '.join(broken)}\n"
                f"value: {reprlib.repr(after.value)}\nerror: {after.error!s:.1500}"
            )


def check_word(word: str, after: Aftermath, witnesses: Witnesses) -> None:
    """Check one word."""
    name, _, number = word.partition("=")
    if name == "COUNT":
        _count(after, int(number))
    elif name == "HOST":
        _host(after, witnesses)
    else:
        _CHECKS[name](after)


def _alive(after: Aftermath) -> None:
    """The mark is there, and later executions get their own results and nobody else's."""
    try:
        _require(after.target.run("mark") == after.target.mark, "the value set before is gone")
        for _ in range(3):
            nonce = secrets.token_hex(4)
            got = after.target.run(f"print({nonce!r}); {nonce!r}")
            shown = after.target.interpreter.last_result
            _require(got == nonce and shown is not None and shown.output == f"{nonce}\n", f"desynchronised: {got!r}")
        if after.attack.then is not None:
            _require(after.target.run(after.attack.then) is True, f"afterwards: {after.attack.then} is not True")
    except Broken:
        raise
    except Exception as error:
        raise Broken(f"not alive: {type(error).__name__}: {error}") from error


def _dead(after: Aftermath) -> None:
    error, limit_s = after.error, after.attack.deadline_s + DEAD_AFTER_S + _SLACK_S
    if not isinstance(error, SessionLost):
        raise Broken(f"no SessionLost but {error!r:.300}")
    _require(error.reason in after.attack.reasons, f"the reason is {error.reason}")
    _require(after.seconds <= limit_s, f"after {after.seconds:.1f} s of {limit_s:.1f} s")
    began = time.monotonic()
    try:
        after.target.interpreter.execute("1")
    except SessionLost:
        _require(time.monotonic() - began < _AT_ONCE_S, "a later call did not raise at once")
    else:
        raise Broken("a later call was answered")
    replacement = Target(after.target.arena)
    try:
        _require(replacement.run("6 * 7") == 42, "a new session does not work")
    finally:
        replacement.close()


def _host(after: Aftermath, witnesses: Witnesses) -> None:
    _require(not after.holds(witnesses.canary), "the host's canary came back")
    _require(witnesses.canary_file.read_text() == witnesses.canary, "the host's canary was changed")
    _require(after.growth_bytes < HOST_GROWTH_BYTES, f"the client grew by {after.growth_bytes / 2**20:.0f} MiB")
    began = time.monotonic()
    try:
        _require(witnesses.sibling.execute("6 * 7") == 42, "the sibling is wrong")
    except SandboxError as error:
        raise Broken(f"the sibling: {error}") from error
    took_s = time.monotonic() - began
    _require(took_s < SIBLING_S, f"the sibling took {took_s:.1f} s")


def _count(after: Aftermath, wanted: int) -> None:
    ran = sum(after.target.tools.runs.values())
    _require(ran == wanted, f"tools ran {ran} times")


def _deny(after: Aftermath) -> None:
    got = after.value if isinstance(after.value, list) else [after.value]
    _require(bool(got) and set(map(str, got)) <= PERMISSION, f"got {reprlib.repr(after.value)}")


def _value(after: Aftermath) -> None:
    assert after.attack.value is not ANYTHING
    _require(after.error is None and after.value == after.attack.value, f"got {reprlib.repr(after.value)}")


def _error(after: Aftermath) -> None:
    assert after.attack.error is not None
    named = f"{type(after.error).__name__}: {after.error}"
    _require(after.error is not None and after.attack.error in named, f"raised {named:.300}")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Broken(otherwise)


_CHECKS: dict[str, Callable[[Aftermath], None]] = {
    "ALIVE": _alive,
    "DEAD": _dead,
    "DENY": _deny,
    "VALUE": _value,
    "ERROR": _error,
}
