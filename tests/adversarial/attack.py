"""An attack as data: what generated code tries, and what must be true afterwards."""

from __future__ import annotations

import dataclasses
from typing import Any

FAMILIES = (
    "forgery",
    "neighbours",
    "resources",
    "network",
    "files and devices",
    "privileged calls",
    "protocol",
    "lifecycle",
    "local users",
    "log injection",
)

#: No particular value is expected.
ANYTHING: Any = object()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One attack.

    Attributes:
        name: Unique; it is the test's name.
        family: One of ``FAMILIES``.
        code: Runs in the sandbox, with the names of ``prelude.py``, ``tools.py`` and, for neighbours, ``victim``.
        expects: Words of ``outcomes.py``, all of which must hold: ``"ALIVE DENY"``, ``"COUNT=1"``, ``"ALIVE|DEAD"``.
        falls: The word that does not hold in the weakened build, where the same attack succeeds; None where the
            weakened build is no weaker against it.
        value: What ``execute`` must return (``expects`` has the word VALUE).
        then: Code of the next execution, which must give True.
        reasons: Why the session may be lost (DEAD).
        error: Text in the error that ``execute`` must raise (``expects`` has the word ERROR).
        deadline_s: Deadline of the execution in seconds.
        weak_code: The attack on the weakened build where its details differ there.
    """

    name: str
    family: str
    code: str
    expects: str
    falls: str | None = None
    value: Any = ANYTHING
    then: str | None = None
    reasons: tuple[str, ...] = ()
    error: str | None = None
    deadline_s: float = 10.0
    weak_code: str | None = None

    def __post_init__(self) -> None:
        assert self.family in FAMILIES, self.family
        assert ("VALUE" in self.expects) == (self.value is not ANYTHING), f"{self.name}: VALUE and value go together"
        assert ("DEAD" in self.expects) == bool(self.reasons), f"{self.name}: DEAD and reasons go together"
        assert ("ERROR" in self.expects) == (self.error is not None), f"{self.name}: ERROR and error go together"

    def words(self) -> list[tuple[str, ...]]:
        """Return the expected words; of each group one must hold."""
        return [tuple(group.split("|")) for group in self.expects.split()]


def denied(name: str, family: str, action: str, *, falls: bool = False, setup: str = "") -> Attack:
    """Return an attack of one step that must end in a permission-like errno, and harm nothing.

    Args:
        name: See ``Attack``.
        family: See ``Attack``.
        action: An expression.
        falls: Whether it works in the weakened build.
        setup: Statements before it.
    """
    code = f"{setup}\nattempt(lambda: {action})"
    return Attack(name=name, family=family, code=code, expects="DENY ALIVE", falls="DENY" if falls else None)
