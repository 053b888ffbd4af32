"""``python3 -m broker.relay <socket>``: carries the host's connections to ``host.sock``, over stdin and stdout.

Where the socket cannot be shared with the host, the engine starts this in the sandbox, under the broker's uid (see
``docs/decisions/019-exec-transport.md``). It is as much out of reach of generated code as the broker is, holds no
secret, and ends with its input: the host, or the engine's connection, is gone then, and the broker sees its own
connections end.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import sys

from broker.protocol.directory_watch import DirectoryWatch
from broker.protocol.tunnel import HELLO, Pipes, Tunnel, TunnelBroken
from broker.supervisor import landlock, prctl
from broker.supervisor.proc_status import capability_names, read_status

#: Only a safety net, for file systems that tell no events.
_LOOK_AGAIN_MS = 250


def main(arguments: list[str]) -> int:
    """Relay until the input ends; return the exit status."""
    if len(arguments) != 1:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    path = arguments[0]
    try:
        _give_up()
        if not _wait_for(path):
            return 0
        _confine()
    except OSError as error:
        sys.stderr.write(f"the relay could not be started: {error}\n")
        return 71
    os.write(1, HELLO)
    try:
        Tunnel(Pipes(0, 1), lambda: _connect(path)).run()
    except (OSError, TunnelBroken) as error:
        sys.stderr.write(f"the relay ends: {error}\n")
        return 1
    return 0


def _give_up() -> None:
    """Be no more than the broker is, and no easier to look into.

    Raises:
        OSError: The engine started this with more rights than the broker has.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    prctl.set_dumpable(False)
    prctl.set_no_new_privileges()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    prctl.clear_capabilities()
    held = capability_names(read_status("self").get("CapEff", "0"))
    if os.geteuid() == 0 or held:
        raise OSError(f"it must not be root, nor hold capabilities {held}")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _confine() -> None:
    """Touch no file from here on; connecting to a socket is not touching one."""
    if landlock.abi():
        landlock.Ruleset([]).restrict_self()


def _wait_for(path: str) -> bool:
    """Wait until the broker listens; False where the input ends before."""
    with DirectoryWatch(os.path.dirname(path)) as watch:
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        poll.register(0, 0)  # hang-up is told all the same
        while not os.path.exists(path):
            if any(fd == 0 for fd, _ in poll.poll(_LOOK_AGAIN_MS)):
                return False
            watch.drain()
    return True


def _connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Waits only while thousands of connections wait to be accepted.
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
