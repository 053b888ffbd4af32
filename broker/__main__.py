"""``python3 -m broker '<config>' <fd>``: the broker; started by the supervisor, to which ``fd`` leads."""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import socket
import sys

from broker.lean_imports import lean_imports

with lean_imports():
    import gevent

    from broker.daemon import Daemon
    from broker.logs import Log
    from broker.protocol.self_test import Check, SelfTest
    from broker.supervisor import prctl
    from broker.supervisor.config import SupervisorConfig
    from broker.supervisor.proc_status import has_no_capabilities, read_status
    from broker.supervisor_client import SupervisorClient


def main(arguments: list[str]) -> int:
    """Run the broker; return its exit status."""
    raw_config, supervisor_fd = arguments
    # Nobody but root looks into our memory, not even another process of the same user.
    prctl.set_dumpable(False)
    prctl.set_no_new_privileges()
    prctl.set_parent_death_signal(signal.SIGKILL)
    _raise_descriptor_limit()
    config = SupervisorConfig.from_json(raw_config)
    log = Log()
    supervisor = SupervisorClient(
        socket.socket(fileno=int(supervisor_fd)),
        guest_uid_base=config.guest_uid_base,
        max_slots=config.max_sessions,
        one_user=config.one_user,
        on_gone=lambda: os._exit(1),
    )
    allowed = frozenset({os.geteuid(), *config.allowed_host_uids})
    daemon = Daemon(
        config, supervisor, log=log, allowed_host_uids=allowed, self_test=lambda: with_own_check(supervisor, config)
    )
    gevent.signal_handler(signal.SIGTERM, daemon.stop)
    daemon.start()
    daemon.serve()
    return 0


def with_own_check(supervisor: SupervisorClient, config: SupervisorConfig) -> SelfTest:
    """Return the supervisor's self-test, and what the broker sees of itself."""
    report: SelfTest = supervisor.self_test.get()
    status = read_status("self")
    none, capabilities = has_no_capabilities(status)
    uid = os.getuid() if config.one_user else config.broker_uid
    faults = [
        *([] if set(os.getresuid()) == {uid} else [f"uid {os.geteuid()}"]),
        *([] if none else [f"capabilities {capabilities}"]),
        *([] if status.get("NoNewPrivs") == "1" else ["new privileges"]),
        *(["dumpable"] if prctl.is_dumpable() else []),
    ]
    check = Check(
        name="broker",
        wanted=f"uid {uid}, no capabilities, closed",
        found=", ".join(faults) or "as wanted",
        held=not faults,
    )
    return dataclasses.replace(report, checks=(*report.checks, check))


def _raise_descriptor_limit() -> None:
    """Each blocked wrapper of generated code holds a connection."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
