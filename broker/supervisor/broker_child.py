"""Starting the broker: a program of its own, under its own uid.

It is what a sandbox's start waits for, so it is started before anything that takes milliseconds to load: this module
and those that it imports load little. The configuration is read here without being checked; PID 1 and the broker each
check it afterwards, and root's uid does not pass here either.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import types

from broker.supervisor import confinement, prctl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn


def start_broker(raw_config: str, link: socket.socket) -> int:
    """Start the broker as a program of its own, under its own uid; return its pid.

    Args:
        raw_config: The supervisor's only argument; the broker gets the same.
        link: The broker's end of the socket pair, which is closed here.
    """
    pid = os.fork()
    if pid == 0:
        become_broker(raw_config, link.fileno())
    link.close()
    return pid


def become_broker(raw_config: str, link_fd: int) -> NoReturn:
    """Turn this process into the broker; never returns.

    Args:
        raw_config: As above.
        link_fd: Leads to the supervisor.
    """
    try:
        config = _needs(raw_config)
        _give_up(config)
        os.set_inheritable(link_fd, True)
        _execute(raw_config, link_fd, config.broker_site)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"the broker could not be started: {error}\n")
        sys.stderr.flush()
    finally:
        os._exit(71)


def _needs(raw_config: str) -> Any:
    """Return what of the configuration is used here, by the names that it has there."""
    config: Any = types.SimpleNamespace(
        broker_uid=None,
        broker_gid=None,
        host_socket="",
        guest_socket="",
        broker_site=None,
        landlock=False,
        one_user=False,
    )
    config.__dict__.update(json.loads(raw_config))
    for own in (config.broker_uid, config.broker_gid):
        # As root it would hold the supervisor's capabilities.
        if own is not None and (type(own) is not int or own < 1):
            raise ValueError("broker_uid and broker_gid must be those of a user that is not root")
    return config


def _give_up(config: Any) -> None:
    ruleset = confinement.for_broker(config)
    if config.broker_uid is not None and config.broker_gid is not None:
        prctl.become_user(config.broker_uid, config.broker_gid)
    if config.broker_uid is not None or config.one_user:
        # It writes to sockets and to its log's pipe, never to a file: what is mounted from the host stays small.
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if ruleset is not None:
        prctl.set_no_new_privileges()
        ruleset.restrict_self()
    os.umask(0o077)


def _execute(raw_config: str, link_fd: int, site: str | None) -> None:
    environment = {
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (confinement.package_folder(), site))),
    }
    command = [sys.executable, "-s", "-S", "-m", "broker", raw_config, str(link_fd)]
    os.execve(command[0], command, environment)  # noqa: S606
