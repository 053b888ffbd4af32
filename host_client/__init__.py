"""The host side of rlm-sandbox: run the code of ``dspy.RLM`` in a Docker sandbox on this machine.

    import dspy
    from host_client import SandboxInterpreter

    rlm = dspy.RLM("context, query -> answer", interpreter_factory=SandboxInterpreter.factory())

Importing this package imports neither DSPy nor the Docker SDK; they come with the first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import broker as _broker

if not getattr(_broker, "RLM_SANDBOX_BROKER", False):
    raise ImportError(
        "the package 'broker' that Python found at "
        f"{getattr(_broker, '__file__', None) or list(getattr(_broker, '__path__', ['?']))} "
        "is not the one of rlm-sandbox: another distribution or a folder of that name comes first. Remove or rename "
        "it, or install rlm-sandbox into a virtual environment of its own (python -m venv .venv)."
    )

from broker import __version__
from host_client.endings import wait_for_endings
from host_client.errors import (
    BadSetting,
    BrokerError,
    BrokerUnreachable,
    BudgetExceeded,
    CallGone,
    DiskFull,
    EnginePermission,
    EngineUnavailable,
    Fenced,
    FileRefused,
    ForeignSession,
    ForkFailed,
    HistoryUnusable,
    HookError,
    ImageBuildFailed,
    ImageMissing,
    JournalNewer,
    JournalUnusable,
    LeaseExpired,
    MalformedReply,
    PoolClosed,
    PoolError,
    PoolExhausted,
    PoolQueueFull,
    PoolSessionBusy,
    PoolSessionGone,
    PoolWaitTimeout,
    PreloadFailed,
    ProtocolMismatch,
    ProviderError,
    RestoreFailed,
    SandboxError,
    SandboxTooWeak,
    SavedFileDamaged,
    SavedFileMismatch,
    SavedFileNewer,
    SavedSessionError,
    SaveFailed,
    SessionBusy,
    SessionLost,
    SessionNameTaken,
    SetupError,
    TooManyForks,
    TooManySnapshots,
    TransportUnusable,
    UnknownPool,
    UnknownRun,
    UnknownSandbox,
    UnknownSession,
    UnknownSnapshot,
)
from host_client.progress import ToolEvent, progress
from host_client.settings import SandboxSettings
from host_client.tool_marks import current_call, tool

if TYPE_CHECKING:
    from host_client.budgets import Budget as Budget
    from host_client.interpreter import SandboxInterpreter as SandboxInterpreter
    from host_client.pool import SandboxPool as SandboxPool
    from host_client.pool_registry import get_pool as get_pool
    from host_client.saving import RestoredSession as RestoredSession
    from host_client.saving import SavedSession as SavedSession
    from host_client.scripted_broker import ScriptedBroker as ScriptedBroker
    from host_client.sessions import SessionStatus as SessionStatus
    from host_client.sessions import close_session as close_session
    from host_client.sessions import list_sessions as list_sessions
    from host_client.snapshots import Snapshot as Snapshot

_LAZY = {
    "Budget": "host_client.budgets",
    "RestoredSession": "host_client.saving",
    "SandboxInterpreter": "host_client.interpreter",
    "SandboxPool": "host_client.pool",
    "SavedSession": "host_client.saving",
    "ScriptedBroker": "host_client.scripted_broker",
    "SessionStatus": "host_client.sessions",
    "close_session": "host_client.sessions",
    "Snapshot": "host_client.snapshots",
    "get_pool": "host_client.pool_registry",
    "list_sessions": "host_client.sessions",
}

__all__ = [
    "BadSetting",
    "BrokerError",
    "BrokerUnreachable",
    "Budget",
    "BudgetExceeded",
    "CallGone",
    "DiskFull",
    "EnginePermission",
    "EngineUnavailable",
    "Fenced",
    "FileRefused",
    "ForeignSession",
    "ForkFailed",
    "HistoryUnusable",
    "HookError",
    "ImageBuildFailed",
    "ImageMissing",
    "JournalNewer",
    "JournalUnusable",
    "LeaseExpired",
    "MalformedReply",
    "PoolClosed",
    "PoolError",
    "PoolExhausted",
    "PoolQueueFull",
    "PoolSessionBusy",
    "PoolSessionGone",
    "PoolWaitTimeout",
    "PreloadFailed",
    "ProtocolMismatch",
    "ProviderError",
    "RestoreFailed",
    "RestoredSession",
    "SandboxError",
    "SandboxInterpreter",
    "SandboxPool",
    "SandboxSettings",
    "SandboxTooWeak",
    "SaveFailed",
    "SavedFileDamaged",
    "SavedFileMismatch",
    "SavedFileNewer",
    "SavedSession",
    "SavedSessionError",
    "ScriptedBroker",
    "SessionBusy",
    "SessionLost",
    "SessionNameTaken",
    "SessionStatus",
    "SetupError",
    "Snapshot",
    "TooManyForks",
    "TooManySnapshots",
    "ToolEvent",
    "TransportUnusable",
    "UnknownPool",
    "UnknownRun",
    "UnknownSandbox",
    "UnknownSession",
    "UnknownSnapshot",
    "__version__",
    "close_session",
    "current_call",
    "get_pool",
    "list_sessions",
    "progress",
    "tool",
    "wait_for_endings",
]


def __getattr__(name: str) -> Any:
    """Import the interpreter on first use (PEP 562): it is what pulls in the HTTP client."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
