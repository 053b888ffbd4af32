"""The self-test at start: a process just like a session tries what generated code must not be able to do.

It is forked from the zygote, as sessions are, while the broker is being loaded and before any generated code can run,
and reports over a pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
from typing import Any

from broker.protocol.self_test import Check, SelfTest
from broker.supervisor import landlock, prctl
from broker.supervisor.attempts import run_attempts
from broker.supervisor.config import SupervisorConfig
from broker.supervisor.control_group import read_limits
from broker.supervisor.proc_status import capability_names, read_status
from broker.supervisor.worker_child import become_session

#: It takes milliseconds; what does not answer for so long has failed.
_LIMIT_S = 5.0
_MAX_REPORT_BYTES = 1 << 16

_SUPERVISORS = ["KILL", "SETGID", "SETUID", "SETPCAP"]
_ZYGOTES = ["SETGID", "SETUID", "SETPCAP"]


def run_self_test(config: SupervisorConfig, broker_pid: int | None, ruleset: landlock.Ruleset | None) -> SelfTest:
    """Return what was found; to be called in the zygote.

    Args:
        config: The supervisor's.
        broker_pid: The broker's pid, or None where it is in another pid namespace.
        ruleset: What binds the sessions, or None.
    """
    nothing = config.one_user
    checks = [
        _capabilities("supervisor's capabilities", os.getppid(), [] if nothing else _SUPERVISORS),
        _capabilities("zygote's capabilities", os.getpid(), [] if nothing else _ZYGOTES),
        _landlock(config, ruleset),
        *_as_session(config, broker_pid, ruleset),
    ]
    return SelfTest(checks=tuple(checks), limits=read_limits())


def _as_session(config: SupervisorConfig, broker_pid: int | None, ruleset: landlock.Ruleset | None) -> list[Check]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            become_session(config, 0, ruleset, keep={writer})
            checks = run_attempts(config, broker_pid, confined=ruleset is not None)
            os.write(writer, json.dumps([check.to_json() for check in checks]).encode())
        except BaseException as error:
            os.write(writer, json.dumps([_failed(f"{type(error).__name__}: {error}"[:200])]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], _LIMIT_S)
        # One write of less than a pipe holds arrives whole.
        report = os.read(reader, _MAX_REPORT_BYTES) if ready else b""
    finally:
        os.close(reader)
        # The zygote may kill what is still its own user's, and, as the session, what is the session's.
        for uid in {os.geteuid(), config.guest_uid(0) if config.separate_users else os.geteuid()}:
            with contextlib.suppress(PermissionError), prctl.acting_as(uid):
                os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [Check.from_json(check) for check in json.loads(report or json.dumps([_failed("no report")]))]


def _failed(found: str) -> dict[str, Any]:
    return Check(name="self-test", wanted="done", found=found, held=False).to_json()


def _capabilities(name: str, pid: int, wanted: list[str]) -> Check:
    status = read_status(pid)
    held = sorted(capability_names(status["CapEff"]) + capability_names(status["CapBnd"]))
    found = ", ".join(capability_names(status["CapEff"])) or "none"
    return Check(name=name, wanted=", ".join(wanted) or "none", found=found, held=held == sorted(wanted * 2))


def _landlock(config: SupervisorConfig, ruleset: landlock.Ruleset | None) -> Check:
    version = landlock.abi()
    if not config.landlock:
        return Check(name="Landlock", wanted="on", found="not asked for", held=False)
    if ruleset is None:
        # Nothing to be done about a kernel; the rest of the boundary stands without it.
        return Check(name="Landlock", wanted="on, where there is one", found="not in this kernel", held=True)
    return Check(name="Landlock", wanted="on, where there is one", found=f"on, version {version}", held=True)
