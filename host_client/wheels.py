"""Packages for the image, fetched on the host as wheels of the image's Python and kept in the user's cache.

Two folders, because two parties import them: ``broker-site`` for the daemon, ``guest-site`` for generated code.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from host_client.errors import ImageBuildFailed
from host_client.machine import Machine, Progress, failure

PYTHON_VERSION = "3.13"
# Engines' names of architectures -> the wheels' names.
_WHEEL_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}
# Newest first: trixie's C library satisfies all of them, and packages publish for different ones.
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
# A slow connection and some 100 MB.
_FETCH_TIMEOUT_S = 900
# Earlier sets of packages that stay in the cache; each is some 100 MB.
_KEPT_SETS = 4
# Their own tests are half of the two largest packages.
_WITHOUT_TESTS = ("numpy", "pandas")

Fetch = Callable[[Sequence[str]], tuple[int, str]]


def cache_folder() -> Path:
    """Return this package's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlm-sandbox"


def read_requirements(path: Path) -> list[str]:
    """Return the requirement strings of a requirements file; comments and empty lines are dropped."""
    lines = (line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return [line for line in lines if line]


def ensure_site(
    name: str,
    requirements: Sequence[str],
    architecture: str,
    progress: Progress,
    *,
    fetch: Fetch | None = None,
    cache: Path | None = None,
    python_version: str = PYTHON_VERSION,
) -> Path:
    """Return a folder with these packages installed, from the cache where it has them.

    Args:
        name: ``broker-site`` or ``guest-site``.
        requirements: Requirement strings.
        architecture: The engine's, such as ``amd64``.
        progress: Told what is fetched.
        fetch: Runs pip with these arguments and returns its status and output.
        cache: Where finished folders are kept.
        python_version: For which Python, such as ``3.13``; by default the image's.

    Raises:
        ImageBuildFailed: A package cannot be fetched as a wheel for that Python.
        DiskFull: No space left.
    """
    platforms = _platforms(architecture)
    cache = cache or cache_folder() / "sites"
    key = hashlib.sha256("\n".join([python_version, architecture, *requirements]).encode()).hexdigest()[:12]
    site = cache / f"{name}-{key}"
    if site.is_dir():
        os.utime(site)
        return site
    progress(
        f"fetching {', '.join(_short(requirements))} for generated code"
        if name == "guest-site"
        else f"fetching {', '.join(_short(requirements))} for the broker"
    )
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as folder:
        fresh = Path(folder) / "site"
        _fill(fresh, requirements, platforms, fetch or _pip, python_version)
        # A rename is all or nothing: a folder of that name is always complete.
        if not site.exists():
            fresh.rename(site)
    _prune(cache, name)
    return site


def _platforms(architecture: str) -> list[str]:
    wheel_architecture = _WHEEL_ARCHITECTURES.get(architecture)
    if wheel_architecture is None:
        raise ImageBuildFailed(
            f"The Docker engine runs on {architecture}; the image can be built for {', '.join(_WHEEL_ARCHITECTURES)}."
        )
    return [f"{platform}_{wheel_architecture}" for platform in _PLATFORMS]


def _short(requirements: Sequence[str], most: int = 3) -> list[str]:
    names = [requirement.partition("==")[0] for requirement in requirements]
    return names if len(names) <= most else [*names[:most], f"{len(names) - most} more"]


def _fill(site: Path, requirements: Sequence[str], platforms: Sequence[str], fetch: Fetch, python_version: str) -> None:
    site.mkdir(mode=0o755)
    if not requirements:
        return
    status, output = fetch(
        [
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-input",
            "--no-compile",
            "--only-binary=:all:",
            "--implementation=cp",
            f"--python-version={python_version}",
            *(f"--platform={platform}" for platform in platforms),
            f"--target={site}",
            *requirements,
        ]
    )
    if status != 0:
        raise failure(
            f"pip could not fetch wheels for the image ({', '.join(_short(requirements))})",
            "\n".join(line for line in output.splitlines() if not line.startswith("WARNING")),
            error=ImageBuildFailed,
            help=f"Each package needs a wheel for Python {python_version} on Linux. See "
            "sandbox_image/requirements-guest.txt and RLM_SANDBOX_PACKAGES; without a network, set PIP_INDEX_URL to a "
            "mirror.",
        )
    shutil.rmtree(site / "bin", ignore_errors=True)
    for package in _WITHOUT_TESTS:
        for tests in [*(site / package).glob("tests"), *(site / package).glob("*/tests")]:
            shutil.rmtree(tests, ignore_errors=True)


def _pip(arguments: Sequence[str]) -> tuple[int, str]:
    """Run pip of this environment, or the one on the PATH where this environment was made without."""
    argv = [sys.executable, "-m", "pip", *arguments]
    if subprocess.run([*argv[:3], "--version"], capture_output=True, check=False).returncode != 0:
        program = shutil.which("pip3") or shutil.which("pip")
        if program is None:
            raise ImageBuildFailed(
                "Packages for the image are fetched with pip, and this Python has none.",
                help=f"{sys.executable} -m ensurepip",
            )
        argv = [program, *arguments]
    return Machine().run(argv, timeout_s=_FETCH_TIMEOUT_S)


def _prune(cache: Path, name: str) -> None:
    """Remove all but the newest sets of one kind."""
    found = sorted(cache.glob(f"{name}-*"), key=lambda site: site.stat().st_mtime, reverse=True)
    for site in found[_KEPT_SETS:]:
        shutil.rmtree(site, ignore_errors=True)
