"""A session that outlives its programs: one loads documents into it, another asks about them, a third looks and closes.

    python examples/shared_session.py [--scripted]

Three processes share it, one after the other; between them nobody holds it. They could be hours apart, or be killed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import host_client

FOLDER = Path(__file__).parent.parent / "docs" / "decisions"
SESSION = "library"
EIGHT_HOURS_S = 8 * 3600.0


def main(argv: Sequence[str] = ()) -> int:
    """Start a sandbox, let three programs use one session in it, and stop it."""
    options = parsed(argv)
    if options.part is not None:
        PARTS[options.part](options.sandbox, options.scripted)
        return 0
    command("host_client.cli", "up", options.sandbox, quiet=True)
    try:
        for part in PARTS:
            command(__file__, "--part", part, "--sandbox", options.sandbox, *["--scripted"] * options.scripted)
    finally:
        command("host_client.cli", "down", options.sandbox, quiet=True)
    return 0


def load(sandbox: str, scripted: bool) -> None:
    """Open the session and fill it; at the end of the block it is left, not closed."""
    with host_client.SandboxInterpreter.create(SESSION, sandbox=sandbox, ttl_s=EIGHT_HOURS_S) as interpreter:
        pages = {page.stem: page.read_text(encoding="utf-8") for page in sorted(FOLDER.glob("*.md"))}
        interpreter.execute("library = {name: text.split() for name, text in pages.items()}", {"pages": pages})
        words = interpreter.execute("sum(map(len, library.values()))")
    print(f"loaded {len(pages)} documents of {words:,} words", flush=True)


def ask(sandbox: str, scripted: bool) -> None:
    """Let an RLM go on in the session: the library is there, and is not sent again."""
    import dspy

    from host_client.demo.models import example_model

    factory = host_client.SandboxInterpreter.factory(attach=f"{sandbox}/{SESSION}")
    with example_model(script(), only_scripted=scripted):
        rlm = dspy.RLM("question -> longest: str, words: int", interpreter_factory=factory)
        result = rlm(
            question="The session has a dict `library` of lists of words, by name. Which one is longest? "
            "Keep its name in `best`."
        )
    print(f"asked: the longest is {result.longest}, {result.words:,} words", flush=True)


def look(sandbox: str, scripted: bool) -> None:
    """Say what is there, and close it."""
    for session in host_client.list_sessions(sandbox):
        held = f"held by {session.holder}" if session.holder else "held by nobody"
        print(f"there is {session.name}: {session.state}, {held}", flush=True)
    host_client.close_session(SESSION, sandbox=sandbox)
    print(f"closed; {len(host_client.list_sessions(sandbox))} are left", flush=True)


#: In this order, each in a process of its own.
PARTS = {"load": load, "ask": ask, "look": look}


def command(program: str, *arguments: str, quiet: bool = False) -> None:
    """Run a program of ours, or this file, to its end; what it prints is shown unless it went well and is quiet."""
    how = [program] if program == __file__ else ["-m", program]
    ran = subprocess.run([sys.executable, *how, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if not quiet or ran.returncode != 0:
        print(ran.stdout, end="", flush=True)
    if ran.returncode != 0:
        raise SystemExit(ran.returncode)


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripted", action="store_true", help="play the model, whatever keys there are")
    parser.add_argument("--sandbox", default="shared-session", help="name of the sandbox (default: %(default)s)")
    parser.add_argument("--part", choices=[*PARTS], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def script() -> object:
    """Return what the scripted model does instead of thinking."""
    from host_client.demo.models import ScriptedActions

    return ScriptedActions(
        [
            ("It is there, as somebody left it.", "print(len(library), 'documents')"),
            (
                "The longest list is the longest document.",
                "best = max(library, key=lambda name: len(library[name]))\n"
                "SUBMIT(longest=best, words=len(library[best]))",
            ),
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
