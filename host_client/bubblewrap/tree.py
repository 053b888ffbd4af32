"""What a sandbox sees of files: the host's programs, read-only, our own code, and the packages; decision 015.

Kept in the user's cache, under a hash of all that it is made from, like the image.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import broker
import sandbox_image
from host_client.errors import BadSetting, ImageBuildFailed, ImageMissing
from host_client.image import ImageSettings, folder_of, image_tag, one_at_a_time
from host_client.machine import Progress, tail
from host_client.wheels import cache_folder, ensure_site, read_requirements

_VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
#: The pinned packages are made for these; older Pythons get the newest that is made for them.
_PINS_FROM = (3, 11)
#: Counts changes to this module that alter a tree without altering a file that is hashed.
_RECIPE = "1"
_KEPT_TREES = 4

PYTHON_FOLDER = "/opt/rlm-sandbox/python"
#: Of the host's settings, those that programs need; nobody's data.
_SETTINGS = (
    "alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "mime.types", "ssl/certs",
    f"python{_VERSION}", "python3", "debian_version", "os-release",
)  # fmt: skip
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
_USERS = "root:x:0:0:root:/:/usr/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
_FILES = {
    "passwd": _USERS,
    "group": "root:x:0:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "hostname": "sandbox\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "shadow": "root:!::::::::\n",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Bind:
    """Something of the host's that a sandbox sees read-only.

    Attributes:
        source: Where it is on the host.
        target: Where the sandbox sees it.
    """

    source: Path
    target: str


def ensure_tree(settings: ImageSettings, progress: Progress) -> Path:
    """Return the folder with a sandbox's files, made if it is not there.

    Raises:
        BadSetting: An image is named, which only an engine can run.
        ImageBuildFailed: A package cannot be fetched.
    """
    folder = tree_folder(settings)
    if folder.is_dir():
        return folder
    with one_at_a_time():
        if not folder.is_dir():
            _make(folder, settings, progress)
    return folder


def existing_tree(settings: ImageSettings) -> Path:
    """Return the folder with a sandbox's files.

    Raises:
        BadSetting: An image is named, which only an engine can run.
        ImageMissing: It was not made yet.
    """
    folder = tree_folder(settings)
    if not folder.is_dir():
        raise ImageMissing("The files of the sandbox were not put together yet.", help="rlm-sandbox image")
    os.utime(folder)
    return folder


def tree_folder(settings: ImageSettings) -> Path:
    """Return where the files for these settings are, or will be.

    Raises:
        BadSetting: An image is named, which only an engine can run.
    """
    if settings.image is not None:
        raise BadSetting(
            f"setting image={settings.image!r}: the bubblewrap provider runs no images",
            help="unset RLM_SANDBOX_IMAGE, or RLM_SANDBOX_PROVIDER=docker",
        )
    key = image_tag(settings).rpartition(":")[2]
    return cache_folder() / "bubblewrap" / f"{key}-py{_VERSION}-{platform.machine()}-{_RECIPE}"


def python_command() -> str:
    """Return where the sandbox has its Python."""
    program = Path(sys.base_prefix) / "bin" / f"python{_VERSION}"
    found = program if program.exists() else Path(os.path.realpath(sys.executable))
    return str(found) if _python_is_the_systems() else f"{PYTHON_FOLDER}/{found.relative_to(sys.base_prefix)}"


def binds(tree: Path) -> list[Bind]:
    """Return all that a sandbox sees, in the order in which it is mounted."""
    found = [Bind(Path(path), path) for path in _SYSTEM if Path(path).is_dir() and not Path(path).is_symlink()]
    if not _python_is_the_systems():
        found.append(Bind(Path(sys.base_prefix), PYTHON_FOLDER))
    found += [Bind(path, f"/etc/{path.name}") for path in sorted((tree / "etc").iterdir())]
    found += [Bind(Path("/etc", name), f"/etc/{name}") for name in _SETTINGS if Path("/etc", name).exists()]
    return [
        *found,
        *(Bind(tree / name, f"/opt/rlm-sandbox/{name}") for name in ("broker-app", "broker-site", "guest-site")),
    ]


def links() -> dict[str, str]:
    """Return the symlinks to be made, such as ``/bin`` where that is one on the host."""
    found = {path: os.readlink(path) for path in _SYSTEM if Path(path).is_symlink()}
    if not _python_is_the_systems() and sysconfig.get_config_var("Py_ENABLE_SHARED"):
        # Its program looks for its library where that was installed.
        found[sys.base_prefix] = PYTHON_FOLDER
    return found


def _python_is_the_systems() -> bool:
    return Path(sys.base_prefix) == Path("/usr")


def _make(folder: Path, settings: ImageSettings, progress: Progress) -> None:
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    own = folder_of(sandbox_image)
    guest = [*_pins(own / "requirements-guest.txt"), *settings.packages]
    sites = {
        name: ensure_site(name, requirements, architecture, progress, python_version=_VERSION)
        for name, requirements in (("guest-site", guest), ("broker-site", _pins(own / "requirements-broker.txt")))
    }
    progress(f"putting the sandbox's files together for Python {_VERSION}")
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=".tree-", dir=folder.parent) as temporary:
        fresh = Path(temporary) / "tree"
        (fresh / "etc").mkdir(parents=True)
        for name, text in _FILES.items():
            (fresh / "etc" / name).write_text(text)
        for name, site in sites.items():
            shutil.copytree(site, fresh / name, symlinks=True)
        shutil.copytree(
            folder_of(broker), fresh / "broker-app" / "broker", ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
        _compile(fresh)
        _open_for_reading(fresh)
        # A rename is all or nothing: a folder of that name is always complete.
        fresh.rename(folder)
    _prune(folder)


def _pins(path: Path) -> list[str]:
    pinned = read_requirements(path)
    return pinned if sys.version_info >= _PINS_FROM else [each.partition("==")[0] for each in pinned]


def _compile(tree: Path) -> None:
    """Make bytecode, which a read-only folder would make again at every start."""
    options = ["-q", "-j0", "--invalidation-mode", "unchecked-hash"]
    for name, must in (("guest-site", False), ("broker-site", False), ("broker-app", True)):
        # What tracebacks show is where the sandbox has the file.
        moved = ["-s", str(tree), "-p", "/opt/rlm-sandbox"]
        argv = [sys.executable, "-m", "compileall", *options, *moved, str(tree / name)]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if must and done.returncode != 0:
            raise ImageBuildFailed(f"the broker's code cannot be compiled:\n{tail(done.stdout + done.stderr)}")


def _open_for_reading(tree: Path) -> None:
    """Let the sandbox's users read, whatever this user's umask is; nobody writes."""
    for parent, _, files in os.walk(tree):
        os.chmod(parent, 0o755)  # noqa: S103
        for name in files:
            path = Path(parent, name)
            if not path.is_symlink():
                os.chmod(path, 0o444)
    # Like everywhere: nobody's business.
    os.chmod(tree / "etc" / "shadow", 0)


def _prune(newest: Path) -> None:
    found = sorted(newest.parent.glob("[!.]*"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in [folder for folder in found if folder != newest][_KEPT_TREES - 1 :]:
        shutil.rmtree(folder, ignore_errors=True)
