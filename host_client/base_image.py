"""The image below ours: the official Python image where a registry is in reach, else one made with debootstrap.

Both carry Python 3.13 on Debian trixie.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

from host_client.errors import ImageBuildFailed, SetupError
from host_client.machine import Machine, Progress, apt_install, failure
from host_client.providers.docker_engine import DockerEngine

OFFICIAL = "python:3.13-slim-trixie"
BOOTSTRAPPED = "rlm-sandbox-base:trixie-py3.13"

# A registry in reach answers in well under a second; without one, this is all that the probe costs.
PROBE_TIMEOUT_S = 4.0
# While something works in silence, say so this often.
_REPORT_EVERY_S = 10.0
# Packages' archives and texts that nothing in a sandbox reads: two fifths of the tree.
_LEFT_OUT = (
    "./var/cache/apt/archives/*.deb",
    "./var/lib/apt/lists/*",
    "./var/cache/debconf/*-old",
    "./usr/share/locale/*",
    "./usr/share/man/*",
    "./usr/share/info/*",
    "./usr/share/doc/*/changelog*",
    "./usr/share/doc/*/NEWS*",
    "./dev/*",
    "./proc/*",
    "./sys/*",
)


def ensure_base(engine: DockerEngine, progress: Progress, *, machine: Machine | None = None) -> str:
    """Return the tag of the base image, made or pulled if it is not there.

    Raises:
        SetupError: It can neither be pulled nor made here; the help is the command that can.
    """
    for tag in (OFFICIAL, BOOTSTRAPPED):
        if engine.image_exists(tag):
            progress(f"{tag} is here")
            return tag
    if engine.registry_has(OFFICIAL, PROBE_TIMEOUT_S):
        progress(f"pulling {OFFICIAL}")
        for line in engine.pull(OFFICIAL):
            if line.startswith(("Status:", "Digest:")):
                progress(line)
        return OFFICIAL
    _bootstrap(engine, progress, machine or Machine())
    return BOOTSTRAPPED


def _bootstrap(engine: DockerEngine, progress: Progress, machine: Machine) -> None:
    progress(f"no registry in reach has {OFFICIAL}: making {BOOTSTRAPPED} with debootstrap (about a minute)")
    _require_debootstrap(progress, machine)
    # Not /tmp: it is often mounted without devices, and debootstrap refuses that.
    with tempfile.TemporaryDirectory(prefix="rlm-sandbox-base-", dir="/var/tmp") as folder:
        root = Path(folder) / "root"
        _debootstrap(root, _architecture(engine), progress, machine)
        progress("importing it into the engine")
        _import(engine, root)


def _require_debootstrap(progress: Progress, machine: Machine) -> None:
    if not machine.is_root():
        raise SetupError(
            f"{OFFICIAL} cannot be pulled, and only root can make a base image without it.",
            help=f"sudo {sys.executable} -m host_client.cli image   (or, with a registry: docker pull {OFFICIAL})",
        )
    if machine.which("debootstrap") is not None:
        return
    if not machine.is_debian():
        raise SetupError(
            f"{OFFICIAL} cannot be pulled, and debootstrap, which would make a base image without it, is missing.",
            help=f"Install debootstrap, or, with a registry: docker pull {OFFICIAL}",
        )
    progress("installing debootstrap with apt-get")
    apt_install(machine, ("debootstrap", "debian-archive-keyring"))


def _architecture(engine: DockerEngine) -> str:
    """Return Debian's name for the engine's architecture; Go's names are the same for those that we support."""
    return str(engine.version()["Arch"])


def _debootstrap(root: Path, architecture: str, progress: Progress, machine: Machine) -> None:
    argv = [
        machine.which("debootstrap") or "debootstrap",
        "--variant=minbase",
        "--include=python3",
        f"--arch={architecture}",
        "trixie",
        str(root),
    ]
    if mirror := os.environ.get("RLM_SANDBOX_DEBIAN_MIRROR"):
        argv.append(mirror)
    status, output = watch(argv, lambda line, spent_s: progress(f"debootstrap, {spent_s:.0f} s: {line}"))
    if status != 0:
        raise failure(
            "debootstrap could not make the base image",
            output,
            error=ImageBuildFailed,
            help="It fetches Debian packages; name a mirror that this machine reaches: RLM_SANDBOX_DEBIAN_MIRROR=...",
        )


def watch(argv: list[str], report: Callable[[str, float], None]) -> tuple[int, str]:
    """Run a program, reporting its newest line now and then, and return its status and its output."""
    began = reported = time.monotonic()
    lines: list[str] = []
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
        text=True,
        errors="replace",
    ) as process:
        for line in cast("IO[str]", process.stdout):
            lines.append(line.rstrip())
            now = time.monotonic()
            if now - reported >= _REPORT_EVERY_S:
                reported = now
                report(lines[-1].removeprefix("I: "), now - began)
    return process.returncode, "\n".join(lines)


def _import(engine: DockerEngine, root: Path) -> None:
    exclusions = [f"--exclude={pattern}" for pattern in _LEFT_OUT]
    tar = [shutil.which("tar") or "tar", "-C", str(root), "--numeric-owner", "--wildcards", *exclusions, "-c", "."]
    with subprocess.Popen(tar, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        engine.import_image(
            cast("IO[bytes]", process.stdout),
            tag=BOOTSTRAPPED,
            changes=['CMD ["python3"]', "ENV LANG=C.UTF-8"],
        )
        if process.wait() != 0:
            complaint = cast("IO[bytes]", process.stderr).read().decode("utf-8", "replace")
            engine.remove_image(BOOTSTRAPPED)
            raise failure("tar could not read the base image's tree", complaint, error=ImageBuildFailed)
