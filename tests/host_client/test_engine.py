"""Claims about finding, installing and starting the engine, and about the wrapper's errors."""

from __future__ import annotations

import errno
import socketserver
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import docker
import docker.errors
import pytest
import requests

from host_client import engine as engine_module
from host_client.engine import ensure_engine
from host_client.errors import (
    DiskFull,
    EnginePermission,
    EngineUnavailable,
    ImageBuildFailed,
    ImageMissing,
    ProviderError,
    SetupError,
)
from host_client.machine import Machine, apt_install, failure
from host_client.providers import docker_engine
from host_client.providers.docker_engine import ContainerNotFound, DockerEngine, EngineTooOld, engine_url


class FakeMachine(Machine):
    """A machine that only records what is done to it."""

    def __init__(
        self,
        *,
        root: bool = True,
        debian: bool = True,
        macos: bool = False,
        systemd: bool = False,
        programs: Sequence[str] = (),
        status: Callable[[Sequence[str]], int] = lambda _: 0,
        daemon_lives: bool = True,
    ) -> None:
        self.root, self.debian, self.macos, self.systemd = root, debian, macos, systemd
        self.programs = list(programs)
        self.status = status
        self.daemon_lives = daemon_lives
        self.ran: list[list[str]] = []
        self.daemons: list[list[str]] = []

    def is_root(self) -> bool:
        return self.root

    def is_debian(self) -> bool:
        return self.debian

    def is_macos(self) -> bool:
        return self.macos

    def has_systemd(self) -> bool:
        return self.systemd

    def which(self, program: str) -> str | None:
        return f"/usr/sbin/{program}" if program in self.programs else None

    def run(self, argv: Sequence[str], *, timeout_s: float) -> tuple[int, str]:
        self.ran.append(list(argv))
        status = self.status(argv)
        if "docker.io" in argv and status == 0:
            self.programs.append("dockerd")
        return status, "E: the end of the output"

    def start_daemon(self, argv: Sequence[str], *, log: Path) -> Any:
        self.daemons.append(list(argv))
        return SimpleNamespace(poll=lambda: None if self.daemon_lives else 1)


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


ENGINE: Any = SimpleNamespace(url="unix:///fake")


def answers_once(ready: Callable[[], bool]) -> Callable[[], DockerEngine]:
    """Return a ``connect`` that fails until something has happened."""

    def connect() -> DockerEngine:
        if not ready():
            raise EngineUnavailable("No Docker engine answers at unix:///fake.")
        engine: DockerEngine = ENGINE
        return engine

    return connect


@pytest.fixture(autouse=True)
def default_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setattr(engine_module, "engine_url", lambda: docker_engine.DEFAULT_SOCKET)


def ensure(machine: FakeMachine, ready: Callable[[], bool], said: list[str] | None = None) -> DockerEngine:
    clock = Clock()
    lines = said if said is not None else []
    return ensure_engine(lines.append, machine=machine, connect=answers_once(ready), clock=clock, sleep=clock.sleep)


def test_an_engine_that_answers_is_used_and_nothing_is_touched() -> None:
    machine, said = FakeMachine(), list[str]()
    assert ensure(machine, lambda: True, said) is ENGINE
    assert (machine.ran, machine.daemons, said) == ([], [], [])


def test_root_on_debian_gets_an_engine_installed_and_started_and_is_told_before() -> None:
    machine, said = FakeMachine(programs=["service"]), list[str]()
    assert ensure(machine, lambda: ["service", "docker", "start"] in machine.ran, said) is ENGINE
    assert machine.ran[0][:2] == ["apt-get", "install"]
    assert machine.ran[0][-2:] == ["docker.io", "iptables"]
    assert len(said) == 1
    assert "installing docker.io" in said[0]


def test_a_release_without_a_package_for_the_command_gets_its_engine_all_the_same() -> None:
    machine = FakeMachine(status=lambda argv: 100 if "docker-cli" in argv else 0)
    assert ensure(machine, lambda: bool(machine.daemons)) is ENGINE


def test_an_installed_engine_is_only_started() -> None:
    machine = FakeMachine(programs=["dockerd", "systemctl"], systemd=True)
    ensure(machine, lambda: bool(machine.ran))
    assert machine.ran == [["systemctl", "start", "docker"]]


def test_without_a_service_manager_the_daemon_is_started_by_hand() -> None:
    machine = FakeMachine(programs=["dockerd"])
    ensure(machine, lambda: bool(machine.daemons))
    assert machine.daemons == [["/usr/sbin/dockerd", "--log-level=warn"]]


