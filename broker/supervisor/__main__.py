"""``python3 -m broker.supervisor '<config>'``: see ``config``.

Where broker and supervisor are started apart, ``<fd>`` leads from each to the other:

- ``--broker <fd> '<config>'`` becomes the broker, and ``--workers <fd> '<config>'`` the supervisor, each in namespaces
  of its own (see ``config``, ``one_user``);
- ``--attached <fd> '<config>'`` is a supervisor without any boundary (tests).
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from broker.supervisor.broker_child import become_broker, start_broker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from broker.supervisor.config import SupervisorConfig

_PARTS = ("--attached", "--broker", "--workers")


def main(arguments: list[str]) -> int:
    """Run the supervisor; return its exit status."""
    part, link_fd = None, -1
    if arguments[:1] and arguments[0] in _PARTS and len(arguments) == 3:
        part, link_fd = arguments[0], int(arguments[1])
        arguments = arguments[2:]
    if len(arguments) != 1:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    [raw_config] = arguments
    if part == "--broker":
        become_broker(raw_config, link_fd)
    if part is not None:
        ours, broker_pid = socket.socket(fileno=link_fd), None
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

    if config.separate_users and os.getpid() == 1:
        prctl.drop_bounding_set(prctl.SUPERVISORS_CAPABILITIES)  # what starts us may not
    if os.getpid() != 1:
        prctl.become_subreaper()
    if config.one_user:
        prctl.set_dumpable(False)  # the session has our user, and the zygote's, which inherits this
    nursery = Nursery(config)
    # Attached, in tests, there is no boundary to look at.
    nursery.start(broker_pid, self_test=broker_pid is not None or config.one_user)
    from broker.supervisor.core import Supervisor

    return Supervisor(config, link, broker_pid, nursery).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
