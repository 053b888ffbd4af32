"""Bringing up whatever sandboxes need on this machine: an engine and an image, or bubblewrap and its files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_client.errors import SetupError
from host_client.machine import Machine, Progress
from host_client.providers.choice import BUBBLEWRAP, choose, engine_is_needed
from host_client.settings import SandboxSettings

if TYPE_CHECKING:
    from host_client.providers.docker_engine import DockerEngine


def prepare(settings: SandboxSettings, progress: Progress) -> str:
    """Bring up whatever is missing, and return the image's tag, or without an engine the folder that stands for it.

    Raises:
        SetupError: Something cannot be had; the help is the command that can.
    """
    if settings.provider == BUBBLEWRAP:
        return _without_engine(settings, progress)
    from host_client.engine import ensure_engine

    try:
        engine = ensure_engine(lambda text: progress(f"engine: {text}"))
    except SetupError as error:
        if settings.provider != "auto" or not _can_do_without(settings):
            raise
        progress(f"engine: {error.message.splitlines()[0]}")
        progress("without an engine: bubblewrap, which is weaker in some points (docs/security.md)")
        return _without_engine(settings, progress)
    return _with_engine(engine, settings, progress)


def _with_engine(engine: DockerEngine, settings: SandboxSettings, progress: Progress) -> str:
    from host_client.image import ensure_image

    with engine:
        progress(f"engine: Docker {engine.version()['Version']} at {engine.url}")
        tag = ensure_image(settings, lambda text: progress(f"image: {text}"), engine=engine)
    progress(f"image: {tag} is ready")
    return tag


def _without_engine(settings: SandboxSettings, progress: Progress) -> str:
    from host_client.bubblewrap.program import ensure_bwrap
    from host_client.bubblewrap.tree import ensure_tree

    program = ensure_bwrap(lambda text: progress(f"bubblewrap: {text}"))
    progress(f"bubblewrap: {program}")
    folder = ensure_tree(settings, lambda text: progress(f"files: {text}"))
    progress(f"files: {folder.name} is ready")
    return str(folder)


def _can_do_without(settings: SandboxSettings) -> bool:
    """Say whether bubblewrap is left: here, or to be installed, and nothing asked for needs an engine."""
    machine = Machine()
    if choose(settings, machine).name == BUBBLEWRAP:
        return True
    return machine.is_root() and machine.is_debian() and not engine_is_needed(settings)
