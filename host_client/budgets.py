"""Budgets: how much time, how many sub-calls and tokens, and how much money a run may use up.

    with Budget(max_calls=50, max_cost=0.50) as budget:
        result = rlm(document=book, question="Who is Ishmael?")
    budget.spent()  # {'seconds': 41.2, 'calls': 17, 'tokens': 120345, 'cost': 0.043}

    rlm = dspy.RLM("q -> a", interpreter_factory=SandboxInterpreter.factory(budget=Budget(max_seconds=300)))

A block has one account for all that happens in it; a budget of a factory or an interpreter gives each run one. Nested
runs, tools and threads count. What is counted how, and what happens when nothing is left:
``docs/decisions/016-budgets-and-history.md``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

from host_client import spending
from host_client.errors import BadSetting, BudgetExceeded
from host_client.spending import Account, Clock

#: How many executions a run gets after one of its budgets is used up: one to SUBMIT, one to mend it.
GRACE_EXECUTIONS = 2
#: How long each of them may take, and any execution at the end of a budget of time.
GRACE_S = 10.0
_HELP = "make no further sub-calls; SUBMIT what you have"

#: Names of the limits, and of what they limit.
KINDS = {"max_seconds": "seconds", "max_calls": "calls", "max_tokens": "tokens", "max_cost": "cost"}


class Budget:
    """Limits, and the account that they apply to. Safe to use from many threads.

    Args:
        max_seconds: Wall-clock time of a run.
        max_calls: Sub-calls: one for each prompt of ``llm_query`` and ``llm_query_batched``, and one for each call of a
            model that another tool makes. A run's own actions are no sub-calls.
        max_tokens: Tokens of all calls of models, actions too. Replies from DSPy's cache cost nothing.
        max_cost: The same in US dollars. Calls of models that DSPy has no price for count as free; see ``unpriced``.
        clock: Seconds, monotonic.

    Raises:
        BadSetting: A limit that is not above zero, or no limit at all.
    """

    def __init__(
        self,
        *,
        max_seconds: float | None = None,
        max_calls: int | None = None,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        given = {"max_seconds": max_seconds, "max_calls": max_calls, "max_tokens": max_tokens, "max_cost": max_cost}
        self.limits: dict[str, float] = {
            name: _checked(name, value) for name, value in given.items() if value is not None
        }
        if not self.limits:
            raise BadSetting(f"a budget limits nothing; give one of {', '.join(KINDS)}")
        self._clock = clock
        self._account: Account | None = None

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{name}={value:g}' for name, value in self.limits.items())})"

    def __enter__(self) -> Budget:
        from host_client.history.observer import watch_models

        watch_models(self)
        if self._account is None:
            self.attach(Account(self._clock))
        else:
            self._account.start()
        assert self._account is not None
        spending.open_account(self._account)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._account is not None
        spending.close_account(self._account)
        self._account.stop()

    def attach(self, account: Account) -> None:
        """Let this budget limit an account."""
        self._account = account
        account.budgets.append(self)

    def fresh(self) -> Budget:
        """Return the same limits with nothing spent."""
        return Budget(**self.limits, clock=self._clock)  # type: ignore[arg-type]

    @property
    def unpriced(self) -> int:
        """Calls of models whose cost is not known, and was not counted."""
        return 0 if self._account is None else self._account.unpriced

    @property
    def counts_usage(self) -> bool:
        """Whether tokens or cost are limited."""
        return bool({"max_tokens", "max_cost"} & self.limits.keys())

    def spent(self) -> dict[str, float]:
        """Return what was spent: seconds, calls, tokens and cost."""
        account = self._account
        return {what: 0 if account is None else getattr(account, what) for what in KINDS.values()}

    def left(self) -> dict[str, float]:
        """Return what is left of each thing that is limited, never less than 0."""
        spent = self.spent()
        return {KINDS[name]: max(0, limit - spent[KINDS[name]]) for name, limit in self.limits.items()}

    def used_up(self, *, calls: bool = True) -> BudgetExceeded | None:
        """Return the error that says what is used up, or None.

        Args:
            calls: Whether sub-calls matter.
        """
        spent = self.spent()
        for name, limit in self.limits.items():
            if spent[KINDS[name]] >= limit and (calls or name != "max_calls"):
                text = f"the budget {name}={limit:g} is used up (spent {_shown(spent[KINDS[name]])})"
                return BudgetExceeded(text, budget=name, limit=limit, spent=spent[KINDS[name]], help=_HELP)
        return None

    def check_calls(self, wanted: int) -> None:
        """Check that so many sub-calls fit.

        Raises:
            BudgetExceeded: They do not, or something else is used up.
        """
        if (used_up := self.used_up()) is not None:
            assert self._account is not None
            self._account.refused = True
            raise used_up
        limit, spent = self.limits.get("max_calls", math.inf), self.spent()["calls"]
        if spent + wanted > limit:
            text = f"{wanted} sub-calls do not fit into the budget max_calls={limit:g}: {limit - spent:g} are left"
            raise BudgetExceeded(text, budget="max_calls", limit=limit, spent=spent, help="ask fewer, or SUBMIT")


def budget() -> dict[str, float]:
    """Return what is left of this run's budget: a dict with seconds, calls, tokens or cost, whichever are limited."""
    left: dict[str, float] = {}
    for limit in in_force():
        for what, amount in limit.left().items():
            left[what] = min(amount, left.get(what, math.inf))
    return {what: round(amount, 6 if what == "cost" else 1) for what, amount in left.items()}


def in_force() -> Iterator[Budget]:
    """Yield the budgets of all open accounts, the outermost first."""
    for account in spending.accounts.get():
        yield from account.budgets


def ended() -> tuple[Account, BudgetExceeded] | None:
    """Return the first account whose run must come to its end, and the error that says why.

    One that has made all its sub-calls may still compute; it must end once it has asked for more.
    """
    for account in spending.accounts.get():
        for limit in account.budgets:
            if (error := limit.used_up(calls=account.refused)) is not None:
                return account, error
    return None


def seconds_left() -> float:
    """Return how long the code that runs now may go on."""
    return min((limit.left().get("seconds", math.inf) for limit in in_force()), default=math.inf)


def reserve(tool: str, queries: int | None) -> None:
    """Charge a tool's sub-calls before it runs.

    Args:
        tool: Its name.
        queries: How many sub-calls it is known to make, or None.

    Raises:
        BudgetExceeded: They do not fit; nothing was charged, and the tool must not run.
    """
    with spending.lock:
        opened = spending.accounts.get()
        for account in opened:
            if queries is not None or tool in account.askers:
                for limit in account.budgets:
                    limit.check_calls(queries or 0)
        for account in opened:
            account.charge(calls=queries or 0)


def _checked(name: str, value: Any) -> float:
    whole = name in ("max_calls", "max_tokens")
    wanted = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, wanted) or not 0 < value < math.inf:
        raise BadSetting(f"{name} must be a{' whole' if whole else ''} number above 0, got {value!r:.80}")
    return value


def _shown(amount: float) -> str:
    return f"{amount:,}" if isinstance(amount, int) else f"{amount:.4g}"
