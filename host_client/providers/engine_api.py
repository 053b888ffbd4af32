"""The part of a container engine that sandboxes need: ``DockerEngine`` has it, and ``fake_engine.FakeEngine``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from host_client.providers.exec_stream import ExecStream


class Engine(Protocol):
    """A container engine. Its methods raise ``SandboxError``; containers are named by id or name."""

    @property
    def url(self) -> str:
        """Where it was found."""

    def create_container(self, **keywords: Any) -> str:
        """Create a container and return its id."""

    def start(self, container_id: str) -> None:
        """Start it."""

    def inspect(self, container_id: str) -> dict[str, Any]:
        """Return the engine's description of it, or raise ``ContainerNotFound``."""

    def remove(self, container_id: str, force: bool = True) -> None:
        """Kill and remove it; one that is gone is fine."""

    def list(self, labels: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return all containers, running or not, that carry these labels."""

    def logs(self, container_id: str, tail: int = 200) -> str:
        """Return the last lines that it wrote."""

    def follow_logs(self, container_id: str, tail: int = 200) -> Iterator[bytes]:
        """Yield what it writes until it ends."""

    def open_exec(self, container_id: str, command: Sequence[str], *, user: str) -> ExecStream:
        """Start a program in it, and return what leads to its input and output."""

    def info(self) -> dict[str, Any]:
        """Return its description of itself: runtimes, which limits it can enforce, and so on."""

    def close(self) -> None:
        """Close the connections; containers go on, and the next call connects again."""
