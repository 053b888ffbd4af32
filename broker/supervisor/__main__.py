"""``python3 -m broker.supervisor '<config>'``: see ``config``.

Where broker and supervisor are started apart, ``<fd>`` leads from each to the other:

- ``--broker <fd> '<config>'`` becomes the broker, and ``--workers <fd> '<config>'`` the supervisor, each in namespaces
  of its own (see ``config``, ``one_user``);
- ``--attached <fd> '<config>'`` is a supervisor without any boundary (tests).
"""

from __future__ import annotations

import importlib
import os
import resource
import socket
import sys
from pathlib import Path
from typing import NoReturn

from broker.protocol.reading import BadRequest
from broker.protocol.self_test import SelfTest
from broker.supervisor import confinement, prctl
from broker.supervisor.config import SupervisorConfig

_PARTS = ("--attached", "--broker", "--workers")


def main(arguments: list[str]) -> int:
    """Run the supervisor; return its exit status."""
    part, link = None, -1
    if arguments[:1] and arguments[0] in _PARTS and len(arguments) == 3:
        part, link = arguments[0], int(arguments[1])
        arguments = arguments[2:]
    if len(arguments) != 1:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    try:
        config = SupervisorConfig.from_json(arguments[0])
    except BadRequest as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if part == "--broker":
        _become_broker(config, link, arguments[0])
    if config.separate_users and os.getpid() == 1:
        prctl.drop_bounding_set(keep=prctl.SUPERVISORS_CAPABILITIES)  # what starts us may not
    if part is not None:
        return _serve(config, socket.socket(fileno=link), None)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    broker_pid = _start_broker(config, theirs, arguments[0])
    return _serve(config, ours, broker_pid)


def _serve(config: SupervisorConfig, link: socket.socket, broker_pid: int | None) -> int:
    # Loaded only now, while the broker starts beside us.
    from broker.supervisor.core import Supervisor
    from broker.supervisor.self_test import run_self_test

    importlib.import_module("broker.worker.main")  # the workers inherit it
    if os.getpid() != 1:
        prctl.become_subreaper()
    if config.one_user:
        prctl.set_dumpable(False)  # the session has our user
    ruleset = confinement.for_workers(config)
    # Attached, in tests, there is no boundary to look at.
    bounded = broker_pid is not None or config.one_user
    self_test = run_self_test(config, broker_pid, ruleset) if bounded else SelfTest()
    return Supervisor(config, link, broker_pid, ruleset, self_test).run()


def _start_broker(config: SupervisorConfig, link: socket.socket, raw_config: str) -> int:
    """Start the broker as a program of its own, under its own uid; return its pid."""
    pid = os.fork()
    if pid == 0:
        _become_broker(config, link.fileno(), raw_config)
    link.close()
    return pid


def _become_broker(config: SupervisorConfig, link: int, raw_config: str) -> NoReturn:
    """Turn this process into the broker; never returns."""
    try:
        os.set_inheritable(link, True)
        ruleset = confinement.for_broker(config)
        if config.broker_uid is not None and config.broker_gid is not None:
            prctl.become_user(config.broker_uid, config.broker_gid)
        if config.separate_users or config.one_user:
            # It writes to sockets and to its log's pipe, never to a file: what is mounted from the host stays small.
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        if ruleset is not None:
            prctl.set_no_new_privileges()
            ruleset.restrict_self()
        os.umask(0o077)
        package_folder = str(Path(__file__).resolve().parents[2])
        environment = {
            "PATH": os.defpath,
            "LANG": "C.UTF-8",
            "PYTHONSAFEPATH": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (package_folder, config.broker_site))),
        }
        command = [sys.executable, "-s", "-S", "-m", "broker", raw_config, str(link)]
        os.execve(command[0], command, environment)  # noqa: S606
    except OSError as error:
        sys.stderr.write(f"the broker could not be started: {error}\n")
        sys.stderr.flush()
    finally:
        os._exit(71)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
