"""``python3 -m broker.supervisor '<config>'``: see ``config``.

``--attached <fd> '<config>'`` serves a broker that runs elsewhere, at the other end of that socket (tests).
"""

from __future__ import annotations

import os
import resource
import socket
import sys
from pathlib import Path

from broker.protocol.reading import BadRequest
from broker.supervisor import confinement, prctl
from broker.supervisor.config import SupervisorConfig
from broker.supervisor.nursery import Nursery


def main(arguments: list[str]) -> int:
    """Run the supervisor; return its exit status."""
    attached = None
    if arguments[:1] == ["--attached"] and len(arguments) == 3:
        attached = int(arguments[1])
        arguments = arguments[2:]
    if len(arguments) != 1:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    try:
        config = SupervisorConfig.from_json(arguments[0])
    except BadRequest as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if attached is not None:
        return _serve(config, socket.socket(fileno=attached), None)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    broker_pid = _start_broker(config, theirs, arguments[0])
    return _serve(config, ours, broker_pid)


def _serve(config: SupervisorConfig, link: socket.socket, broker_pid: int | None) -> int:
    if os.getpid() != 1:
        prctl.become_subreaper()
    nursery = Nursery(config)
    # Attached, in tests, there is no boundary to look at.
    nursery.start(broker_pid)
    # Loaded only now, while broker and zygote start beside us.
    from broker.supervisor.core import Supervisor

    return Supervisor(config, link, broker_pid, nursery).run()


def _start_broker(config: SupervisorConfig, link: socket.socket, raw_config: str) -> int:
    """Start the broker as a program of its own, under its own uid; return its pid."""
    pid = os.fork()
    if pid != 0:
        link.close()
        return pid
    try:
        os.set_inheritable(link.fileno(), True)
        ruleset = confinement.for_broker(config)
        if config.broker_uid is not None and config.broker_gid is not None:
            prctl.become_user(config.broker_uid, config.broker_gid)
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
        command = [sys.executable, "-s", "-S", "-m", "broker", raw_config, str(link.fileno())]
        os.execve(command[0], command, environment)  # noqa: S606
    except OSError as error:
        sys.stderr.write(f"the broker could not be started: {error}\n")
        sys.stderr.flush()
    finally:
        os._exit(71)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
