"""A running sandbox with a client for its broker, before a session is opened in it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

from host_client.broker_client import BrokerClient, HttpBrokerClient
from host_client.errors import BrokerUnreachable, SessionLost
from host_client.providers.base import SandboxHandle, SandboxProvider
from host_client.settings import SandboxSettings
from host_client.transport import Transport, UnixSocketTransport


class ConnectingProvider(SandboxProvider, Protocol):
    """A provider whose sandboxes are not reached through a socket of this machine: a fake, or a remote engine."""

    def connect(self, handle: SandboxHandle) -> BrokerClient:
        """Return a client for the broker in this sandbox."""


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectedSandbox:
    """A sandbox whose broker answers and speaks our version of the protocol.

    Attributes:
        provider: Where it comes from.
        handle: The sandbox.
        client: Speaks to its broker; its open connection tells the sandbox that its host lives.
    """

    provider: SandboxProvider
    handle: SandboxHandle
    client: BrokerClient

    @classmethod
    def start(cls, provider: SandboxProvider, settings: SandboxSettings, name: str | None = None) -> ConnectedSandbox:
        """Start a sandbox of our own, or find the named one, and connect to it.

        Raises:
            SandboxError: What the provider and the broker client raise; nothing is left behind.
        """
        handle = provider.start(settings) if name is None else provider.find(name)
        try:
            sandbox = cls(provider, handle, connect(provider, handle))
        except BaseException:
            if handle.owned:
                provider.stop(handle)
            raise
        with sandbox.ended_on_failure():
            sandbox.client.check()
        return sandbox

    @contextlib.contextmanager
    def ended_on_failure(self) -> Iterator[None]:
        """End the sandbox, if it is ours, and the connections where the block raises.

        Raises:
            SessionLost: The block could not reach the broker, because the sandbox has ended.
        """
        try:
            yield
        except BaseException as error:
            reason = self.provider.why_dead(self.handle) if isinstance(error, BrokerUnreachable) else None
            self.end()
            if reason is not None:
                raise SessionLost(f"the sandbox ended while it was started ({reason})", reason=reason) from error
            raise

    def end(self) -> None:
        """Close the connections, and stop the sandbox if it is ours."""
        self.client.close()
        if self.handle.owned:
            self.provider.stop(self.handle)


def connect(provider: SandboxProvider, handle: SandboxHandle) -> BrokerClient:
    """Return a client for a sandbox's broker; nothing is sent yet."""
    own: Callable[[SandboxHandle], BrokerClient] | None = getattr(provider, "connect", None)
    if own is not None:
        return own(handle)
    return HttpBrokerClient(transport_to(provider, handle))


def transport_to(provider: SandboxProvider, handle: SandboxHandle) -> Transport:
    """Return what carries requests to a sandbox's broker; nothing is sent yet.

    A provider whose sockets cannot always be shared says how with a method ``transport``.
    """
    own: Callable[[SandboxHandle], Transport] | None = getattr(provider, "transport", None)
    return UnixSocketTransport(handle.socket_path) if own is None else own(handle)


def is_slow(provider: SandboxProvider) -> bool:
    """Tell whether starting and stopping take long enough to be done ahead of time, and in the background.

    A provider says so with an attribute ``is_slow``. Fakes do not: tests see what they did as soon as they did it.
    """
    return bool(getattr(provider, "is_slow", False))
