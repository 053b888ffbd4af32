"""The supervisor's configuration: one JSON object, its only argument.

Written by the host's provider. What the container must bring along:

- ``--cap-drop ALL`` and ``--cap-add`` for SETUID, SETGID, KILL and SETPCAP; user 0, ``no-new-privileges``, read-only
  root.
- ``/run/rlm-sandbox/host``: a bind mount of a directory that is owned by ``broker_uid``, mode 0700; or, where that
  cannot be shared, a tmpfs like the next one with mode 0700, to which ``broker.relay`` leads.
- ``/run/rlm-sandbox/guest``: a tmpfs with the options
  ``rw,nosuid,nodev,noexec,size=64k,mode=0711,uid=<broker_uid>,gid=<broker_gid>``.
  The supervisor holds neither CAP_CHOWN nor CAP_DAC_OVERRIDE, so the mount itself must give it to the broker. In this
  directory the guests may reach ``guest.sock`` by its name, and list or create nothing.
- ``/tmp``: a tmpfs with mode 1777.

Uids from ``guest_uid_base`` on, twice ``max_sessions`` of them, must be nobody else's: the first half belongs to the
sessions, one each; under the second half the supervisor kills what is left of a session, which cannot kill it then.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from broker.protocol.reading import BadRequest, Reader

DEFAULT_HOST_SOCKET = "/run/rlm-sandbox/host/host.sock"
DEFAULT_GUEST_SOCKET = "/run/rlm-sandbox/guest/guest.sock"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorConfig:
    """See the module.

    Attributes:
        broker_uid: Uid of the broker, or None to run everything as the caller (tests only: then there is no boundary).
        broker_gid: Its gid, or None likewise.
        guest_uid_base: Uid (and gid) of the session in slot 0, or None likewise.
        max_sessions: Sessions at once.
        host_socket: Path of the host plane's socket.
        guest_socket: Path of the guest plane's socket.
        linger_s: End when no host has been connected for so many seconds; None: never.
        name: Shown in health, such as ``default``.
        environment: Environment variables of generated code, beside the few that every process needs.
        nproc: RLIMIT_NPROC of each session's uid.
        nofile: RLIMIT_NOFILE of each of its processes.
        broker_site: Folder with the broker's packages, or None.
        guest_site: Folder with generated code's packages, or None.
        allowed_host_uids: Who may speak on the host's socket, beside the broker's own uid.
        preload: Modules that generated code finds imported already.
        landlock: Whether broker and sessions restrict themselves, where the kernel can (see ``confinement``).
        one_user: Whether namespaces take the place of users: the broker is in some, and the supervisor with the one
            session in others, so that nothing of the one can be seen from the other but ``guest_socket``.
    """

    broker_uid: int | None = None
    broker_gid: int | None = None
    guest_uid_base: int | None = None
    max_sessions: int = 16
    host_socket: str = DEFAULT_HOST_SOCKET
    guest_socket: str = DEFAULT_GUEST_SOCKET
    linger_s: float | None = None
    name: str | None = None
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    nproc: int = 1024
    nofile: int = 4096
    broker_site: str | None = None
    guest_site: str | None = None
    allowed_host_uids: tuple[int, ...] = (0,)
    landlock: bool = False
    one_user: bool = False
    preload: tuple[str, ...] = ()

    @property
    def separate_users(self) -> bool:
        """Whether broker and sessions run under uids of their own."""
        return self.guest_uid_base is not None

    def guest_uid(self, slot: int) -> int:
        """Return the uid of a slot's session."""
        assert self.guest_uid_base is not None
        return self.guest_uid_base + slot

    def sweeper_uid(self, slot: int) -> int:
        """Return the uid under which the slot's leftovers are killed."""
        assert self.guest_uid_base is not None
        return self.guest_uid_base + self.max_sessions + slot

    def to_json(self) -> str:
        """Return the configuration as the one argument."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SupervisorConfig:
        """Read the one argument.

        Raises:
            BadRequest: Not JSON, or a field that is missing, unknown, of the wrong type or out of range.
        """
        read = _reader(text)
        config = cls(
            broker_uid=_optional_id(read, "broker_uid"),
            broker_gid=_optional_id(read, "broker_gid"),
            guest_uid_base=_optional_id(read, "guest_uid_base"),
            max_sessions=read.integer("max_sessions", 16, low=1, high=1024),
            host_socket=read.text("host_socket", DEFAULT_HOST_SOCKET, max_chars=100),
            guest_socket=read.text("guest_socket", DEFAULT_GUEST_SOCKET, max_chars=100),
            linger_s=read.optional_number("linger_s", low=0.01),
            name=read.optional_text("name", max_chars=100),
            environment=_environment(read.mapping("environment", {})),
            nproc=read.integer("nproc", 1024, low=1),
            nofile=read.integer("nofile", 4096, low=16),
            broker_site=read.optional_text("broker_site"),
            guest_site=read.optional_text("guest_site"),
            allowed_host_uids=tuple(_uid(uid) for uid in read.items("allowed_host_uids", [0])),
            landlock=read.flag("landlock", False),
            one_user=read.flag("one_user", False),
            preload=tuple(read.texts("preload", [])),
        )
        users = {config.broker_uid is None, config.broker_gid is None, config.guest_uid_base is None}
        if len(users) != 1:
            raise BadRequest("supervisor: broker_uid, broker_gid and guest_uid_base go together")
        if config.one_user and (config.separate_users or config.max_sessions != 1):
            raise BadRequest("supervisor: one_user stands for users of their own, and keeps one session apart")
        return config


def _reader(text: str) -> Reader:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise BadRequest(f"supervisor: the configuration is not JSON: {error}") from None
    read = Reader(data, "supervisor")
    unknown = set(data) - {field.name for field in dataclasses.fields(SupervisorConfig)}
    if unknown:
        raise BadRequest(f"supervisor: unknown field {min(unknown)!r}")
    return read


def _optional_id(read: Reader, name: str) -> int | None:
    # Uid 0 is refused: as root, broker or generated code would hold the supervisor's capabilities.
    return read.integer(name, low=1, high=(1 << 32) - 2) if read.has(name) else None


def _environment(pairs: dict[str, Any]) -> dict[str, str]:
    for name, value in pairs.items():
        if not isinstance(value, str) or "\0" in value or "\0" in name or "=" in name or not name:
            raise BadRequest(f"supervisor: environment variable {name[:80]!r} cannot be set")
    return pairs


def _uid(uid: Any) -> int:
    if type(uid) is not int or uid < 0:
        raise BadRequest("supervisor: 'allowed_host_uids' must list user ids")
    return uid
