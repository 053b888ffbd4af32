"""What a sandbox's container is made of: every limit and every mount, in one place."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import broker
from broker.protocol import PROTOCOL_VERSION
from host_client.providers.isolation import Isolation
from host_client.settings import SandboxSettings

LABEL = "rlm-sandbox"
LABEL_NAME = "rlm-sandbox.name"
LABEL_KIND = "rlm-sandbox.kind"
LABEL_OWNER = "rlm-sandbox.owner"
LABEL_HOST_UID = "rlm-sandbox.host-uid"
LABEL_DIRECTORY = "rlm-sandbox.directory"
LABEL_VERSION = "rlm-sandbox.version"
LABEL_PROTOCOL = "rlm-sandbox.protocol"
LABEL_CREATED = "rlm-sandbox.created"
LABEL_TRANSPORT = "rlm-sandbox.transport"

SOCKET, EXEC = "socket", "exec"
OWNED = "owned"
NAMED = "named"

#: The directory with ``host.sock``: the only mount from the host, or memory where that cannot be shared.
HOST_SOCKET_DIR = "/run/rlm-sandbox/host"
GUEST_SOCKET_DIR = "/run/rlm-sandbox/guest"
BROKER_SITE = "/opt/rlm-sandbox/broker-site"
GUEST_SITE = "/opt/rlm-sandbox/guest-site"

#: A sandbox whose host was killed ends itself: long enough for a client that reconnects, short enough to notice.
LINGER_S = 60.0

#: A thousand wrappers blocked at once, each with a connection, and room to spare.
GUEST_OPEN_FILES = 4096
#: The broker's end of these connections, for several sessions.
OPEN_FILES = 16_384
#: Kept from the sessions, so that the supervisor and the broker go on during a fork bomb.
RESERVED_PIDS = 32
#: Room for shared memory (multiprocessing, numpy); it counts as memory. Docker's own default.
SHM_BYTES = 64 << 20
#: One inode for each page of a full /tmp; empty files cost kernel memory too.
_BYTES_PER_INODE = 4096


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSpec:
    """One sandbox, before it exists.

    Attributes:
        settings: Limits.
        image: Tag of the image.
        name: The sandbox's name.
        owned: Whether it ends with the process that starts it.
        owner: Label of the process that starts it.
        directory: Its directory on the host.
        guest_uid_base: First uid of its sessions.
        broker_uid: Uid of its broker.
        created: When, as ISO 8601 text.
        isolation: What stands between generated code and the machine.
        transport: ``SOCKET`` or ``EXEC``.
    """

    settings: SandboxSettings
    image: str
    name: str
    owned: bool
    owner: str
    directory: Path
    guest_uid_base: int
    broker_uid: int
    created: str
    isolation: Isolation
    transport: str = SOCKET

    @property
    def container_name(self) -> str:
        """Unique on the engine, which several users may share."""
        return f"rlm-sandbox-{self.name}" if self.owned else f"rlm-sandbox-{self.name}-{os.geteuid()}"

    def keywords(self) -> dict[str, Any]:
        """Return the keywords for ``DockerEngine.create_container``."""
        return {**self._identity(), **self._limits(), **self.isolation.keywords(self.broker_uid)}

    def supervisor_config(self) -> dict[str, Any]:
        """Return what PID 1 is told; ``broker.supervisor`` documents the fields. No secrets: anyone can read it."""
        users = {
            "broker_uid": self.broker_uid,
            "broker_gid": self.broker_uid,
            "guest_uid_base": self.guest_uid_base,
        }
        return {
            "name": self.name,
            **(users if self.isolation.separate_users else {}),
            "max_sessions": self.settings.max_sessions,
            "host_socket": f"{HOST_SOCKET_DIR}/host.sock",
            "guest_socket": f"{GUEST_SOCKET_DIR}/guest.sock",
            "linger_s": LINGER_S if self.owned else None,
            "environment": dict(self.settings.environment),
            "nproc": max(8, self.settings.pids - RESERVED_PIDS),
            "nofile": GUEST_OPEN_FILES,
            "broker_site": BROKER_SITE,
            "guest_site": GUEST_SITE,
            "allowed_host_uids": [os.geteuid() if self.transport == SOCKET else self.broker_uid],
            "landlock": self.isolation.landlock,
            "preload": self.settings.preload,
        }

    def tmpfs(self) -> dict[str, str]:
        """Return the options of its file systems in memory, by where they are mounted."""
        own = {} if self.transport == SOCKET else {HOST_SOCKET_DIR: self._socket_options("0700")}
        return {"/tmp": self._tmp_options(), GUEST_SOCKET_DIR: self._socket_options("0711"), **own}  # noqa: S108

    def _identity(self) -> dict[str, Any]:
        return {
            "image": self.image,
            "command": [json.dumps(self.supervisor_config(), separators=(",", ":"))],
            "name": self.container_name,
            "hostname": "sandbox",
            "labels": {
                LABEL: "1",
                LABEL_NAME: self.name,
                LABEL_KIND: OWNED if self.owned else NAMED,
                LABEL_OWNER: self.owner,
                LABEL_HOST_UID: str(os.geteuid()),
                LABEL_DIRECTORY: str(self.directory),
                LABEL_VERSION: broker.__version__,
                LABEL_PROTOCOL: str(PROTOCOL_VERSION),
                LABEL_CREATED: self.created,
                LABEL_TRANSPORT: self.transport,
            },
        }

    def _limits(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "mem_limit": settings.memory,
            "memswap_limit": settings.memory,
            # The engine refuses more cores than there are, where more is no limit anyway.
            "nano_cpus": int(min(settings.cpus, os.cpu_count() or settings.cpus) * 1e9),
            "pids_limit": settings.pids,
            "shm_size": min(SHM_BYTES, settings.memory),
            "tmpfs": self.tmpfs(),
            "ulimits": [
                {"Name": "nofile", "Soft": OPEN_FILES, "Hard": OPEN_FILES},
                {"Name": "core", "Soft": 0, "Hard": 0},
            ],
            "restart_policy": {"Name": "no"},
            "mounts": self._mounts(),
            "log_config": {"Type": "json-file", "Config": {"max-size": "1m", "max-file": "1"}},
        }

    def _tmp_options(self) -> str:
        size = self.settings.tmpfs
        # exec stays allowed: generated code may unpack wheels with native code there.
        return f"rw,exec,nosuid,nodev,size={size},nr_inodes={max(1024, size // _BYTES_PER_INODE)},mode=1777"

    def _mounts(self) -> list[dict[str, Any]]:
        if self.transport == EXEC:
            return []
        # Mounts, not Binds: the engine must refuse a directory that it does not see instead of making one.
        return [{"Type": "bind", "Source": str(self.directory), "Target": HOST_SOCKET_DIR, "ReadOnly": False}]

    def _socket_options(self, mode: str) -> str:
        # The broker makes the sockets; sessions may reach the guest's (0711), but not list or change its directory.
        owner = f"uid={self.broker_uid},gid={self.broker_uid}"
        return f"rw,noexec,nosuid,nodev,size=64k,nr_inodes=16,mode={mode},{owner}"
