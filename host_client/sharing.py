"""Who of this process is in a sandbox of its own: the last one to leave ends it."""

from __future__ import annotations

from collections.abc import Sequence

from host_client.broker_client import SessionInfo


class Share:
    """The sessions of this process in one sandbox. Takes no lock: a garbage collector may end a session anywhere.

    Args:
        session_id: The first one.
        epoch: In which it is held.
    """

    def __init__(self, session_id: str, epoch: int) -> None:
        self._epochs = {session_id: epoch}
        # Whoever takes the first one out is the last to leave; ``pop`` is atomic.
        self._places = [True]

    def join(self, session_id: str) -> None:
        """Note one that was forked."""
        self._epochs[session_id] = 1
        self._places.append(False)

    def goes_on(self, session_id: str, epoch: int) -> None:
        """Note that one of ours is held in another epoch, by ourselves."""
        self._epochs[session_id] = epoch

    def leave(self) -> bool:
        """Note that one ends, once each; tell whether it was the last one."""
        return self._places.pop()

    def wanted_by_others(self, sessions: Sequence[SessionInfo]) -> bool:
        """Tell whether somebody else may be using the sandbox: he attached to one of ours, or holds one we do not know.

        Args:
            sessions: All in the sandbox.
        """
        return any(self._epochs.get(each.session_id) != each.epoch for each in sessions if each.lost is None)
