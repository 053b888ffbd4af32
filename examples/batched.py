"""Many sub-queries at once: ``llm_query_batched`` sends them side by side and returns the answers in their order.

python examples/batched.py [--scripted]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import dspy

from host_client import SandboxInterpreter
from host_client.demo.models import ScriptedActions, example_model, first_sentence

RECORDS = sorted((Path(__file__).parent.parent / "docs" / "decisions").glob("*.md"))


def main(argv: Sequence[str] = ()) -> int:
    """Have this project's decision records summed up, one line each."""
    with example_model(SCRIPT, only_scripted="--scripted" in argv):
        rlm = dspy.RLM(
            dspy.Signature(
                "records: dict[str, str] -> decisions: dict[str, str]",
                "Say for each record, in one sentence, what was decided. Use llm_query_batched.",
            ),
            interpreter_factory=SandboxInterpreter.factory(),
        )
        result = rlm(records={path.stem: path.read_text(encoding="utf-8") for path in RECORDS})
    for name, decision in result.decisions.items():
        print(f"{name}: {decision}")
    return 0


#: What the scripted model does instead of thinking.
SCRIPT = ScriptedActions(
    [
        (
            "They are independent of each other: one batch.",
            """
prompts = ["What was decided? One sentence.\\n\\n" + text for text in records.values()]
decisions = dict(zip(records, llm_query_batched(prompts)))
print({name: len(decision) for name, decision in decisions.items()})
""",
        ),
        ("One for each record.", "SUBMIT(decisions=decisions)"),
    ],
    first_sentence,
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
