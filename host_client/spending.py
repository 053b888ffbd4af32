"""What runs spend: seconds, sub-calls, tokens and cost, on every account that is open around the spender.

Accounts lie in a context variable, the outermost first: what a nested run spends, in whatever thread or task,
counts on those around it too. A run is an account (``history.runs``), and so is a ``with Budget(...)`` block.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from host_client.budgets import Budget

Clock = Callable[[], float]

#: Tools of DSPy that ask a model, each for as many sub-calls as it has prompts.
QUERY, QUERY_BATCHED = "llm_query", "llm_query_batched"

# Guards the sums of all accounts: a reservation looks at several of them, and then charges them all or none.
lock = threading.RLock()


class Account:
    """What was spent since it was opened, with the budgets that limit it.

    Attributes:
        calls: Sub-calls: prompts of ``llm_query`` and ``llm_query_batched``, and calls of models by other tools.
        tokens: Of all calls of models, those of the run's own actions too, as the provider counted them.
        cost: The same in US dollars, as DSPy computes it.
        unpriced: Calls of models whose cost DSPy does not know.
        budgets: What limits it.
        askers: Tools that were seen to call a model.
        refused: Whether a sub-call was refused because none were left.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._started_at = clock()
        self._stopped_at: float | None = None
        self._blocks = 1
        self.calls = self.tokens = self.unpriced = 0
        self.cost = 0.0
        self.budgets: list[Budget] = []
        self.askers: set[str] = set()
        self.refused = False

    @property
    def seconds(self) -> float:
        """How long it has been open."""
        return (self._clock() if self._stopped_at is None else self._stopped_at) - self._started_at

    def charge(self, *, calls: int = 0, tokens: int = 0, cost: float = 0.0, unpriced: int = 0) -> None:
        """Add to what was spent; ``lock`` is held."""
        self.calls += calls
        self.tokens += tokens
        self.cost += cost
        self.unpriced += unpriced

    def start(self) -> None:
        """Let the clock go on for one block more."""
        with lock:
            self._blocks += 1
            if self._stopped_at is not None:
                self._started_at += self._clock() - self._stopped_at
                self._stopped_at = None

    def stop(self) -> None:
        """Stop the clock, when the last block has ended."""
        with lock:
            self._blocks -= 1
            if self._blocks <= 0:
                self._stopped_at = self._clock()


class ToolScope(NamedTuple):
    """The tool that runs now.

    Attributes:
        tool: Its name.
        around: The accounts that were open when it was called.
        counted: Whether what it asks of models has been charged as sub-calls already.
    """

    tool: str
    around: tuple[Account, ...]
    counted: bool


accounts: contextvars.ContextVar[tuple[Account, ...]] = contextvars.ContextVar("rlm_sandbox_accounts", default=())
_tool: contextvars.ContextVar[ToolScope | None] = contextvars.ContextVar("rlm_sandbox_tool", default=None)


@contextlib.contextmanager
def opened(account: Account) -> Iterator[None]:
    """Keep an account open for a block."""
    open_account(account)
    try:
        yield
    finally:
        close_account(account)


def open_account(account: Account) -> None:
    """Open an account in this context."""
    accounts.set((*accounts.get(), account))


def close_account(account: Account) -> None:
    """Close it, with those that were opened in it and left open; nothing if it is not open in this context."""
    now = accounts.get()
    if account in now:
        accounts.set(now[: now.index(account)])


class ServingTool:
    """Notes for a ``with`` block that a tool runs for the open accounts; a generator would cost twice as much."""

    __slots__ = ("_scope", "_token")

    def __init__(self, tool: str, *, counted: bool) -> None:
        self._scope = ToolScope(tool, accounts.get(), counted)

    def __enter__(self) -> None:
        self._token = _tool.set(self._scope)

    def __exit__(self, *_: object) -> None:
        _tool.reset(self._token)


def current_tool() -> ToolScope | None:
    """Return the tool that runs in this context."""
    return _tool.get()


def is_nested(account: Account) -> bool:
    """Tell whether this context is inside a tool of the account's run, rather than in the run itself."""
    scope = _tool.get()
    return scope is not None and account in scope.around


def queries_of(tool: str, args: list[object], kwargs: dict[str, object]) -> int | None:
    """Return how many sub-calls a call of DSPy's tools stands for, or None for any other tool."""
    if tool == QUERY:
        return 1
    if tool == QUERY_BATCHED:
        prompts = kwargs.get("prompts", args[0] if args else ())
        return len(prompts) if isinstance(prompts, (list, tuple)) else 1
    return None


def note_model_call(*, tokens: int, cost: float, priced: bool) -> None:
    """Charge what a call of a model has used to all open accounts; ``begin_model_call`` has counted the call."""
    with lock:
        for account in accounts.get():
            account.charge(tokens=tokens, cost=cost, unpriced=not priced)


def begin_model_call() -> None:
    """Count a call of a model that a tool makes as a sub-call of the runs around the tool."""
    scope = _tool.get()
    if scope is None or scope.counted:
        return
    with lock:
        for account in scope.around:
            account.askers.add(scope.tool)
            account.charge(calls=1)
