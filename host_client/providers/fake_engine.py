"""A container engine in memory, for tests of whatever starts sandboxes: no Docker, no privileges.

Its containers are a thread that answers ``/v1/health`` on ``host.sock``; what a test wants to go wrong, it says.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import secrets
import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from broker.protocol import PROTOCOL_VERSION
from broker.protocol.self_test import Check, Limits, SelfTest
from host_client.errors import ImageMissing, ProviderError
from host_client.providers.container_spec import LABEL_DIRECTORY
from host_client.providers.docker_engine import ContainerNotFound
from host_client.providers.exec_stream import ExecStream


class FakeContainer:
    """One container.

    Attributes:
        container_id: Its id.
        keywords: What it was created with.
        state: As the engine's description has it under ``State``.
        log: What it wrote.
    """

    def __init__(self, keywords: Mapping[str, Any]) -> None:
        self.container_id = secrets.token_hex(32)
        self.keywords = dict(keywords)
        self.state: dict[str, Any] = {"Status": "created", "Running": False, "ExitCode": 0, "Pid": 0}
        self.log = ""
        self._server: socketserver.ThreadingUnixStreamServer | None = None

    @property
    def socket_path(self) -> Path:
        """Where the host expects its socket."""
        return Path(self.keywords["labels"][LABEL_DIRECTORY]) / "host.sock"

    def self_test(self, *failed: str) -> SelfTest:
        """Return what a sandbox of this make finds out about itself.

        Args:
            *failed: Names of checks that do not hold.
        """
        held = Check(name="user", wanted="its own", found="its own", held=True)
        broken = [Check(name=name, wanted="refused", found="possible", held=False) for name in failed]
        limits = Limits(
            memory_bytes=self.keywords["mem_limit"],
            swap_bytes=self.keywords["memswap_limit"] - self.keywords["mem_limit"],
            pids=self.keywords["pids_limit"],
            cpus=self.keywords["nano_cpus"] / 1e9,
        )
        return SelfTest(checks=(held, *broken), limits=limits)

    def answer_health(self, health: Mapping[str, Any]) -> None:
        """Begin to answer every GET with this object."""
        self._server = _HealthServer(str(self.socket_path), json.dumps(health).encode())
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def end(self, exit_code: int, *, oom: bool = False) -> None:
        """Stop running."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
        self.state.update(Status="exited", Running=False, ExitCode=exit_code, OOMKilled=oom)


def healthy(container: FakeContainer) -> None:
    """Run like a sandbox that works."""
    container.log = '{"event": "listening"}\n'
    container.answer_health({"protocol": PROTOCOL_VERSION, "sessions": 0, **container.self_test().to_json()})


class FakeEngine:
    """An engine. One instance stands for one engine, however often it is connected to.

    Args:
        program: What a container does when it is started; ``healthy`` by default.
        image: The only image there is.

    Attributes:
        containers: By id.
        weaknesses: Laid over what it says it can enforce, such as ``{"PidsLimit": False}``.
        failures: By method's name, errors to raise at its next calls, in this order.
        connected: Whether it was used since it was last closed.
        times_connected: How often somebody connected.
    """

    def __init__(self, program: Callable[[FakeContainer], None] = healthy, *, image: str = "fake:1") -> None:
        self.program = program
        self.image = image
        self.containers: dict[str, FakeContainer] = {}
        self.weaknesses: dict[str, bool] = {}
        self.failures: dict[str, list[BaseException]] = {}
        self.connected = False
        self.times_connected = 0

    def connect(self) -> FakeEngine:
        """Return this engine, as ``connect_engine`` would."""
        self._maybe_fail("connect")
        self.times_connected += 1
        return self

    @property
    def url(self) -> str:
        """Where it is said to be."""
        return "unix:///fake/engine.sock"

    def open_exec(self, container_id: str, command: Sequence[str], *, user: str) -> ExecStream:
        """Refuse: there are no programs in these containers."""
        self._maybe_fail("open_exec")
        raise ProviderError(f"OCI runtime exec failed: {command[0]} in {container_id[:12]} as {user}")

    def close(self) -> None:
        """Close the connections; they open again with the next call."""
        self.connected = False

    def create_container(self, **keywords: Any) -> str:
        """Create a container; its name must be free and its image there."""
        self._maybe_fail("create_container")
        if keywords["image"] != self.image:
            raise ImageMissing(f"The image is not there: {keywords['image']}.", help="rlm-sandbox image")
        if any(there.keywords["name"] == keywords["name"] for there in self.containers.values()):
            raise ProviderError(f'Conflict. The container name "/{keywords["name"]}" is already in use')
        container = FakeContainer(keywords)
        self.containers[container.container_id] = container
        self._maybe_fail("created")
        return container.container_id

    def start(self, container_id: str) -> None:
        """Start a container: its program runs before this returns."""
        self._maybe_fail("start")
        container = self._get(container_id)
        container.state.update(Status="running", Running=True)
        self.program(container)

    def inspect(self, container_id: str) -> dict[str, Any]:
        """Return what the tests need of an engine's description."""
        self._maybe_fail("inspect")
        container = self._get(container_id)
        keywords = container.keywords
        return {
            "Id": container.container_id,
            "State": dict(container.state),
            "Args": list(keywords["command"]),
            "Config": {"Labels": keywords["labels"], "Image": keywords["image"]},
            "HostConfig": {"Memory": keywords["mem_limit"]},
        }

    def remove(self, container_id: str, force: bool = True) -> None:
        """Remove a container, running or not; one that is gone is fine."""
        self._maybe_fail("remove")
        with contextlib.suppress(ContainerNotFound):
            container = self._get(container_id)
            container.end(137)
            self.containers.pop(container.container_id, None)

    def list(self, labels: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return the containers with these labels."""
        self._maybe_fail("list")
        return [
            {
                "Id": there.container_id,
                "Labels": there.keywords["labels"],
                "State": there.state["Status"],
                "Image": there.keywords["image"],
            }
            for there in list(self.containers.values())
            if labels.items() <= there.keywords["labels"].items()
        ]

    def info(self) -> dict[str, Any]:
        """Return what the tests need of an engine's description of itself."""
        self._maybe_fail("info")
        return {"MemoryLimit": True, "SwapLimit": True, "PidsLimit": True, "CpuCfsQuota": True, **self.weaknesses}

    def logs(self, container_id: str, tail: int = 200) -> str:
        """Return the last lines that a container wrote."""
        return "".join(self._get(container_id).log.splitlines(keepends=True)[-tail:])

    def follow_logs(self, container_id: str, tail: int = 200) -> Iterator[bytes]:
        """Yield the log in pieces that do not end where lines end, as an engine does."""
        raw = self.logs(container_id, tail).encode()
        for start in range(0, len(raw), 7):
            yield raw[start : start + 7]

    def _get(self, name_or_id: str) -> FakeContainer:
        for there in list(self.containers.values()):
            if name_or_id in (there.container_id, there.keywords["name"]):
                return there
        raise ContainerNotFound(f"no container {name_or_id[:40]}")

    def _maybe_fail(self, method: str) -> None:
        self.connected = True
        if self.failures.get(method):
            raise self.failures[method].pop(0)


class _HealthServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def __init__(self, path: str, body: bytes) -> None:
        super().__init__(path, _HealthHandler)
        self.body = body


class _HealthHandler(http.server.BaseHTTPRequestHandler):
    server: _HealthServer

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        pass
