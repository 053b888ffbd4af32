"""Three pools in one program: tickets are triaged, a month of reports is read, and numpy scores the triage.

- ``triage`` has strict affinity: each customer's session keeps, in its own sandbox, the tickets seen so far. Two
  customers are served side by side; a ticket of a customer waits for the one before.
- ``reading`` has it too: an RLM reads a long list there, and a second question finds the variables of the first.
- ``analytics`` takes affinity as a hint: its work is without state, so any free sandbox will do.

At the end the history shows what the models were asked, run by run.

    python examples/three_pools.py [--scripted]
"""

from __future__ import annotations

import contextvars
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import dspy

from host_client import SandboxPool
from host_client.demo.models import ScriptedActions, example_model
from host_client.demo.scripted_lm import Message
from host_client.history import History

#: By customer: a ticket and the severity that a person gave it.
TICKETS = {
    "north": [
        ("Invoices cannot be exported, month end is tomorrow", "high"),
        ("A typo on the start page", "low"),
        ("Invoices can still not be exported", "high"),
    ],
    "south": [
        ("All logins fail since this morning", "high"),
        ("Please add a dark mode", "low"),
        ("Colours of the chart are hard to tell apart, and one customer cannot read it", "low"),
    ],
}
COMPLAINTS = ("invoices cannot be exported", "logins fail", "search is slow", "a typo on the start page")


class Triage(dspy.Signature):
    """Triage a customer's ticket.

    The session keeps its variables from ticket to ticket: keep all tickets in a list `seen`, which is not there before
    the first, and compare this one with it.
    """

    ticket: str = dspy.InputField()
    severity: str = dspy.OutputField(desc="high or low")
    number: int = dspy.OutputField(desc="1 for the customer's first ticket")
    repeated: bool = dspy.OutputField(desc="whether it is about the same as an earlier one")


#: Runs in the analytics pool; the value of its last line comes back.
SCORE = """
import numpy

wanted, given = numpy.array(expected) == "high", numpy.array(predicted) == "high"
{"accuracy": float(numpy.mean(wanted == given)), "missed": int(numpy.sum(wanted & ~given))}
"""


def main(argv: Sequence[str] = ()) -> int:
    """Do the three kinds of work and print what came of each."""
    began = time.time()
    with (
        example_model(scripted, only_scripted="--scripted" in argv),
        SandboxPool(name="triage", min_size=2, max_size=2, affinity="strict_queue") as triage,
        SandboxPool(name="reading", max_size=2, affinity="strict_queue") as reading,
        SandboxPool(name="analytics", max_size=2, affinity="hint") as analytics,
    ):
        verdicts = side_by_side(partial(triage_customer, triage), TICKETS)
        for customer, found in verdicts.items():
            print(f"{customer}: {', '.join(f'{v.severity} (again)' if v.repeated else v.severity for v in found)}")
        print("issues:", recurring_issues(reading))
        for customer, score in side_by_side(partial(score_customer, analytics, verdicts), TICKETS).items():
            print(f"{customer}: {score}")
    print_history(began)
    return 0


def side_by_side(work: Any, customers: Any) -> dict[str, Any]:
    """Return the work's result for each customer; each thread has a copy of DSPy's context."""
    with ThreadPoolExecutor() as threads:
        running = {name: threads.submit(contextvars.copy_context().run, work, name) for name in customers}
    return {name: future.result() for name, future in running.items()}


def triage_customer(pool: SandboxPool, customer: str) -> list[Any]:
    """Triage a customer's tickets one after the other, all in that customer's sandbox."""
    rlm = dspy.RLM(Triage, interpreter_factory=pool.factory(session=customer))
    return [rlm(ticket=ticket) for ticket, _ in TICKETS[customer]]


def recurring_issues(pool: SandboxPool) -> dict[str, int]:
    """Read a month of reports, then ask about them again without sending them again."""
    factory = pool.factory(session="month")
    reader = partial(dspy.RLM, interpreter_factory=factory, max_iters=8, max_llm_calls=12)
    reports = random.Random(1).choices(COMPLAINTS, weights=[5, 3, 2, 1], k=2000)
    question = "Which two issues come up most often? Keep the counts of all of them in a dict `counts`."
    top = reader("reports: list[str], question -> issues: list[str]")(reports=reports, question=question)
    question = "The session still has the dict `counts`. How many reports are about each of these issues?"
    again = reader("issues: list[str], question -> counted: dict[str, int]")(issues=top.issues, question=question)
    return dict(again.counted)


def score_customer(pool: SandboxPool, verdicts: Any, customer: str) -> Any:
    """Compare the triage with a person's, with numpy in a sandbox."""
    expected = [severity for _, severity in TICKETS[customer]]
    with pool.interpreter(session="scores") as interpreter:
        predicted = [verdict.severity for verdict in verdicts[customer]]
        return interpreter.execute(SCORE, {"expected": expected, "predicted": predicted})


def print_history(began: float) -> None:
    """Print what the models were asked since then, run by run: the size of each prompt, and the answer's beginning."""
    history = History()
    for run in history.runs():
        prompts = history.prompts(run.id) if run.process == os.getpid() and run.started_at >= began else []
        if prompts:
            print(f"{run.id} {run.module} {run.signature}: {run.outcome}")
        for call in prompts:
            answer = json.loads(call.answer)[0] if call.answer else call.error
            print(f"    {call.tokens_in:,} tokens -> {' '.join(str(answer).split())[:80]}")


#: What the scripted model does instead of thinking, by the name of the output that it is asked for.
SCRIPTS = {
    "severity": ScriptedActions(
        [
            (
                "How much does it have in common with earlier ones?",
                """
import re

words = set(re.findall(r"[a-z]{5,}", ticket.lower()))
seen = globals().get("seen", [])
repeated = any(len(words & earlier) >= 2 for earlier in seen)
seen.append(words)
print(len(seen), repeated)
""",
            ),
            (
                "What cannot be done at all is urgent.",
                """
severity = "high" if re.search(r"fail|cannot|can still not", ticket) else "low"
SUBMIT(severity=severity, number=len(seen), repeated=repeated)
""",
            ),
        ]
    ),
    "issues": ScriptedActions(
        [
            (
                "I count.",
                "from collections import Counter\n\ncounts = dict(Counter(reports).most_common())\nprint(counts)",
            ),
            ("The first two.", "SUBMIT(issues=list(counts)[:2])"),
        ]
    ),
    "counted": ScriptedActions([("It is in `counts`.", "SUBMIT(counted={issue: counts[issue] for issue in issues})")]),
}


def scripted(messages: Sequence[Message]) -> str:
    """Play the model; ``{severity}`` in its instructions asks for that output."""
    script = next(script for output, script in SCRIPTS.items() if f"{{{output}}}" in messages[0].text)
    return script(messages)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
