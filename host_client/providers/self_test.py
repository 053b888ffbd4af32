"""Whether a sandbox that has started is as strong as it was meant to be."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from broker.protocol.reading import BadRequest
from broker.protocol.self_test import Check, Limits, SelfTest
from host_client.errors import MalformedReply, PreloadFailed, SandboxTooWeak
from host_client.providers.isolation import Isolation
from host_client.settings import SandboxSettings

log = logging.getLogger(__name__)

#: Below the names of runtimes that have a kernel of their own: what Linux does not enforce there, gVisor does.
_OWN_KERNEL = ("runsc", "gvisor")
_LEFT_TO_GVISOR = frozenset(
    ("system call filter", "internet sockets", "AF_ALG", "io_uring", "user namespaces", "Landlock", "root file system")
)
#: What the network setting opens.
_NETWORK = frozenset(("network interfaces", "internet sockets"))

#: By limit, the flag of the engine's description that says whether it can be enforced at all.
_ENGINE_FLAGS = {
    "memory": "MemoryLimit",
    "swap": "SwapLimit",
    "processes and threads": "PidsLimit",
    "cpus": "CpuCfsQuota",
}


def judged(reply: Any, settings: SandboxSettings, isolation: Isolation) -> list[Check]:
    """Return what a sandbox's self-test comes to, with what only the host knows.

    Args:
        reply: The JSON object of ``GET /v1/self-test``.
        settings: What was asked for.
        isolation: What was asked for.

    Raises:
        MalformedReply: This is no self-test.
        PreloadFailed: A module that was to be preloaded cannot be imported.
    """
    try:
        report = SelfTest.from_json(reply)
    except BadRequest as error:
        raise MalformedReply(f"the sandbox's self-test: {error}") from error
    if report.preload_error is not None:
        raise PreloadFailed(
            report.preload_error,
            help="the setting preload names modules of the image; packages= adds to it (README, Settings)",
        )
    own_kernel = any(name in (isolation.runtime or "") for name in _OWN_KERNEL)
    checks = [_adapted(check, isolation, own_kernel=own_kernel) for check in report.checks]
    # A report without a single check is no proof of anything.
    ran = Check(name="self-test", wanted="done", found="done" if checks else "nothing was checked", held=bool(checks))
    return [ran, *checks, *_limits(report.limits, settings, own_kernel=own_kernel)]


def require(checks: Iterable[Check], *, enforced: bool) -> None:
    """Refuse a sandbox that is weaker than asked for, or log it where the user accepts that.

    Raises:
        SandboxTooWeak: At least one check does not hold.
    """
    checks = list(checks)
    failed = [check for check in checks if not check.held]
    if not failed:
        return
    if enforced:
        raise too_weak(failed, checks)
    for check in failed:
        log.warning("insecure: %s: wanted %s, found %s", check.name, check.wanted, check.found)


def too_weak(failed: Sequence[Check], checks: Sequence[Check]) -> SandboxTooWeak:
    """Return the error that names each failed check."""
    listed = "".join(f"\n    - {check.name}: wanted {check.wanted}, found {check.found}" for check in failed)
    return SandboxTooWeak(
        f"the sandbox is weaker than asked for; it was not used:{listed}",
        checks=checks,
        help="rlm-sandbox doctor says more; to use it all the same: RLM_SANDBOX_INSECURE=1",
    )


def engine_limits(info: Mapping[str, Any], swap_bytes: int | None = None) -> list[Check]:
    """Return which limits the engine would drop without a word.

    Args:
        info: The engine's description of itself.
        swap_bytes: Swap of this machine; read from /proc if not given.
    """
    without_swap = (_swap_of_machine() if swap_bytes is None else swap_bytes) == 0
    checks = []
    for name, flag in _ENGINE_FLAGS.items():
        enforced = info.get(flag) is not False
        harmless = name == "swap" and without_swap
        found = "enforced" if enforced else "ignored by the engine" + (", but there is no swap" if harmless else "")
        checks.append(Check(name=f"limit of {name}", wanted="enforced", found=found, held=enforced or harmless))
    return checks


def _adapted(check: Check, isolation: Isolation, *, own_kernel: bool) -> Check:
    wanted = check.wanted
    if own_kernel and check.name in _LEFT_TO_GVISOR:
        wanted = "left to gVisor's own kernel"
    elif isolation.network != "none" and check.name in _NETWORK:
        wanted = "open, because network=True"
    else:
        return check
    return Check(name=check.name, wanted=wanted, found=check.found, held=True)


def _limits(found: Limits, settings: SandboxSettings, *, own_kernel: bool) -> list[Check]:
    # The engine refuses more cores than there are.
    cpus = min(settings.cpus, os.cpu_count() or settings.cpus)
    without_swap = found.swap_bytes is None and _swap_of_machine() == 0
    rows: list[tuple[str, float, float | None, Callable[[float], str]]] = [
        ("memory", settings.memory, found.memory_bytes, _size),
        ("swap", 0, 0 if without_swap else found.swap_bytes, _size),
        ("processes and threads", settings.pids, found.pids, _number),
        ("cores", cpus, found.cpus, _number),
    ]
    checks = []
    for name, most, actual, shown in rows:
        # gVisor shows no control groups inside; the engine sets them around it.
        unseen = own_kernel and actual is None
        # The kernel rounds memory down to pages and cores to microseconds.
        held = unseen or (actual is not None and actual <= most * 1.001)
        text = "set by the engine, not visible inside" if unseen else "no limit" if actual is None else shown(actual)
        checks.append(Check(name=name, wanted=f"at most {shown(most)}", found=text, held=held))
    return checks


def _number(number: float) -> str:
    return f"{number:.10g}"


def _size(number: float) -> str:
    return f"{number / (1 << 20):g} MiB"


def _swap_of_machine() -> int:
    """Return this machine's swap in bytes; 1 where it cannot be told."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("SwapTotal"))
    except (OSError, StopIteration, ValueError):
        return 1
