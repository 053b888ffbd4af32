"""The sandbox's image: its tag is a hash of what it is made from, so host and image cannot drift."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

import broker
import sandbox_image
from host_client.base_image import ensure_base
from host_client.engine import connect_engine
from host_client.errors import ImageBuildFailed, ImageMissing, ProviderError
from host_client.machine import Progress, tail
from host_client.providers.docker_engine import DockerEngine
from host_client.wheels import cache_folder, ensure_site, read_requirements

REPOSITORY = "rlm-sandbox"
# Counts changes to this module that alter the image without altering a file that is hashed.
_RECIPE = "1"
_LOG_LINES = 15
# The newest images that stay: other checkouts and versions on this machine have their own tags.
_KEPT_IMAGES = 6


class ImageSettings(Protocol):
    """What of ``SandboxSettings`` decides on the image."""

    @property
    def image(self) -> str | None:
        """Image to run, or None for our own."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Extra packages for generated code."""


def image_tag(settings: ImageSettings) -> str:
    """Return the tag of the image that these settings and this package's files ask for."""
    if settings.image is not None:
        return settings.image
    digest = hashlib.sha256(_RECIPE.encode())
    for name, path in _sources():
        digest.update(f"\0{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    digest.update("\0".join(["", *sorted(settings.packages)]).encode())
    return f"{REPOSITORY}:{digest.hexdigest()[:12]}"


def image_exists(settings: ImageSettings, *, engine: DockerEngine | None = None) -> bool:
    """Say whether the engine has the image that these settings ask for."""
    with _engine_or_own(engine) as connected:
        return connected.image_exists(image_tag(settings))


def ensure_image(settings: ImageSettings, progress: Progress, *, engine: DockerEngine | None = None) -> str:
    """Return the tag of the image, built if it is not there.

    Args:
        settings: ``image`` and ``packages`` are read.
        progress: Told in one line what is done.
        engine: Engine to build with; by default the one that answers.

    Raises:
        ImageMissing: The user's own image (``settings.image``) is not there; we cannot build that.
        ImageBuildFailed: A step failed.
        SetupError: No engine, no base, no space, and so on.
    """
    tag = image_tag(settings)
    with _engine_or_own(engine) as connected:
        if connected.image_exists(tag):
            return tag
        if settings.image is not None:
            raise ImageMissing(
                f"The image {tag} is not there.", help=f"docker pull {tag}   (or unset RLM_SANDBOX_IMAGE)"
            )
        with one_at_a_time():
            if not connected.image_exists(tag):
                _build(connected, tag, settings, progress)
    return tag


def remove_images(engine: DockerEngine) -> list[str]:
    """Remove all images that this package built, bases included, and return their tags."""
    tags = engine.images(REPOSITORY) + engine.images(f"{REPOSITORY}-base")
    for tag in tags:
        engine.remove_image(tag)
    return tags


def _build(engine: DockerEngine, tag: str, settings: ImageSettings, progress: Progress) -> None:
    base = ensure_base(engine, progress)
    architecture = str(engine.version()["Arch"])
    folder = folder_of(sandbox_image)
    guest = [*read_requirements(folder / "requirements-guest.txt"), *settings.packages]
    guest_site = ensure_site("guest-site", guest, architecture, progress)
    broker_requirements = read_requirements(folder / "requirements-broker.txt")
    broker_site = ensure_site("broker-site", broker_requirements, architecture, progress)
    progress(f"building {tag} on {base}")
    with tempfile.TemporaryFile() as context:
        _write_context(context, guest_site=guest_site, broker_site=broker_site)
        if image_tag(settings) != tag:
            raise ImageBuildFailed("The sources changed while the image was being put together.", help="Run it again.")
        context.seek(0)
        _run_build(engine, context, tag, base)
    _prune(engine, tag)


def _prune(engine: DockerEngine, newest: str) -> None:
    """Remove older images of ours that no container uses: each change of broker/ would leave one behind."""
    for tag in [tag for tag in engine.images(REPOSITORY) if tag != newest][_KEPT_IMAGES - 1 :]:
        # In use, or removed by somebody else at the same time: it stays, or is gone already.
        with contextlib.suppress(ProviderError):
            engine.remove_image(tag, force=False)


def _run_build(engine: DockerEngine, context: IO[bytes], tag: str, base: str) -> None:
    log: list[str] = []
    try:
        for line in engine.build(context, tag=tag, buildargs={"BASE": base}):
            log.append(line)
    except ImageBuildFailed as error:
        raise ImageBuildFailed(f"{error.message}\n{tail(chr(10).join(log), _LOG_LINES)}", help=error.help) from error


def _write_context(target: IO[bytes], *, guest_site: Path, broker_site: Path) -> None:
    """Write what the Dockerfile copies as a tar archive: owned by root, read-only, without times.

    The same files give the same bytes, so the engine's layer cache holds for everything that has not changed.
    """
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(folder_of(sandbox_image) / "Dockerfile", "Dockerfile", filter=_normalised)
        for name, folder in (("guest-site", guest_site), ("broker-site", broker_site), ("broker", folder_of(broker))):
            archive.addfile(_normalised(_directory(name)))
            for path in _files(folder, all_of_it=folder in (guest_site, broker_site)):
                archive.add(path, f"{name}/{path.relative_to(folder)}", recursive=False, filter=_normalised)


def _directory(name: str) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type = tarfile.DIRTYPE
    return entry


def _normalised(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    entry.mtime = 0
    entry.mode = 0o555 if entry.isdir() else 0o444
    return entry


def _sources() -> Iterator[tuple[str, Path]]:
    """Yield name and path of each file that decides on the image, in an order of its own."""
    for package in (broker, sandbox_image):
        folder = folder_of(package)
        for path in _files(folder):
            yield f"{package.__name__}/{path.relative_to(folder).as_posix()}", path


def _files(folder: Path, *, all_of_it: bool = False) -> list[Path]:
    """Return what is below a folder, sorted, without bytecode.

    Args:
        folder: A package of ours, or a folder with installed packages.
        all_of_it: Hidden files too (packages keep libraries in such), and the folders themselves (some are empty).
    """
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__" and (all_of_it or not name.startswith("."))]
        if all_of_it:
            found += [Path(parent, name) for name in folders]
        found += [Path(parent, name) for name in files if all_of_it or _is_source(name)]
    return sorted(found)


def _is_source(name: str) -> bool:
    return not name.startswith(".") and not name.endswith((".pyc", "~"))


def folder_of(package: object) -> Path:
    """Return where a package's files are."""
    return Path(str(getattr(package, "__file__", ""))).resolve().parent


@contextlib.contextmanager
def _engine_or_own(engine: DockerEngine | None) -> Iterator[DockerEngine]:
    if engine is not None:
        yield engine
        return
    with connect_engine() as connected:
        yield connected


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let one process build: two would fetch and compile the same things side by side."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
