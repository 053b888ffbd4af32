"""The real apps and the real server on sockets in a temporary folder, in a thread of the test's process."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import gevent

from broker.daemon import Daemon
from broker.logs import Log
from broker.spawner import WorkerSpawner
from broker.supervisor.config import SupervisorConfig
from broker.supervisor_client import SupervisorClient
from broker.testing.fake_worker import FakeSpawner, Script
from broker.testing.plane_client import PlaneClient

_START_LIMIT_S = 30.0


class InProcessBroker:
    """A broker for tests; there is no boundary around its workers.

    Args:
        script: What a scripted worker does, or None for real workers: child processes of the same user.
        settings: Fields of ``SupervisorConfig``, such as ``max_sessions`` or ``linger_s``.

    Attributes:
        host_socket: The host plane.
        guest_socket: The guest plane.
        host: A client of the host plane.
        guest: A client of the guest plane (it is taken for the scripted worker's process).
        daemon: The daemon; use it from its own thread only.
    """

    def __init__(self, script: Script | None = None, **settings: Any) -> None:
        self._script = script
        self._folder = tempfile.TemporaryDirectory(prefix="rlm-broker-", ignore_cleanup_errors=True)
        folder = Path(self._folder.name)
        self.host_socket, self.guest_socket = folder / "host.sock", folder / "guest.sock"
        self.host, self.guest = PlaneClient(self.host_socket), PlaneClient(self.guest_socket)
        self.daemon: Daemon
        self.spawner: WorkerSpawner
        self.log_path = folder / "broker.log"
        self._config = SupervisorConfig(
            **{
                "host_socket": str(self.host_socket),
                "guest_socket": str(self.guest_socket),
                "name": "in-process",
                **settings,
            }
        )
        self._thread = threading.Thread(target=self._serve, name="in-process-broker", daemon=True)
        self._serving = threading.Event()
        self._failure: BaseException | None = None
        self._loop: Any = None
        self._supervisor: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> InProcessBroker:
        self._thread.start()
        if not self._serving.wait(_START_LIMIT_S):
            raise TimeoutError("the broker did not start")
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.host.close()
        self.guest.close()
        self.stop()
        self._folder.cleanup()

    def stop(self) -> None:
        """End the broker and its workers; from then on nobody answers. Idempotent."""
        if self._thread.is_alive():
            with contextlib.suppress(ValueError):  # it was just ending by itself
                self._loop.run_callback_threadsafe(self.daemon.stop)
            self._thread.join(_START_LIMIT_S)
        if self._supervisor is not None:
            self._supervisor.wait(_START_LIMIT_S)

    @property
    def ended(self) -> bool:
        """Whether the broker has ended."""
        return not self._thread.is_alive()

    def wait_ended(self, timeout_s: float) -> bool:
        """Wait for the broker's end; tell whether it came."""
        self._thread.join(timeout_s)
        return self.ended

    def _serve(self) -> None:
        hub = gevent.get_hub()
        self._loop = hub.loop
        try:
            with self.log_path.open("w") as log_file:
                self.spawner = self._make_spawner()
                self.daemon = Daemon(
                    self._config, self.spawner, log=Log(log_file), allowed_host_uids=frozenset({os.geteuid()})
                )
                self.daemon.start()
                self._serving.set()
                self.daemon.serve()
        except BaseException as error:
            self._failure = error
        finally:
            self._serving.set()
            if isinstance(getattr(self, "spawner", None), SupervisorClient):
                self.spawner.close()  # type: ignore[attr-defined]
            hub.destroy(destroy_loop=True)

    def _make_spawner(self) -> WorkerSpawner:
        if self._script is not None:
            return FakeSpawner(self._script, self.guest_socket)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        package_folder = str(Path(__file__).resolve().parents[2])
        search_path = os.pathsep.join(filter(None, (package_folder, os.environ.get("PYTHONPATH"))))
        with theirs:
            self._supervisor = subprocess.Popen(
                [
                    *(sys.executable, "-m", "broker.supervisor"),
                    *("--attached", str(theirs.fileno()), self._config.to_json()),
                ],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": search_path},
            )
        return SupervisorClient(
            ours, guest_uid_base=None, max_slots=self._config.max_sessions, on_gone=lambda: self.daemon.stop()
        )
