"""The container engine, behind a thin typed wrapper: the only module that imports the Docker SDK.

Everything that goes wrong in the SDK, or in the HTTP client under it, leaves here as an error of
``host_client.errors``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, cast

import docker
import docker.errors
import docker.utils
from docker.context import ContextAPI

from host_client.errors import (
    DiskFull,
    EnginePermission,
    EngineUnavailable,
    ImageBuildFailed,
    ImageMissing,
    ProviderError,
    SandboxError,
)
from host_client.providers.exec_stream import ExecStream

# An engine that answers does so in milliseconds; set-up must name a dead one within 10 s.
CONNECT_TIMEOUT_S = 5.0
# Creating and starting a container takes under a second; a busy disk may need many.
CALL_TIMEOUT_S = 60
#: How long a removal by somebody else is waited for.
_REMOVAL_S = 10
_CONFLICT = 409
# A build step or an import is silent while it works.
BUILD_TIMEOUT_S = 900
# 20.10: private cgroup namespaces, and a seccomp filter that can be handed in.
MIN_API_VERSION = (1, 41)
#: For asking which version an engine speaks, when it matters to nobody.
_ANY = "1.41"

_IS_IT_RUNNING = "Is it running? Try: docker info"
DEFAULT_SOCKET = "unix:///var/run/docker.sock"

# Keywords of the SDK that describe the container itself; the rest belongs to its host configuration.
# fmt: off
_CONTAINER_KEYWORDS = frozenset((
    "command", "detach", "domainname", "entrypoint", "environment", "healthcheck", "hostname", "image", "labels",
    "mac_address", "name", "network_disabled", "networking_config", "platform", "stdin_open", "stop_signal",
    "stop_timeout", "tty", "use_config_proxy", "user", "volumes", "working_dir",
))
# fmt: on


class EngineTooOld(EngineUnavailable):
    """An engine answers, but lacks what the isolation needs."""

    code = "engine_too_old"


class ContainerNotFound(ProviderError):
    """No container has that id or name."""

    code = "container_not_found"


def engine_url() -> str:
    """Return where the engine is expected: ``DOCKER_HOST``, else the current ``docker context``, else the default."""
    if host := os.environ.get("DOCKER_HOST"):
        return host
    # The context file is the user's own; one that cannot be read must not keep us from the default socket.
    with contextlib.suppress(docker.errors.DockerException, OSError, ValueError, KeyError, AttributeError):
        context = ContextAPI.get_current_context()
        if context is not None and context.name != "default" and context.Host:
            return str(context.Host)
    return DEFAULT_SOCKET


class DockerEngine:
    """One engine, reached over its API.

    Args:
        quick: Client for calls that answer at once.
        patient: Client for builds and imports, which are silent while they work; ``quick`` if not given.
        url: Where it was found, for messages.
    """

    def __init__(self, quick: docker.APIClient, patient: docker.APIClient | None = None, *, url: str = "") -> None:
        self._quick = quick
        self._patient = patient if patient is not None else quick
        self._url = url

    @classmethod
    def connect(cls, timeout_s: float = CONNECT_TIMEOUT_S) -> DockerEngine:
        """Return the engine that answers at ``engine_url()``.

        Raises:
            EngineUnavailable: None answers within the time.
            EnginePermission: One is there, but this user may not use its socket.
            EngineTooOld: It lacks what the isolation needs.
        """
        url = engine_url()
        with _errors_of_connecting(url):
            options: dict[str, Any] = {"base_url": url, "tls": _tls()}
            version = _spoken_version(docker.APIClient(version=_ANY, timeout=max(1, int(timeout_s)), **options))
            _require_version(version, url)
            quick = docker.APIClient(version=version, timeout=CALL_TIMEOUT_S, **options)
            patient = docker.APIClient(version=version, timeout=BUILD_TIMEOUT_S, **options)
        return cls(quick, patient, url=url)

    @property
    def url(self) -> str:
        """Where it was found."""
        return self._url

    def close(self) -> None:
        """Close the connections; the engine and its containers go on."""
        self._quick.close()
        self._patient.close()

    def __enter__(self) -> DockerEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ping(self) -> bool:
        """Say whether the engine still answers."""
        try:
            return bool(self._quick.ping())
        except Exception:  # any failure, of whatever layer, is the answer "no"
            return False

    def version(self) -> dict[str, Any]:
        """Return the engine's own description, such as ``Version``, ``Arch`` and ``Os``."""
        with _errors("asking the engine for its version"):
            return dict(self._quick.version())

    def info(self) -> dict[str, Any]:
        """Return the engine's state: runtimes, security options, cgroup version and so on."""
        with _errors("asking the engine for its state"):
            return dict(self._quick.info())

    # Images.

    def image_exists(self, tag: str) -> bool:
        """Say whether the engine has this image."""
        try:
            self.inspect_image(tag)
        except ImageMissing:
            return False
        return True

    def inspect_image(self, tag: str) -> dict[str, Any]:
        """Return the engine's description of an image.

        Raises:
            ImageMissing: It is not there.
        """
        with _errors(f"looking for image {tag}"):
            return dict(cast("Any", self._quick).inspect_image(tag))

    def images(self, repository: str) -> list[str]:
        """Return the tags that the engine has of one repository, newest first."""
        with _errors(f"listing images of {repository}"):
            found = self._quick.images(name=repository)
        found = sorted(found, key=lambda image: image.get("Created", 0), reverse=True)
        return [tag for image in found for tag in image.get("RepoTags") or [] if tag.startswith(repository + ":")]

    def registry_has(self, tag: str, timeout_s: float) -> bool:
        """Say whether the engine can reach a registry that has this image, within the time.

        The engine asks, not this process: it may sit behind another proxy or mirror.
        """
        # The SDK's own call cannot be given a time-out of its own, and a registry that drops packets takes a minute.
        client = cast("Any", self._quick)
        try:
            reply = client.get(client._url("/distribution/{0}/json", tag), timeout=timeout_s)
        except Exception:  # unreachable in whatever way: the answer is "no"
            return False
        return bool(reply.status_code == 200)

    def pull(self, tag: str) -> Iterator[str]:
        """Pull an image, yielding the engine's status lines."""
        repository, _, version = tag.rpartition(":")
        with _errors(f"pulling {tag}", otherwise=ImageBuildFailed):
            yield from _lines(self._patient.pull(repository, tag=version, stream=True, decode=True))

    def build(self, context: IO[bytes], *, tag: str, buildargs: Mapping[str, str]) -> Iterator[str]:
        """Build an image from a tar archive, without network, yielding the log's lines.

        Raises:
            ImageBuildFailed: A step failed; the message holds the reason.
            DiskFull: No space left where the engine keeps images.
        """
        with _errors(f"building {tag}", otherwise=ImageBuildFailed):
            yield from _lines(
                self._patient.build(
                    fileobj=context,
                    custom_context=True,
                    tag=tag,
                    buildargs=dict(buildargs),
                    network_mode="none",
                    rm=True,
                    forcerm=True,
                    decode=True,
                )
            )

    def import_image(self, tarball: IO[bytes], *, tag: str, changes: Iterable[str] = ()) -> None:
        """Make an image from the tar archive of a root file system."""
        repository, _, version = tag.rpartition(":")
        with _errors(f"importing {tag}", otherwise=ImageBuildFailed):
            reply = self._patient.import_image_from_stream(
                tarball, repository=repository, tag=version, changes=list(changes)
            )
            for _ in _lines(json.loads(line) for line in str(reply).splitlines() if line.strip()):
                pass  # only an error among them matters

    def tag_image(self, source: str, tag: str) -> None:
        """Give an image one more name."""
        repository, _, version = tag.rpartition(":")
        with _errors(f"tagging {source} as {tag}"):
            self._quick.tag(source, repository, version)

    def remove_image(self, tag: str, force: bool = True) -> None:
        """Remove an image; one that is not there is fine.

        Raises:
            ProviderError: A container uses it, and ``force`` is off.
        """
        with contextlib.suppress(ImageMissing), _errors(f"removing image {tag}"):
            self._quick.remove_image(tag, force=force)

    # Containers.

    def create_container(self, **keywords: Any) -> str:
        """Create a container and return its id.

        Args:
            **keywords: As for ``containers.create`` of the Docker SDK: ``image``, ``command``, ``labels``, ``user``,
                ``network_mode``, ``read_only``, ``cap_drop``, ``security_opt``, ``tmpfs`` and so on. A
                ``host_config`` in the API's own spelling (``{"CgroupnsMode": "private"}``) is laid over them.

        Raises:
            ImageMissing: The image is not there.
            ProviderError: The engine refused.
        """
        own = {name: value for name, value in keywords.items() if name in _CONTAINER_KEYWORDS}
        host = {name: value for name, value in keywords.items() if name not in _CONTAINER_KEYWORDS}
        overlay: Mapping[str, Any] = host.pop("host_config", None) or {}
        # The SDK would copy the user's proxy settings, credentials included, into the container.
        own.setdefault("use_config_proxy", False)
        with _errors(f"creating a container from {keywords.get('image')}"):
            host_config = {**self._quick.create_host_config(**host), **overlay}
            reply = self._quick.create_container(host_config=cast("Any", host_config), **own)
        return str(reply["Id"])

    def start(self, container_id: str) -> None:
        """Start a container; one that runs already is fine."""
        with _errors(f"starting container {container_id[:12]}"):
            self._quick.start(container_id)

    def inspect(self, container_id: str) -> dict[str, Any]:
        """Return the engine's description of a container.

        Raises:
            ContainerNotFound: It is gone.
        """
        with _errors(f"inspecting container {container_id[:12]}"):
            return dict(self._quick.inspect_container(container_id))

    def kill(self, container_id: str, signal: str = "KILL") -> None:
        """Send a signal to a container; one that is gone or has stopped is fine."""
        with contextlib.suppress(ContainerNotFound), _errors(f"killing container {container_id[:12]}", fine={409}):
            self._quick.kill(container_id, signal=signal)

    def remove(self, container_id: str, force: bool = True) -> None:
        """Remove a container, and return once it is gone; one that is gone already is fine."""
        with contextlib.suppress(ContainerNotFound), _errors(f"removing container {container_id[:12]}"):
            try:
                self._quick.remove_container(container_id, v=True, force=force)
            except docker.errors.APIError as error:
                if error.response is None or error.response.status_code != _CONFLICT:
                    raise
                # Somebody else is removing it; what it holds may be given to others only after that.
                self._quick.wait(container_id, condition="removed", timeout=_REMOVAL_S)

    def list(self, labels: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return all containers, running or not, with these labels; an empty value stands for any value."""
        wanted = [f"{name}={value}" if value else name for name, value in labels.items()]
        with _errors("listing containers"):
            return [dict(found) for found in self._quick.containers(all=True, filters={"label": wanted})]

    def logs(self, container_id: str, tail: int = 200) -> str:
        """Return the last lines that a container wrote; bytes that are not text are replaced."""
        with _errors(f"reading the logs of container {container_id[:12]}"):
            raw = self._quick.logs(container_id, stdout=True, stderr=True, tail=tail)
        return bytes(raw).decode("utf-8", "replace")

    def open_exec(self, container_id: str, command: Sequence[str], *, user: str) -> ExecStream:
        """Start a program in a running container, and return what leads to its input and output.

        Args:
            container_id: Where.
            command: The program.
            user: Its uid and gid, such as ``1000:1000``.

        Raises:
            ContainerNotFound: It is gone.
            ProviderError: It does not run, or the engine refused.
        """
        client = cast("Any", self._quick)
        with _errors(f"starting {command[0]} in container {container_id[:12]}"):
            made = client.exec_create(container_id, list(command), stdin=True, user=user)
            # The SDK's own exec_start loses what the engine sends together with the head of its reply.
            url = client._url("/exec/{0}/start", made["Id"])
            headers = {"Connection": "Upgrade", "Upgrade": "tcp"}
            reply = client._post_json(url, headers=headers, data={"Tty": False, "Detach": False}, stream=True)
            client._raise_for_status(reply)
            return _hijacked(reply)

    def follow_logs(self, container_id: str, tail: int = 200) -> Iterator[bytes]:
        """Yield what a container writes until it ends."""
        with _errors(f"following the logs of container {container_id[:12]}"):
            stream = self._patient.logs(container_id, stdout=True, stderr=True, tail=tail, stream=True, follow=True)
            yield from cast("Iterator[bytes]", stream)


def _hijacked(reply: Any) -> ExecStream:
    """Return the connection that a reply came on, whose bytes are the program's from here on."""
    buffered = getattr(reply.raw._fp, "fp", None)
    connection = getattr(getattr(buffered, "raw", None), "_sock", None)
    if buffered is None or connection is None:  # SSH and named pipes of Windows
        raise ProviderError(
            "this engine's connection cannot carry a program's input and output",
            help="give it a socket: ssh -NL /path/of/yours.sock:/var/run/docker.sock user@host   "
            "and DOCKER_HOST=unix:///path/of/yours.sock",
        )
    connection.setblocking(False)
    # Without waiting: it returns what the reader of the reply's head has taken beyond that.
    early = buffered.read1(1 << 16) or b""
    return ExecStream(connection, early, reply.close)


def _tls() -> Any:
    """Return the TLS settings of ``DOCKER_CERT_PATH`` and ``DOCKER_TLS_VERIFY``, or False."""
    return docker.utils.kwargs_from_env().get("tls", False)


def _spoken_version(client: docker.APIClient) -> str:
    """Return the API version that an engine speaks, asked in the one way that takes it no time to answer."""
    with contextlib.closing(client):
        raw = cast("Any", client)
        reply = raw.get(raw._url("/_ping", versioned_api=False))
        reply.raise_for_status()
        return str(reply.headers.get("API-Version") or client.version(api_version=False)["ApiVersion"])


def _require_version(version: str, url: str) -> None:
    found = tuple(int(part) for part in version.split("."))
    if found < MIN_API_VERSION:
        raise EngineTooOld(
            f"The Docker engine at {url} is too old: it speaks API {version}, and 1.41 (Docker 20.10) is needed.",
            help="Upgrade it; on Debian and Ubuntu: sudo apt-get install -y docker.io",
        )


def _lines(events: Iterable[Any]) -> Iterator[str]:
    """Turn the engine's event stream into text lines; an error event becomes an exception."""
    for event in events:
        if "error" in event:
            raise docker.errors.DockerException(str(event["error"]))
        text = str(event.get("stream") or event.get("status") or "").strip()
        if text:
            yield text


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and everything that it was made from."""
    seen: list[BaseException] = []
    waiting: list[object] = [error]
    while waiting:
        current = waiting.pop(0)
        if isinstance(current, BaseException) and current not in seen:
            seen.append(current)
            waiting += [current.__cause__, current.__context__, getattr(current, "reason", None), *current.args]
    return iter(seen)


@contextlib.contextmanager
def _errors_of_connecting(url: str) -> Iterator[None]:
    try:
        yield
    except SandboxError:
        raise
    except Exception as error:
        numbers = {cause.errno for cause in _causes(error) if isinstance(cause, OSError)}
        if numbers & {errno.EACCES, errno.EPERM}:
            raise EnginePermission(
                f"A Docker engine is there ({url}), but this user may not use it.",
                help="sudo usermod -aG docker $USER   (then log out and in again)",
            ) from error
        raise EngineUnavailable(f"No Docker engine answers at {url}.", help=_IS_IT_RUNNING) from error


@contextlib.contextmanager
def _errors(
    doing: str, *, otherwise: type[SandboxError] = ProviderError, fine: frozenset[int] | set[int] = frozenset()
) -> Iterator[None]:
    """Convert what the SDK and its HTTP client raise.

    Args:
        doing: What was being done, for the message.
        otherwise: Class for failures that have none of their own.
        fine: HTTP statuses that mean the work is done already.
    """
    try:
        yield
    except SandboxError:
        raise
    except docker.errors.APIError as error:
        if error.response is not None and error.response.status_code in fine:
            return
        raise _converted(error, doing, otherwise) from error
    except docker.errors.DockerException as error:
        raise _from_text(str(error), doing, otherwise) from error
    except OSError as error:
        # requests' exceptions are OSErrors: the connection failed, or the engine took too long.
        if error.errno == errno.ENOSPC:
            raise _from_text("no space left on device", doing, otherwise) from error
        raise EngineUnavailable(
            f"The Docker engine stopped answering while {doing}: {type(error).__name__}.",
            help=_IS_IT_RUNNING,
        ) from error


def _converted(error: docker.errors.APIError, doing: str, otherwise: type[SandboxError]) -> SandboxError:
    text = str(error.explanation or error)
    if isinstance(error, docker.errors.ImageNotFound):
        return ImageMissing(f"The image is not there ({doing}): {text}.", help="rlm-sandbox image")
    if isinstance(error, docker.errors.NotFound) and "image" in text.lower():
        return ImageMissing(f"The image is not there ({doing}): {text}.", help="rlm-sandbox image")
    if isinstance(error, docker.errors.NotFound):
        return ContainerNotFound(f"{doing}: {text}")
    return _from_text(text, doing, otherwise)


def _from_text(text: str, doing: str, otherwise: type[SandboxError]) -> SandboxError:
    if "no space left on device" in text.lower():
        return DiskFull(
            f"No space left where the Docker engine keeps its files ({doing}).",
            help="See what uses it: docker system df   Free some: docker system prune",
        )
    return otherwise(f"The Docker engine failed while {doing}: {text}")
