"""Another user of the host: played by a container that sees this user's folders, under a uid of its own."""

from __future__ import annotations

import json
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from host_client.errors import SandboxError
from host_client.providers.docker import DockerProvider
from host_client.runtime_dir import RuntimeDir
from host_client.settings import SandboxSettings
from tests.adversarial.arena import LIMITS
from tests.adversarial.outcomes import PERMISSION

pytestmark = [pytest.mark.docker, pytest.mark.family("local users")]

_OTHER = "65534:65534"
_SCRIPT = """
import errno, json, os, socket
def attempt(action):
    try: action()
    except OSError as error: return errno.errorcode[error.errno]
    return 'worked'
def speak(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect(path)
    sock.sendall(b'POST /v1/sessions HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 2\\r\\n\\r\\n{}')
    answer = sock.recv(65536)
    if b' 403 ' in answer.split(b'\\r\\n')[0] or not answer: raise PermissionError(errno.EPERM, 'refused')
print(json.dumps(ACTION))
"""


class OtherUser:
    """Somebody else on this machine.

    Args:
        image: Where Python is.
        folder: What is shared with everybody, such as ``/run/user`` or ``/tmp``.
    """

    def __init__(self, image: str, folder: Path) -> None:
        self._client = docker.from_env()
        self._image, self._folder = image, folder

    def does(self, expression: str) -> object:
        """Evaluate an expression as that user; the folder is ``/host``."""
        output = self._client.containers.run(
            self._image,
            ["-c", _SCRIPT.replace("ACTION", expression)],
            entrypoint="python3",
            user=_OTHER,
            network_mode="none",
            remove=True,
            volumes={str(self._folder): {"bind": "/host", "mode": "rw"}},
        )
        return json.loads(output)

    def close(self) -> None:
        """Close the connection to the engine."""
        self._client.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that everybody may enter, like /tmp."""
    # Not pytest's: a socket's path must be short.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o1777)
        yield Path(name)


@pytest.fixture
def other(image: str, folder: Path) -> Iterator[OtherUser]:
    made = OtherUser(image, folder)
    yield made
    made.does("__import__('shutil').rmtree('/host/mine', True)")  # what is theirs is not ours to remove
    made.close()


@pytest.fixture
def sandbox(image: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A sandbox whose runtime directory is in that folder; the path of its socket, as the other user sees it."""
    monkeypatch.setenv("RLM_SANDBOX_RUNTIME_DIR", str(folder / "mine"))
    provider = DockerProvider()
    handle = provider.start(SandboxSettings(image=image, **LIMITS))
    yield Path("/host") / handle.socket_path.relative_to(folder)
    provider.stop(handle)


@pytest.mark.parametrize(
    "action",
    [
        "attempt(lambda: os.listdir('/host/mine'))",
        "attempt(lambda: os.listdir(os.path.dirname('SOCKET')))",
        "attempt(lambda: speak('SOCKET'))",
        "attempt(lambda: os.unlink('SOCKET'))",
        "attempt(lambda: os.symlink('/tmp', '/host/mine/link'))",
        "attempt(lambda: open('/host/mine/lock', 'r+'))",
        "attempt(lambda: os.rename('/host/mine', '/host/theirs'))",
    ],
)
def test_another_user_is_denied(action: str, other: OtherUser, sandbox: Path) -> None:
    assert other.does(action.replace("SOCKET", str(sandbox))) in PERMISSION


def test_where_the_folders_stand_open_the_peers_uid_is_refused(other: OtherUser, sandbox: Path, folder: Path) -> None:
    socket_path = folder / sandbox.relative_to("/host")
    for path in (socket_path, *[parent for parent in socket_path.parents if parent.is_relative_to(folder / "mine")]):
        path.chmod(0o777)
    assert other.does(f"attempt(lambda: speak({str(sandbox)!r}))") == "EPERM"


@pytest.mark.weakened
def test_with_open_folders_and_no_check_of_the_peer_it_would_be_reached(other: OtherUser, folder: Path) -> None:
    """The same words reach a socket that checks nobody: what denies above is ours, not the container's."""
    path = folder / "open.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o777)
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        assert other.does("attempt(lambda: speak('/host/open.sock'))") == "worked"
        thread.join()


@pytest.mark.parametrize(
    "squat",
    [
        "os.mkdir('/host/mine')",
        "[os.mkdir('/host/mine'), os.chmod('/host/mine', 0o777)] and None",
        "os.symlink('/host/theirs', '/host/mine')",
        "open('/host/mine', 'w').close()",
        "os.mkfifo('/host/mine')",
    ],
)
def test_a_runtime_directory_that_somebody_else_made_is_refused(
    squat: str, other: OtherUser, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other.does(squat)
    monkeypatch.setenv("RLM_SANDBOX_RUNTIME_DIR", str(folder / "mine"))
    with pytest.raises(SandboxError) as refused:
        RuntimeDir.open()
    assert str(folder / "mine") in str(refused.value)


def test_a_runtime_directory_that_others_may_write_is_refused_or_closed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = folder / "mine"
    mine.mkdir()
    mine.chmod(0o770)
    monkeypatch.setenv("RLM_SANDBOX_RUNTIME_DIR", str(mine))
    assert _is_refused() or stat.S_IMODE(mine.stat().st_mode) == 0o700


def _is_refused() -> bool:
    try:
        RuntimeDir.open()
    except SandboxError:
        return True
    return False


def test_no_port_is_listened_on(sandbox: Path) -> None:
    client = docker.from_env()
    listed = client.containers.list(filters={"label": "rlm-sandbox"})
    ports = [container.ports for container in listed]
    client.close()
    assert ports
    assert not any(ports)
