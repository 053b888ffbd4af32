"""Find the container engine; on Debian and Ubuntu, as root, install and start it where there is none."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from host_client.errors import EngineUnavailable, SetupError
from host_client.machine import Machine, Progress, apt_install, failure, tail
from host_client.providers.docker_engine import DEFAULT_SOCKET, DockerEngine, engine_url

# iptables is only recommended by docker.io, yet the engine does not start without it.
ENGINE_PACKAGES = ("docker.io", "iptables")
# The engine's first start makes its storage; on a slow disk this takes a while.
START_TIMEOUT_S = 60.0
# What a service manager gets before the engine is started by hand.
_SERVICE_TIMEOUT_S = 15.0
_POLL_S = 0.2
_LOG = Path("/var/log/rlm-sandbox-dockerd.log")

Connect = Callable[[], DockerEngine]


def connect_engine() -> DockerEngine:
    """Return the engine that answers; never installs or starts anything.

    Raises:
        EngineUnavailable: None answers; the help is the command for this machine.
        EnginePermission: One is there, but this user may not use it.
    """
    try:
        return DockerEngine.connect()
    except EngineUnavailable as error:
        if type(error) is EngineUnavailable:
            raise EngineUnavailable(error.message, help=_advice(Machine())) from error
        raise


def ensure_engine(
    progress: Progress,
    *,
    machine: Machine | None = None,
    connect: Connect = DockerEngine.connect,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> DockerEngine:
    """Return an engine that answers, installing and starting one where this user may.

    Args:
        progress: Told in one line what is done, before it is done.
        machine: What is installed on and started on.
        connect: Returns the engine or raises ``EngineUnavailable``.
        clock: Seconds, monotonic.
        sleep: Waits between two attempts to connect.

    Raises:
        EngineUnavailable: None answers and none could be started; the help is the command for this machine.
        EnginePermission: One is there, but this user may not use it.
    """
    machine = machine or Machine()
    try:
        return connect()
    except EngineUnavailable as error:
        if type(error) is not EngineUnavailable:
            raise
        if not _may_start(machine):
            raise EngineUnavailable(error.message, help=_advice(machine)) from error
    return _Starter(machine, progress, connect, clock, sleep).start()


class _Starter:
    """Brings up the engine of this machine: install it, ask the service manager, else start it by hand."""

    def __init__(
        self,
        machine: Machine,
        progress: Progress,
        connect: Connect,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self._machine = machine
        self._progress = progress
        self._connect = connect
        self._clock = clock
        self._sleep = sleep

    def start(self) -> DockerEngine:
        if self._machine.which("dockerd") is None:
            self._progress(f"no Docker engine here: installing {' and '.join(ENGINE_PACKAGES)} with apt-get (a minute)")
            apt_install(self._machine, ENGINE_PACKAGES)
            # Newer releases keep the command in a package of its own; only `devsh` needs it, so it may fail.
            with contextlib.suppress(SetupError):
                if self._machine.which("docker") is None:
                    apt_install(self._machine, ("docker-cli",))
        else:
            self._progress("the Docker engine does not run: starting it")
        return self._by_service() or self._by_hand()

    def _by_service(self) -> DockerEngine | None:
        command = ["systemctl", "start", "docker"] if self._machine.has_systemd() else ["service", "docker", "start"]
        if self._machine.which(command[0]) is None:
            return None
        status, _ = self._machine.run(command, timeout_s=START_TIMEOUT_S)
        if status != 0:
            return None
        # systemd says "started" only when it is; a SysV script says so at once.
        return self._wait(START_TIMEOUT_S if self._machine.has_systemd() else _SERVICE_TIMEOUT_S, lambda: True)

    def _by_hand(self) -> DockerEngine:
        dockerd = self._machine.which("dockerd") or "dockerd"
        engine = self._spawn([dockerd, "--log-level=warn"])
        if engine is None:
            # Some machines have no packet filter; our containers have no network and do not need it.
            self._progress("the Docker engine did not start: trying it without a network bridge")
            engine = self._spawn([dockerd, "--log-level=warn", "--iptables=false", "--bridge=none"])
        if engine is None:
            log = ""
            with contextlib.suppress(OSError):
                log = _LOG.read_text("utf-8", "replace")
            raise failure(
                f"The Docker engine was started but does not answer. The end of {_LOG}",
                tail(log),
                error=EngineUnavailable,
                help="See why, by hand: dockerd --debug",
            )
        return engine

    def _spawn(self, argv: Sequence[str]) -> DockerEngine | None:
        process = self._machine.start_daemon(argv, log=_LOG)
        return self._wait(START_TIMEOUT_S, lambda: process.poll() is None)

    def _wait(self, timeout_s: float, alive: Callable[[], bool]) -> DockerEngine | None:
        """Return the engine as soon as it answers; None when the time is over or it has ended."""
        deadline = self._clock() + timeout_s
        while True:
            was_alive = alive()
            with contextlib.suppress(EngineUnavailable):
                return self._connect()
            if not was_alive or self._clock() >= deadline:
                return None
            self._sleep(_POLL_S)


def _may_start(machine: Machine) -> bool:
    # An engine that the user names elsewhere is theirs to start; another one here would not be what they meant.
    return engine_url() == DEFAULT_SOCKET and machine.is_root() and machine.is_debian()


def _advice(machine: Machine) -> str:
    """Return the command that brings an engine up on this machine."""
    if engine_url().startswith("ssh://"):
        return (
            "Forward its socket: ssh -NL /path/of/yours.sock:/var/run/docker.sock user@host   "
            "and DOCKER_HOST=unix:///path/of/yours.sock"
        )
    if engine_url() != DEFAULT_SOCKET:
        return "That address comes from DOCKER_HOST or `docker context`; start that engine, or: unset DOCKER_HOST"
    if machine.is_macos():
        return "Start Docker Desktop: open -a Docker"
    sudo = "" if machine.is_root() else "sudo "
    if machine.which("dockerd") is not None:
        return f"{sudo}systemctl start docker   (without systemd: {sudo}service docker start)"
    if machine.is_debian():
        return f"{sudo}apt-get install -y {' '.join(ENGINE_PACKAGES)} && {sudo}service docker start"
    return "Install Docker Engine 20.10 or newer with your system's package manager, and start it"
