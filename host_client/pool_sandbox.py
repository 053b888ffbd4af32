"""What is in a pool's place: a fresh sandbox, as far as it may be prepared before anybody asks for it."""

from __future__ import annotations

from collections.abc import Callable

from host_client.connected_sandbox import ConnectedSandbox
from host_client.errors import SandboxError
from host_client.journal import Journal
from host_client.providers.base import SandboxProvider
from host_client.sandbox_session import SandboxSession
from host_client.secret_values import Secrets
from host_client.settings import SandboxSettings

#: A living broker answers in less than a millisecond; one that takes this long is no use to anybody.
_WELL_WITHIN_S = 2.0
#: While it is started, the machine may be busy with others.
_REHEARSED_WITHIN_S = 10.0


class PooledSandbox:
    """A running sandbox with an open connection and, unless it will hold secrets, an open session that has rehearsed.

    Secrets are read and sent when the sandbox is taken: none waits in an idle container, and they are those of that
    moment.

    Args:
        provider: Where it comes from.
        settings: How it is made.
        open_journal: Returns the journal of its session's tool calls.

    Raises:
        SandboxError: It could not be started; nothing is left behind.
    """

    def __init__(
        self, provider: SandboxProvider, settings: SandboxSettings, open_journal: Callable[[], Journal]
    ) -> None:
        self._secrets = Secrets.of(settings.secrets)
        self._open_journal = open_journal
        self._connected = ConnectedSandbox.start(provider, settings)
        self._session = None if self._secrets else self._opened(open_journal())

    def is_well(self) -> bool:
        """Ask whether it is still there, and able to run code."""
        if self._session is not None:
            return self._session.is_well(_WELL_WITHIN_S)
        try:
            self._connected.client.sessions(timeout_s=_WELL_WITHIN_S)
        except SandboxError:
            return False
        return True

    def take(self) -> SandboxSession:
        """Return its session.

        Raises:
            SandboxError: It could not be opened; the sandbox is ended.
        """
        if self._session is None:
            with self._connected.ended_on_failure():
                values = self._secrets.values()
            self._session = SandboxSession.open_in(self._connected, journal=self._open_journal(), secrets=values)
        return self._session

    def _opened(self, journal: Journal) -> SandboxSession:
        session = SandboxSession.open_in(self._connected, journal=journal)
        try:
            session.client.rehearse(session.session_id, _REHEARSED_WITHIN_S)
        except BaseException:
            session.end_now()
            raise
        return session

    def end(self) -> None:
        """End it, with all that it holds. Idempotent."""
        if self._session is None:
            self._connected.end()
        else:
            self._session.end_now()
