"""What set-up asks of this machine and does to it: run programs, install packages, start daemons.

Apart from ``engine`` and ``base_image`` so that their decisions are tested with a fake machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from host_client.errors import DiskFull, SetupError

#: Takes one line of text for the person who waits.
Progress = Callable[[str], None]

# apt on a slow mirror; docker.io is some 70 MB.
APT_TIMEOUT_S = 600
# Enough of a failed program's output to see the reason.
_TAIL_LINES = 8
# A daemon that we start keeps this much of its log: the beginning, where the reason of a failed start is.
_DAEMON_LOG_BYTES = 1 << 20


class Machine:
    """The machine that this process runs on."""

    def is_root(self) -> bool:
        """Say whether this process may install packages and start daemons."""
        return os.geteuid() == 0

    def is_debian(self) -> bool:
        """Say whether packages come from apt: Debian, Ubuntu and their relatives."""
        return Path("/etc/debian_version").exists() and self.which("apt-get") is not None

    def is_macos(self) -> bool:
        """Say whether engines here live in a virtual machine with its own application."""
        return os.uname().sysname == "Darwin"

    def has_systemd(self) -> bool:
        """Say whether systemd is what starts services (not merely installed)."""
        return Path("/run/systemd/system").is_dir()

    def which(self, program: str) -> str | None:
        """Return where a program is; daemons' folders are searched although they are not on every PATH."""
        return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin:/usr/local/sbin")

    def run(self, argv: Sequence[str], *, timeout_s: float) -> tuple[int, str]:
        """Run a program without input and return its status and its output, both streams together."""
        try:
            done = subprocess.run(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"},
                check=False,
            )
        except subprocess.TimeoutExpired as expired:
            return 124, f"{(expired.stdout or b'').decode('utf-8', 'replace')}\nno end after {timeout_s:.0f} s"
        except OSError as error:
            return 127, str(error)
        return done.returncode, done.stdout.decode("utf-8", "replace")

    def start_daemon(self, argv: Sequence[str], *, log: Path) -> subprocess.Popen[bytes]:
        """Start a program that outlives this process; the first megabyte of what it writes is kept."""
        # `head` stops at the limit and `cat` goes on reading, so that a full log never blocks or kills the daemon.
        script = f'log=$1; shift; "$@" 2>&1 | {{ head -c {_DAEMON_LOG_BYTES} >"$log"; exec cat >/dev/null; }}'
        return subprocess.Popen(
            ["sh", "-c", script, "sh", str(log), *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )


def apt_install(machine: Machine, packages: Sequence[str]) -> None:
    """Install Debian packages.

    Raises:
        SetupError: apt failed; the message holds the end of its output.
        DiskFull: No space left.
    """
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=120", *packages]
    status, output = machine.run(install, timeout_s=APT_TIMEOUT_S)
    if status != 0:
        # A fresh machine has no package lists, an old one has stale ones.
        machine.run(["apt-get", "update", "-qq"], timeout_s=APT_TIMEOUT_S)
        status, output = machine.run(install, timeout_s=APT_TIMEOUT_S)
    if status != 0:
        raise failure(f"apt-get could not install {' '.join(packages)}", output)


def failure(what: str, output: str, *, error: type[SetupError] = SetupError, help: str | None = None) -> SetupError:
    """Return the error for a failed program: what failed, and the end of what it wrote."""
    if "no space left on device" in output.lower():
        return DiskFull(f"{what}: no space left on this machine.", help="See what uses it: df -h")
    return error(f"{what}:\n{tail(output)}", help=help)


def tail(output: str, lines: int = _TAIL_LINES) -> str:
    """Return the last lines of a program's output, indented."""
    kept = [line for line in output.splitlines() if line.strip()][-lines:]
    return "\n".join(f"    {line}" for line in kept) or "    (it wrote nothing)"
