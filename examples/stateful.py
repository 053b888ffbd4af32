"""Work over several iterations: imports, functions and results of one step are there in the next.

A service's log is searched for the causes of its errors: parse, bring into a common form, name, add up.

    python examples/stateful.py [--scripted]
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

import dspy

from host_client import SandboxInterpreter
from host_client.demo.models import ScriptedActions, example_model

TROUBLES = (
    "connection to 10.0.{}.{} timed out",
    "host db-{}.internal did not answer within {} s",
    "no space left on volume {} ({} bytes wanted)",
    "user {} may not read record {}",
)


def main(argv: Sequence[str] = ()) -> int:
    """Ask for the causes and print them, the most frequent one first."""
    with example_model(SCRIPT, only_scripted="--scripted" in argv):
        rlm = dspy.RLM(
            dspy.Signature(
                "log: str -> causes: dict[str, int], total: int",
                "Count the ERROR lines by cause. Causes: network, storage, permissions, other.",
            ),
            interpreter_factory=SandboxInterpreter.factory(),
        )
        result = rlm(log=make_log())
    for cause, count in sorted(result.causes.items(), key=lambda item: -item[1]):
        print(f"{count:5} {cause}")
    print(f"{result.total:5} errors")
    return 0


def make_log(lines: int = 20_000) -> str:
    """Return a log of that many lines, the same one each time; every 40th or so is an error."""
    dice = random.Random(7)
    return "\n".join(_line(second, dice) for second in range(lines))


def _line(second: int, dice: random.Random) -> str:
    stamp = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"
    if dice.random() > 1 / 40:
        return f"{stamp} INFO request {dice.randrange(10**6)} done"
    [trouble] = dice.choices(TROUBLES, weights=[4, 3, 2, 1])
    return f"{stamp} ERROR " + trouble.format(dice.randrange(100), dice.randrange(100))


def name_cause(prompt: str) -> str:
    """Play the sub-model: name a cause by its words."""
    words = {"network": "timed out|did not answer", "storage": "no space", "permissions": "may not"}
    line = prompt.partition("\n\n")[2]
    return next((cause for cause, signs in words.items() if any(sign in line for sign in signs.split("|"))), "other")


#: What the scripted model does instead of thinking.
SCRIPT = ScriptedActions(
    [
        (
            "First a look, and the lines that matter.",
            """
from collections import Counter

lines = log.splitlines()
errors = [line.split(" ERROR ")[1] for line in lines if " ERROR " in line]
print(len(lines), "lines,", len(errors), "errors such as", errors[:2])
""",
        ),
        (
            "`errors` is kept. They differ in numbers only, so without these there are few kinds.",
            """
import re

def shape(message):
    return re.sub(r"\\d+", "N", message)

kinds = Counter(map(shape, errors))
print(kinds)
""",
        ),
        (
            "Few enough to ask about each kind, instead of each line.",
            """
prompts = ["Is this network, storage, permissions or other? One word.\\n\\n" + kind for kind in kinds]
cause_of = dict(zip(kinds, llm_query_batched(prompts)))
print(cause_of)
""",
        ),
        (
            "Back to the lines, with `shape` and `cause_of` of the steps before.",
            """
causes = Counter(cause_of[shape(message)] for message in errors)
assert sum(causes.values()) == len(errors)
SUBMIT(causes=dict(causes), total=len(errors))
""",
        ),
    ],
    name_cause,
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
