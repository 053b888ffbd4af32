"""The program ``bwrap``: where it is, and how it gets there."""

from __future__ import annotations

from host_client.errors import BubblewrapMissing
from host_client.machine import Machine, Progress, apt_install

_PACKAGES = ("bubblewrap", "libseccomp2")
#: ``--size`` and ``--json-status-fd`` are older.
_OLDEST = (0, 5)
_VERSION_TIMEOUT_S = 10.0


def find_bwrap(machine: Machine | None = None) -> str:
    """Return where ``bwrap`` is.

    Raises:
        BubblewrapMissing: It is nowhere; the help is the command for this machine.
    """
    machine = machine or Machine()
    found = machine.which("bwrap")
    if found is None:
        raise BubblewrapMissing("bubblewrap (the program bwrap) is not installed", help=_advice(machine))
    return found


def ensure_bwrap(progress: Progress, machine: Machine | None = None) -> str:
    """Return where ``bwrap`` is, installing it where this user may.

    Raises:
        BubblewrapMissing: It is not there, cannot be installed by this user, or is too old.
        SetupError: Installing it failed.
    """
    machine = machine or Machine()
    if machine.which("bwrap") is None and machine.is_root() and machine.is_debian():
        progress(f"no bubblewrap here: installing {' and '.join(_PACKAGES)} with apt-get")
        apt_install(machine, _PACKAGES)
    program = find_bwrap(machine)
    version = bwrap_version(machine, program)
    if version < _OLDEST:
        shown = ".".join(map(str, version))
        raise BubblewrapMissing(f"{program} is version {shown}; {'.'.join(map(str, _OLDEST))} is the oldest that works")
    return program


def bwrap_version(machine: Machine, program: str) -> tuple[int, ...]:
    """Return the version of ``bwrap``.

    Raises:
        BubblewrapMissing: It does not run.
    """
    status, output = machine.run([program, "--version"], timeout_s=_VERSION_TIMEOUT_S)
    parts = output.split()[-1].split(".") if status == 0 and output.split() else []
    if not parts or not all(part.isdigit() for part in parts):
        raise BubblewrapMissing(f"{program} does not run: {output.strip()[:200]}")
    return tuple(map(int, parts))


def _advice(machine: Machine) -> str:
    if machine.is_debian():
        return f"{'' if machine.is_root() else 'sudo '}apt-get install -y {' '.join(_PACKAGES)}"
    return "Install bubblewrap with your system's package manager"