def test_a_service_that_says_started_but_is_silent_does_not_end_the_attempt() -> None:
    machine = FakeMachine(programs=["dockerd", "service"])
    ensure(machine, lambda: bool(machine.daemons))
    assert machine.ran == [["service", "docker", "start"]]


def test_a_machine_without_packet_filter_gets_an_engine_without_bridge() -> None:
    machine = FakeMachine(programs=["dockerd"], daemon_lives=False)
    ensure(machine, lambda: len(machine.daemons) == 2)
    assert "--iptables=false" in machine.daemons[1]


def test_a_daemon_that_never_answers_is_given_up_within_its_time() -> None:
    machine = FakeMachine(programs=["dockerd"])
    with pytest.raises(EngineUnavailable, match="does not answer") as caught:
        ensure(machine, lambda: False)
    assert "dockerd --debug" in str(caught.value)


def test_a_plain_user_gets_the_exact_command_and_nothing_runs() -> None:
    machine = FakeMachine(root=False)
    with pytest.raises(EngineUnavailable) as caught:
        ensure(machine, lambda: False)
    assert caught.value.help is not None
    assert caught.value.help.startswith("sudo apt-get install -y docker.io")
    assert machine.ran == []


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (FakeMachine(root=False, programs=["dockerd"]), "sudo systemctl start docker"),
        (FakeMachine(root=False, debian=False, macos=True), "open -a Docker"),
        (FakeMachine(debian=False), "package manager"),
    ],
)
def test_each_machine_gets_the_command_that_helps_there(machine: FakeMachine, words: str) -> None:
    with pytest.raises(EngineUnavailable, match=words):
        ensure(machine, lambda: False)


def test_an_engine_that_the_user_named_elsewhere_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "engine_url", lambda: "tcp://elsewhere:2375")
    machine = FakeMachine()
    with pytest.raises(EngineUnavailable, match="unset DOCKER_HOST"):
        ensure(machine, lambda: False)
    assert machine.ran == []


def test_an_engine_behind_ssh_is_told_how_to_forward_its_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "engine_url", lambda: "ssh://me@elsewhere")
    with pytest.raises(EngineUnavailable, match="ssh -NL"):
        ensure(FakeMachine(), lambda: False)


@pytest.mark.parametrize("error", [EnginePermission("no"), EngineTooOld("old")])
def test_an_engine_that_is_there_but_unusable_is_never_installed_over(error: Exception) -> None:
    def connect() -> DockerEngine:
        raise error

    machine = FakeMachine()
    with pytest.raises(type(error)):
        ensure_engine(print, machine=machine, connect=connect)
    assert machine.ran == []


def test_stale_package_lists_are_refreshed_and_the_install_is_tried_again() -> None:
    machine = FakeMachine(status=lambda argv: 100 if "install" in argv else 0)
    with pytest.raises(SetupError, match=r"could not install docker\.io"):
        apt_install(machine, ["docker.io"])
    assert [argv[1] for argv in machine.ran] == ["install", "update", "install"]


def test_a_full_disk_is_named_as_such() -> None:
    assert isinstance(failure("pip", "OSError: [Errno 28] No space left on device"), DiskFull)


def test_a_failed_program_shows_the_end_of_its_output() -> None:
    error = failure("it failed", "\n".join(f"line {n}" for n in range(100)))
    assert "line 99" in str(error)
    assert "line 50" not in str(error)


def test_a_real_program_runs_without_input_and_gives_status_and_output() -> None:
    status, output = Machine().run(["sh", "-c", "cat; echo out; echo err >&2; exit 3"], timeout_s=10)
    assert (status, output.split()) == (3, ["out", "err"])
    assert Machine().run(["/no/such/program"], timeout_s=1)[0] == 127


