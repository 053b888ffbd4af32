"""Which files broker and sessions may touch, beyond what users and mounts allow (Landlock, where the kernel has it)."""

from __future__ import annotations

import os
import sys

from broker.supervisor import landlock

# Loaded before the broker is started, so it loads little itself.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from broker.supervisor.config import SupervisorConfig

#: Where a session can leave files; the rest of the sandbox is read-only.
WRITABLE_FOLDERS = ("/tmp", "/dev/shm")  # noqa: S108

#: Programs, libraries, settings. /proc and /sys are for looking only: no process changes its own oom_score_adj.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/proc", "/sys")


def for_workers(config: SupervisorConfig) -> landlock.Ruleset | None:
    """Return what binds the sessions, or None where it is not asked for or not to be had."""
    if not config.landlock or not landlock.abi():
        return None
    return landlock.Ruleset(
        [
            # Names can be listed everywhere (``os.listdir("/")``); what is in files cannot be read.
            ("/", landlock.READ_DIR),
            *((path, landlock.READ) for path in (*_python(), config.guest_site) if path),
            ("/dev", landlock.USE_DEVICES),
            *((folder, landlock.CHANGE) for folder in WRITABLE_FOLDERS),
        ]
    )


def for_broker(config: SupervisorConfig) -> landlock.Ruleset | None:
    """Return what binds the broker: it reads its program, and makes nothing but its two sockets."""
    if not config.landlock or not landlock.abi():
        return None
    sockets = (os.path.dirname(path) for path in (config.host_socket, config.guest_socket))
    return landlock.Ruleset(
        [
            *((path, landlock.READ) for path in (*_python(), config.broker_site) if path),
            ("/dev", landlock.USE_DEVICES),
            *((folder, landlock.MAKE_SOCKETS) for folder in sockets),
        ]
    )


def _python() -> set[str]:
    """Return where programs and our own modules are, also in an image that has its Python elsewhere."""
    return {*_SYSTEM, sys.prefix, sys.base_prefix, package_folder()} - {"/", ""}


def package_folder() -> str:
    """Return the folder that holds the package ``broker``."""
    folder = os.path.realpath(__file__)
    for _ in range(3):
        folder = os.path.dirname(folder)
    return folder
