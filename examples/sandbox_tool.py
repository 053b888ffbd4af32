"""A tool that runs inside the sandbox: its source goes there, so a call costs what a function call costs.

``custom_tool.py`` is the other kind: its tool runs on the host, with data that the sandbox never sees.

    python examples/sandbox_tool.py [--scripted]
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import dspy

import host_client
from host_client import SandboxInterpreter
from host_client.demo.models import ScriptedActions, example_model, first_sentence

DOCUMENT = Path(__file__).parent.parent / "README.md"


@host_client.tool(where="sandbox")
def matches_of(pattern: str, text: str) -> list[str]:
    """Return what a regular expression finds: its group 1, else all of it; ^ and $ are the ends of a line."""
    found = re.finditer(pattern, text, re.MULTILINE)
    return [match[1] if match.re.groups else match[0] for match in found]


class Outline(dspy.Signature):
    """Find the outline of a Markdown document with the tool matches_of, then describe it."""

    document: str = dspy.InputField()
    headings: list[str] = dspy.OutputField(desc="all headings of level 2")
    languages: list[str] = dspy.OutputField(desc="languages of the fenced code blocks, each once, sorted")
    structure: str = dspy.OutputField(desc="one sentence")


def main(argv: Sequence[str] = ()) -> int:
    """Outline this project's README."""
    with example_model(SCRIPT, only_scripted="--scripted" in argv):
        rlm = dspy.RLM(Outline, tools=[matches_of], interpreter_factory=SandboxInterpreter.factory())
        result = rlm(document=DOCUMENT.read_text(encoding="utf-8"))
    print("headings:", ", ".join(result.headings))
    print("languages:", ", ".join(result.languages))
    print("structure:", result.structure)
    return 0


#: What the scripted model does instead of thinking.
SCRIPT = ScriptedActions(
    [
        (
            "The tool finds headings and fences.",
            """
headings = matches_of("^## (.*)$", document)
languages = sorted(set(matches_of("^`{3}([a-z]+)$", document)))
print(headings, languages)
""",
        ),
        (
            "Now the sentence.",
            """
outline = "It has " + str(len(headings)) + " parts: " + ", ".join(headings) + "."
structure = llm_query("Describe the structure in one sentence.\\n\\n" + outline)
SUBMIT(headings=headings, languages=languages, structure=structure)
""",
        ),
    ],
    first_sentence,
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