def test_a_daemon_s_log_keeps_its_beginning_and_is_bounded(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = Machine().start_daemon(["sh", "-c", "echo first; head -c 3000000 /dev/zero; echo last"], log=log)
    assert process.wait(timeout=20) == 0
    assert log.read_bytes().startswith(b"first")
    assert log.stat().st_size == 1 << 20


# The wrapper.


class FakeClient:
    """An API client of which every method fails in the same way."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any, **__: Any) -> Any:
            raise self.error

        return call


def api_error(status: int, text: str) -> Exception:
    response = requests.Response()
    response.status_code = status
    kind = docker.errors.NotFound if status == 404 else docker.errors.APIError
    return kind(text, response=response, explanation=text)


def failing(error: Exception) -> DockerEngine:
    client: Any = FakeClient(error)
    return DockerEngine(client)


def test_a_container_that_is_gone_has_its_own_error() -> None:
    with pytest.raises(ContainerNotFound):
        failing(api_error(404, "No such container: x")).inspect("x")


def test_a_missing_image_is_told_apart_from_a_missing_container() -> None:
    with pytest.raises(ImageMissing, match="rlm-sandbox image"):
        failing(api_error(404, "No such image: x")).start("x")


@pytest.mark.parametrize("status", [404, 409])
def test_removing_and_killing_what_is_gone_or_going_is_fine(status: int) -> None:
    failing(api_error(status, "removal of container x is already in progress")).kill("x")
    if status == 404:
        failing(api_error(status, "no such container")).remove("x")


def test_a_removal_by_somebody_else_is_waited_for() -> None:
    waited: list[Any] = []

    class BeingRemoved(FakeClient):
        def wait(self, container_id: str, **keywords: Any) -> None:
            waited.append((container_id, keywords["condition"]))

    client: Any = BeingRemoved(api_error(409, "removal of container x is already in progress"))
    DockerEngine(client).remove("x")
    assert waited == [("x", "removed")]


def test_a_full_disk_of_the_engine_is_named_as_such() -> None:
    with pytest.raises(DiskFull, match="docker system"):
        failing(api_error(500, "write /x: no space left on device")).start("x")


def test_what_the_engine_refuses_is_a_provider_error_with_its_words() -> None:
    with pytest.raises(ProviderError, match="unknown runtime"):
        failing(api_error(400, "unknown runtime specified runsc")).start("x")


def test_an_engine_that_stops_answering_is_unavailable() -> None:
    engine = failing(requests.ReadTimeout("too long"))
    with pytest.raises(EngineUnavailable, match="stopped answering"):
        engine.list({})
    assert not engine.ping()
    assert not engine.registry_has("x:1", 1.0)


def test_an_error_in_the_build_s_stream_is_a_failed_build() -> None:
    events = [{"stream": "Step 1\n"}, {"error": "The command returned a non-zero code: 1"}]
    client: Any = SimpleNamespace(build=lambda **_: iter(events))
    lines = DockerEngine(client).build(None, tag="t:1", buildargs={})  # type: ignore[arg-type]
    assert next(lines) == "Step 1"
    with pytest.raises(ImageBuildFailed, match="non-zero"):
        next(lines)


def test_a_container_never_inherits_the_user_s_proxy_settings() -> None:
    seen: dict[str, Any] = {}
    client: Any = SimpleNamespace(
        create_host_config=lambda **keywords: {"given": keywords},
        create_container=lambda **keywords: seen.update(keywords) or {"Id": "abc"},
    )
    engine = DockerEngine(client)
    assert engine.create_container(image="i", read_only=True, host_config={"CgroupnsMode": "private"}) == "abc"
    assert seen["use_config_proxy"] is False
    assert seen["host_config"] == {"given": {"read_only": True}, "CgroupnsMode": "private"}


def test_a_socket_that_this_user_may_not_use_names_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        try:
            raise requests.ConnectionError("aborted", PermissionError(errno.EACCES, "Permission denied"))
        except requests.ConnectionError as error:
            raise docker.errors.DockerException("Error while fetching server API version") from error

    monkeypatch.setattr(docker, "APIClient", refuse)
    with pytest.raises(EnginePermission, match="usermod -aG docker"):
        DockerEngine.connect()


def test_an_address_where_nothing_listens_is_no_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(EngineUnavailable, match=r"none\.sock"):
        DockerEngine.connect()
    assert engine_url().endswith("none.sock")


class OldEngine(BaseHTTPRequestHandler):
    """An engine of 2018."""

    def do_GET(self) -> None:
        body = b'{"ApiVersion": "1.38", "MinAPIVersion": "1.12", "Version": "18.06"}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def old_engine(tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "old.sock")
    with socketserver.UnixStreamServer(path, OldEngine) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"unix://{path}"
        server.shutdown()
        thread.join()


def test_an_engine_that_is_too_old_is_named_with_its_version(old_engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", old_engine)
    with pytest.raises(EngineTooOld, match=r"1\.38"):
        DockerEngine.connect()


@pytest.mark.docker
def test_the_real_engine_answers_and_its_errors_are_ours() -> None:
    try:
        connected = DockerEngine.connect()
    except EngineUnavailable as error:
        pytest.skip(str(error))
    with connected as engine:
        assert engine.ping()
        assert engine.version()["Arch"]
        assert engine.list({"rlm-sandbox.no-such-label": ""}) == []
        assert engine.images("rlm-sandbox-no-such-repository") == []
        with pytest.raises(ContainerNotFound):
            engine.inspect("rlm-sandbox-no-such-container")
        with pytest.raises(ImageMissing):
            engine.create_container(image="rlm-sandbox-no-such-image:1")
