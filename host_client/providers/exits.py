"""What the engine says about the end of a container, in the words of this project."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

from broker.protocol.exits import EXIT_OUT_OF_MEMORY
from host_client.errors import BadSetting, ProviderError, SandboxError
from host_client.runtime_dir import VARIABLE
from host_client.settings import SandboxSettings

#: Sent by people and engines to end a process; others are the process's own fault.
_KILLS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
#: Added by shells and engines to a signal's number to make an exit code.
_SIGNAL_BASE = 128
_LOG_LINES = 8


def death_reason(state: Mapping[str, Any]) -> str | None:
    """Return why a container does not run, or None where it runs.

    Args:
        state: ``State`` of the engine's description.
    """
    if state.get("Running") or state.get("Paused"):
        return None
    if state.get("Status") in ("removing", "dead"):
        return "removed"  # by force: it was killed for that, a moment ago
    code = int(state.get("ExitCode") or 0)
    if code == EXIT_OUT_OF_MEMORY:
        return "oom"
    # The engine notes an out-of-memory kill of any process; the container itself died of it only with SIGKILL.
    if state.get("OOMKilled") and code == _SIGNAL_BASE + signal.SIGKILL:
        return "oom"
    try:
        ended_by = signal.Signals(code - _SIGNAL_BASE)
    except ValueError:
        return f"exited({code})"
    return "killed" if ended_by in _KILLS else f"crashed({ended_by.name})"


def log_tail(text: str) -> str:
    """Return the last lines of a container's log for the end of an error message."""
    lines = [line for line in text.splitlines() if line.strip()][-_LOG_LINES:]
    return "".join(f"\n    | {line[:400]}" for line in lines)


def explained(error: ProviderError, settings: SandboxSettings) -> SandboxError:
    """Return a better error for what the engine refuses because of a setting; the same one otherwise."""
    text = error.message.lower()
    if "runtime" in text and ("unknown" in text or "invalid runtime" in text):
        return BadSetting(
            f"setting runtime={settings.runtime!r}: the engine does not know this runtime",
            help="docker info lists those it knows; to use the default, unset RLM_SANDBOX_RUNTIME",
        )
    if "bind source path does not exist" in text:
        return ProviderError(
            f"the engine does not see this machine's files ({error.message})",
            help=f"it must run on this machine; or set {VARIABLE} to a directory that it sees under the same path",
        )
    if "cpus" in text or "memory limit" in text or "pids limit" in text:
        return BadSetting(f"the engine refuses a limit: {error.message}", help="see RLM_SANDBOX_MEMORY, _CPUS, _PIDS")
    return error
