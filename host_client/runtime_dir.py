"""Where the sockets live: a directory of this user, with one subdirectory for each sandbox.

::

    <runtime dir>/              0700, this user's
    ├ lock                      flock: held for the microseconds of a change to anything below
    ├ uids/<slot> -> <sandbox>  which sandbox holds which range of guest uids
    ├ <sandbox>/                0700, the broker's uid; mounted into the container
    │ └ host.sock
    └ bubblewrap/<sandbox>.*    records of sandboxes without an engine; see host_client/bubblewrap/records.py

A sandbox's directory carries its owner in its name, so that it exists and is accounted for in one atomic step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from host_client.errors import BadSetting, DiskFull, ProviderError, SetupError
from host_client.owner import Owner

log = logging.getLogger(__name__)

VARIABLE = "RLM_SANDBOX_RUNTIME_DIR"
SOCKET_NAME = "host.sock"
#: Folder of the records of sandboxes that no engine knows.
RECORDS = "bubblewrap"

#: Guest uids: above the system's and the users' of common distributions, below subordinate ranges (100,000 and up).
GUEST_UID_FIRST = 20_000
GUEST_UID_END = 60_000
#: Uids of one sandbox: twice the most sessions that the settings allow (the supervisor kills under uids of its own),
#: and one more for a person's shell.
UIDS_PER_SANDBOX = 160
SLOTS = (GUEST_UID_END - GUEST_UID_FIRST) // UIDS_PER_SANDBOX

#: The broker's uid where the host user is root: nobody's on common distributions, and below the guests'.
BROKER_UID_FOR_ROOT = 19_999

#: The kernel's limit for a socket's path is 108 bytes with the final zero.
_MAX_SOCKET_PATH_BYTES = 107
#: Spreads users over the slots: they keep their reservations apart, but kernel limits per uid know no users.
_SLOT_STRIDE = 97


@dataclasses.dataclass(frozen=True, slots=True)
class SandboxDirectory:
    """What a sandbox holds on the host.

    Attributes:
        path: Its directory, 0700, owned by the broker's uid.
        guest_uid_base: First of the uids reserved for its sessions.
    """

    path: Path
    guest_uid_base: int

    @property
    def socket_path(self) -> Path:
        """The broker's ``host.sock``."""
        return self.path / SOCKET_NAME


