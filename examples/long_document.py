"""A document too long for a prompt: code searches it, and only the piece that needs reading goes to a sub-model.

python examples/long_document.py [--scripted]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import dspy

from host_client import SandboxInterpreter
from host_client.demo.models import ScriptedActions, example_model, first_sentence

ROOT = Path(__file__).parent.parent


class ReadManual(dspy.Signature):
    """Search the manual with code for the tables that are asked for; give llm_query single passages, never all."""

    manual: str = dspy.InputField(desc="a program's whole documentation, in Markdown")
    settings: list[str] = dspy.OutputField(desc="names of all settings, as in the table of settings")
    errors: list[str] = dspy.OutputField(desc="names of all errors, as in the table for troubleshooting")
    purpose: str = dspy.OutputField(desc="one sentence: what the program is")


def main(argv: Sequence[str] = ()) -> int:
    """Extract three things from this project's manual."""
    manual = read_manual()
    print(f"{len(manual):,} characters")
    with example_model(SCRIPT, only_scripted="--scripted" in argv):
        result = dspy.RLM(ReadManual, interpreter_factory=SandboxInterpreter.factory())(manual=manual)
    print("purpose:", result.purpose)
    print("settings:", *result.settings)
    print("errors:", *result.errors)
    return 0


def read_manual() -> str:
    """Return the README and all pages after it."""
    return "\n\n".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")])


#: What the scripted model does instead of thinking.
SCRIPT = ScriptedActions(
    [
        (
            "What is in it? I print the headings only.",
            'import re\n\nprint(re.findall(r"^#+ .*", manual, re.MULTILINE))',
        ),
        (
            "Both lists are first columns of tables.",
            """
def first_column(heading):
    table = manual.partition(f"\\n| {heading} |")[2].partition("\\n\\n")[0]
    cells = [row.split(" | ")[0] for row in table.splitlines()[2:]]
    return [name for cell in cells for name in re.findall(r"`(\\w+)`", cell)]

settings, errors = first_column("setting"), first_column("error")
print(len(settings), settings[:3], len(errors), errors[:3])
""",
        ),
        (
            "What it is for stands at the beginning; that takes reading.",
            'purpose = llm_query("What is this program? One sentence.\\n\\n" + manual[:1000])\nprint(purpose)',
        ),
        ("Complete.", "SUBMIT(settings=settings, errors=errors, purpose=purpose)"),
    ],
    first_sentence,
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
