"""The smallest use: a question about a document that the model reads with code, in a sandbox.

python examples/quickstart.py              # with a key in the environment or in .env
python examples/quickstart.py --scripted   # without one
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import dspy

from host_client import SandboxInterpreter
from host_client.demo.models import ScriptedActions, example_model

DOCUMENT = Path(__file__).parent.parent / "README.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Ask and print the answer."""
    arguments = sys.argv[1:] if argv is None else argv
    with example_model(SCRIPT, only_scripted="--scripted" in arguments):
        rlm = dspy.RLM("document, question -> answer", interpreter_factory=SandboxInterpreter.factory())
        result = rlm(document=DOCUMENT.read_text(encoding="utf-8"), question="Which make commands are there?")
    print(result.answer)
    return 0


#: What the scripted model does instead of thinking.
SCRIPT = ScriptedActions(
    [
        (
            "I look for commands that start with make.",
            'import re\n\ncommands = sorted(set(re.findall(r"\\bmake [a-z][a-z-]+", document)))\nprint(commands)',
        ),
        ("That is the list.", 'SUBMIT(answer=", ".join(commands))'),
    ]
)

if __name__ == "__main__":
    sys.exit(main())