class RuntimeDir:
    """One user's runtime directory. Safe between threads and between processes.

    Args:
        path: Where it is; made where it is missing.

    Raises:
        SetupError: It belongs to somebody else, is a symlink, or others may write to it.
        BadSetting: Its path is too long for a socket's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _make_private(path)
        _make_private(path / "uids")
        longest = path / _directory_name(Owner("f" * 8, 1 << 22, 1 << 40, 1 << 32)) / SOCKET_NAME
        if len(os.fsencode(longest)) > _MAX_SOCKET_PATH_BYTES:
            raise BadSetting(f"the runtime directory {path} is too long for a socket's path", help=_HELP)

    @classmethod
    def open(cls, environ: Mapping[str, str] | None = None) -> RuntimeDir:
        """Open this user's runtime directory, making it where it is missing."""
        return cls(locate(os.environ if environ is None else environ))

    def create(self, owner: Owner) -> SandboxDirectory:
        """Make a sandbox's directory and reserve its uids.

        Raises:
            ProviderError: Every range of uids is taken.
            DiskFull: No space left.
        """
        path = self.path / _directory_name(owner)
        with self._locked(), _disk_errors(path):
            slot = self._reserve(path.name)
            try:
                path.mkdir(mode=0o700)
                if os.geteuid() == 0:
                    os.chown(path, BROKER_UID_FOR_ROOT, BROKER_UID_FOR_ROOT)
            except BaseException:
                self._release(path.name)
                raise
        return SandboxDirectory(path, GUEST_UID_FIRST + slot * UIDS_PER_SANDBOX)

    def remove(self, name: str) -> None:
        """Remove a sandbox's directory and its reservation; nothing happens where they are gone."""
        with self._locked():
            self._release(name)
            try:
                shutil.rmtree(self.path / name)
            except FileNotFoundError:
                pass
            except OSError as error:
                log.warning("cannot remove the socket directory %s: %s", self.path / name, error)

    def abandoned(self) -> list[str]:
        """Return the names of directories whose owner process is dead; their sandboxes may still run.

        Those that have a record are left to whoever keeps the records.
        """
        names = {entry.name for entry in self.path.iterdir()} | set(self._reservations().values())
        names -= {record.stem for record in (self.path / RECORDS).glob("*.json")}
        owners = ((name, Owner.from_file_name(name)) for name in names)
        return sorted(name for name, owner in owners if owner is not None and owner.is_dead())

    def _reserve(self, name: str) -> int:
        first = os.geteuid() * _SLOT_STRIDE
        for offset in range(SLOTS):
            slot = (first + offset) % SLOTS
            with contextlib.suppress(FileExistsError):
                # A symlink comes into being together with what it says, a file would be empty first.
                os.symlink(name, self.path / "uids" / str(slot))
                return slot
        raise ProviderError(
            f"all {SLOTS} ranges of guest uids are taken", help="rlm-sandbox status shows what is running"
        )

    def _release(self, name: str) -> None:
        for slot, holder in self._reservations().items():
            if holder == name:
                slot.unlink(missing_ok=True)

    def _reservations(self) -> dict[Path, str]:
        found = {}
        for slot in (self.path / "uids").iterdir():
            with contextlib.suppress(OSError):
                found[slot] = os.readlink(slot)
        return found

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # Guards uids/ and the directories together: a reservation names a directory that exists.
        with _disk_errors(self.path):
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def locate(environ: Mapping[str, str]) -> Path:
    """Return where this user's runtime directory belongs."""
    if environ.get(VARIABLE):
        return Path(environ[VARIABLE]).absolute()
    uid = os.geteuid()
    for parent in (environ.get("XDG_RUNTIME_DIR"), f"/run/user/{uid}"):
        # sudo keeps the variable of the user who called it: a directory that is not ours is not for us.
        if parent and _is_own_directory(Path(parent)):
            return Path(parent) / "rlm-sandbox"
    return Path(f"/tmp/rlm-sandbox-{uid}")  # noqa: S108 - checked for squatting below


def broker_uid() -> int:
    """Return the uid that the broker runs under: the host user's, so that the directory can stay 0700."""
    return os.geteuid() or BROKER_UID_FOR_ROOT


_HELP = f"set {VARIABLE} to a short path of a directory that belongs to you alone"


def _make_private(path: Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found, parent = os.lstat(path), os.stat(path.parent)
    except OSError as error:
        raise SetupError(f"the runtime directory {path} cannot be made: {error.strerror}", help=_HELP) from error
    problem = _problem(found, parent)
    if problem is not None:
        raise SetupError(f"the runtime directory {path} is not safe to use: {problem}", help=_HELP)


def _problem(found: os.stat_result, parent: os.stat_result) -> str | None:
    if not stat.S_ISDIR(found.st_mode):
        return "it is a symlink or a file"
    if found.st_uid != os.geteuid():
        return f"it belongs to uid {found.st_uid}, not to you (uid {os.geteuid()})"
    if found.st_mode & 0o022:
        return f"others may write to it (mode {stat.S_IMODE(found.st_mode):04o})"
    if parent.st_mode & stat.S_IWOTH and not parent.st_mode & stat.S_ISVTX:
        return "others may replace it (its parent is writable for others and not sticky)"
    return None


def _is_own_directory(path: Path) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _directory_name(owner: Owner) -> str:
    return f"{owner.file_name()}-{secrets.token_hex(3)}"


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no space left where the sockets live: {path}", help=f"df -h {path}") from error
        raise SetupError(f"the runtime directory {path} cannot be used: {error.strerror}", help=_HELP) from error
