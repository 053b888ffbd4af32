"""What did the model do? Each step's reasoning, code and output are in ``result.trajectory``, errors included.

``rlm-sandbox history show ID`` shows the same of every run afterwards, with sub-queries, times and tokens.

    python examples/trajectory.py [--scripted]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import dspy

from host_client import SandboxInterpreter
from host_client.demo.models import ScriptedActions, example_model, first_sentence

TEXT = Path(__file__).parent.parent / "CHANGELOG.md"


def main(argv: Sequence[str] = ()) -> int:
    """Have a text summed up and print how that went."""
    with example_model(SCRIPT, only_scripted="--scripted" in argv):
        rlm = dspy.RLM("text -> summary", interpreter_factory=SandboxInterpreter.factory())
        result = rlm(text=TEXT.read_text(encoding="utf-8"))
    for number, step in enumerate(result.trajectory, 1):
        print(f"--- step {number}: {step['reasoning']}")
        print(step["code"])
        print("=>", shortened(step["output"]))
    print(f"--- {len(result.trajectory)} steps: {result.summary}")
    return 0


def shortened(output: str, limit: int = 300) -> str:
    """Return an output of at most so many characters: the end of an error says what it was, so the middle goes."""
    return output if len(output) <= limit else f"{output[: limit // 2]} ... {output[-limit // 2 :]}"


#: What the scripted model does instead of thinking.
SCRIPT = ScriptedActions(
    [
        ("How long is it, and how does it begin?", "print(len(text), text[:80])"),
        ("A sub-query reads the beginning.", 'summary = llm_query("Sum this up.\\n\\n" + txt[:2000])'),
        (
            "A slip: the variable is called text. The session is as it was, so I correct the line.",
            'summary = llm_query("Sum this up.\\n\\n" + text[:2000])\nprint(summary)',
        ),
        ("Complete.", "SUBMIT(summary=summary)"),
    ],
    first_sentence,
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
