"""The table at the end: for each family how many cases there are, held, and fell in the weakened build."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.adversarial.attack import FAMILIES

#: Where the tables are kept; git ignores it.
_FOLDER = Path(__file__).resolve().parents[2] / "build"


@dataclasses.dataclass(slots=True)
class Row:
    """One family."""

    cases: int = 0
    held: int = 0
    weakened: int = 0
    fell: int = 0
    not_held: list[str] = dataclasses.field(default_factory=list)


class Report:
    """Counts results as they come.

    Args:
        provider: What made the sandboxes.
    """

    def __init__(self, provider: str = "docker") -> None:
        self.provider = provider
        self.rows: defaultdict[str, Row] = defaultdict(Row)

    def add(self, family: str, name: str, *, weak: bool, passed: bool) -> None:
        """Count one test; a skipped one has not passed."""
        row = self.rows[family]
        if weak:
            row.weakened += 1
            row.fell += passed
        else:
            row.cases += 1
            row.held += passed
        if not passed:
            row.not_held.append(name)

    def lines(self) -> list[str]:
        """Return the table."""
        total = Row()
        lines = [f"{'family':<20}{'cases':>7}{'held':>7}   weakened build fell"]
        for family in [*FAMILIES, *sorted(set(self.rows) - set(FAMILIES))]:
            row = self.rows.get(family)
            if row is None:
                continue
            for name in ("cases", "held", "weakened", "fell"):
                setattr(total, name, getattr(total, name) + getattr(row, name))
            total.not_held += row.not_held
            lines.append(f"{family:<20}{row.cases:>7}{row.held:>7}   {row.fell} of {row.weakened}")
        lines.append(f"{'all':<20}{total.cases:>7}{total.held:>7}   {total.fell} of {total.weakened}")
        return lines + [f"does not hold: {name}" for name in total.not_held]

    def write(self) -> None:
        """Keep the table as JSON."""
        path = _FOLDER / ("adversarial.json" if self.provider == "docker" else f"adversarial-{self.provider}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        rows: dict[str, Any] = {family: dataclasses.asdict(row) for family, row in self.rows.items()}
        path.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
