"""Stop today, go on tomorrow, on another machine: a session in a file.

A long list of measurements is cleaned step by step. What the first run leaves in its session is saved; a new sandbox
restores it, and a second run answers another question with it, without the list.

    python examples/save_and_restore.py [--scripted] [--file FILE]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import dspy

from host_client import SandboxInterpreter, SandboxPool, SavedSession
from host_client.demo.models import ScriptedActions, example_model
from host_client.demo.scripted_lm import Message

SENSORS = ("roof", "cellar", "garden")


def main(argv: Sequence[str] = ()) -> int:
    """Clean and save; restore and ask again."""
    options = _parser().parse_args(argv)
    with example_model(scripted, only_scripted=options.scripted), tempfile.TemporaryDirectory() as folder:
        path = options.file or Path(folder) / "cleaned.saved"
        saved = clean(path)
        print(f"saved: {', '.join(filter(is_ours, saved.saved))}")
        for name in filter(is_ours, saved.not_saved):
            print(f"not saved: {name}, {saved.not_saved[name]}")
        print(f"warmest: {ask(path)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scripted", action="store_true", help="let a script play the model")
    parser.add_argument("--file", type=Path, help="keep the saved session here")
    return parser


def is_ours(name: str) -> bool:
    """Tell the code's variables from those that DSPy has in each session of an RLM."""
    return "dspy" not in name and not name.startswith("_")


def make_lines(count: int = 5000) -> list[str]:
    """Return lines of a logger, the same ones each time; some are torn."""
    dice = random.Random(3)
    lines = []
    for number in range(count):
        sensor = dice.choice(SENSORS)
        degrees = dice.gauss({"roof": 24, "cellar": 12, "garden": 18}[sensor], 2)
        lines.append(f"{number};{sensor};{degrees:.1f}" if dice.random() > 0.02 else f"{number};{sensor};?")
    return lines


def clean(path: Path) -> SavedSession:
    """Let a model clean the lines in a session that stays, then save that session."""
    with SandboxPool(name="cleaning", max_size=1, affinity="strict_queue") as pool:
        session = partial(pool.interpreter, session="cleaning")
        rlm = dspy.RLM("lines: list[str] -> readings: int", interpreter_factory=session)
        rlm(lines=make_lines())
        with session() as interpreter:
            interpreter.execute("del lines")  # the readings are enough
            return interpreter.save(path, overwrite=True)


def ask(path: Path) -> str:
    """Ask a question in new sandboxes, each of which begins where the saved session ended."""

    def restored() -> SandboxInterpreter:
        interpreter = SandboxInterpreter()
        interpreter.restore(path)
        return interpreter

    question = "The session has a dict `readings`, and a function `mean(sensor)`. Which sensor is the warmest?"
    return str(dspy.RLM("question -> warmest", interpreter_factory=restored)(question=question).warmest)


#: What the scripted model does instead of thinking, by the name of the output that it is asked for.
SCRIPTS = {
    "readings": ScriptedActions(
        [
            (
                "Read what can be read; the rest I look at later.",
                """
from collections import defaultdict
from statistics import fmean

readings = defaultdict(list)
torn = (line for line in lines if line.endswith("?"))
for line in lines:
    _, sensor, degrees = line.split(";")
    if degrees != "?":
        readings[sensor].append(float(degrees))
""",
            ),
            (
                "A function for the questions that will come.",
                """
def mean(sensor):
    return fmean(readings[sensor])

SUBMIT(readings=sum(map(len, readings.values())))
""",
            ),
        ]
    ),
    "warmest": ScriptedActions([("Both are there.", "SUBMIT(warmest=max(readings, key=mean))")]),
}


def scripted(messages: Sequence[Message]) -> str:
    """Play the model; ``{warmest}`` in its instructions asks for that output."""
    script = next(script for output, script in SCRIPTS.items() if f"{{{output}}}" in messages[0].text)
    return script(messages)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
