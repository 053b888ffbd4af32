"""Several documents, one question: generated code asks a sub-model about each of them and puts the answers together.

python examples/documents.py [--scripted]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import dspy

from host_client import SandboxInterpreter
from host_client.demo.models import ScriptedActions, example_model, first_sentence

PAGES = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))


def main(argv: Sequence[str] = ()) -> int:
    """Ask what each page of this project's documents is about."""
    with example_model(SCRIPT, only_scripted="--scripted" in argv):
        rlm = dspy.RLM(
            "documents: list[str], question: str -> answer: str", interpreter_factory=SandboxInterpreter.factory()
        )
        result = rlm(
            documents=[page.read_text(encoding="utf-8") for page in PAGES],
            question="What is each document about? One line each, in their order.",
        )
    print(result.answer)
    return 0


#: What the scripted model does instead of thinking.
SCRIPT = ScriptedActions(
    [
        ("How long are they?", "print([len(document) for document in documents])"),
        (
            "The beginning of each says what it is about; a sub-query reads it.",
            """
lines = []
for document in documents:
    title = document.partition("\\n")[0].strip("# ")
    lines.append(title + ": " + llm_query("Say in one sentence what this is about.\\n\\n" + document[:1500]))
print(len(lines), "lines")
""",
        ),
        ("One line for each: complete.", 'SUBMIT(answer="\\n".join(lines))'),
    ],
    first_sentence,
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
