"""``python3 -m broker.supervisor '<config>'``: see ``config``.

``--attached <fd> '<config>'`` serves a broker that runs elsewhere, at the other end of that socket (tests).
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from broker.supervisor.broker_child import start_broker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from broker.supervisor.config import SupervisorConfig


def main(arguments: list[str]) -> int:
    """Run the supervisor; return its exit status."""
    attached = None
    if arguments[:1] == ["--attached"] and len(arguments) == 3:
        attached = int(arguments[1])
        arguments = arguments[2:]
    if len(arguments) != 1:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    [raw_config] = arguments
    if attached is not None:
        ours, broker_pid = socket.socket(fileno=attached), None
    else:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        broker_pid = start_broker(raw_config, theirs)
    # Loaded only now, while the broker starts beside us.
    from broker.protocol.reading import BadRequest
    from broker.supervisor.config import SupervisorConfig

    try:
        config = SupervisorConfig.from_json(raw_config)
    except BadRequest as error:
        if broker_pid is not None:
            os.kill(broker_pid, signal.SIGKILL)
        sys.stderr.write(f"{error}\n")
        return 2
    return _serve(config, ours, broker_pid)


def _serve(config: SupervisorConfig, link: socket.socket, broker_pid: int | None) -> int:
    from broker.supervisor import prctl
    from broker.supervisor.nursery import Nursery

    if os.getpid() != 1:
        prctl.become_subreaper()
    nursery = Nursery(config)
    # Attached, in tests, there is no boundary to look at.
    nursery.start(broker_pid)
    from broker.supervisor.core import Supervisor

    return Supervisor(config, link, broker_pid, nursery).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
