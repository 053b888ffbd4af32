"""No document at all: a question that code answers better than memory does.

python examples/write_code.py [--scripted]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import dspy

from host_client import SandboxInterpreter
from host_client.demo.models import ScriptedActions, example_model


def main(argv: Sequence[str] = ()) -> int:
    """Ask about the calendar and print the answer."""
    with example_model(SCRIPT, only_scripted="--scripted" in argv):
        rlm = dspy.RLM("question -> years: list[int]", interpreter_factory=SandboxInterpreter.factory())
        result = rlm(question="In which years from 2020 to 2060 is the 13th of February a Friday?")
    print(*result.years, sep=", ")
    return 0


#: What the scripted model does instead of thinking.
SCRIPT = ScriptedActions(
    [
        (
            "I need not know the calendar; Python does.",
            """
import datetime

FRIDAY = 4
years = [year for year in range(2020, 2061) if datetime.date(year, 2, 13).weekday() == FRIDAY]
print(years)
""",
        ),
        ("That is plausible: they are five, six or eleven years apart.", "SUBMIT(years=years)"),
    ]
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
