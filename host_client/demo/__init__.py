"""``make demo``: an RLM reads DSPy's own source in the sandbox, and its answer is checked.

``main`` is the command. ``host_client.demo.scripted_lm`` is useful in tests of your own: a model that is
a script, behind a real OpenAI-compatible server.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_RIGHT, _WRONG, _FAILED, _INTERRUPTED = 0, 1, 2, 130

_SANDBOX = "a Docker container of its own: no network, read-only root, another user"


def main(argv: Sequence[str] | None = None, *, factory: Callable[[], Any] | None = None) -> int:
    """Run the demo.

    Args:
        argv: Command-line arguments after the command's name; None for those of this process.
        factory: Makes the interpreter; None for the Docker sandbox.

    Returns:
        0 if the answer was right, 1 if it was wrong, 2 if there was none, 130 after Ctrl-C.
    """
    options = _parser().parse_args(argv)

    from host_client.demo.app import Plan, run
    from host_client.demo.keys import choose_model
    from host_client.demo.screen import choose_screen

    screen = choose_screen()
    model = None if options.scripted else choose_model(os.environ, Path(".env"))
    try:
        plan = Plan(
            factory=_sandbox_factory() if factory is None else factory,
            sandbox=_SANDBOX if factory is None else f"none: {getattr(factory, '__name__', factory)}",
            model=model,
            think=not options.fast,
            out_dir=options.out,
        )
        return _RIGHT if run(plan, screen) else _WRONG
    except KeyboardInterrupt:
        screen.failure("interrupted")
        return _INTERRUPTED
    except BrokenPipeError:  # whoever read the output has seen enough; the exit must not try to write the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _FAILED
    except Exception as error:  # a command ends with a sentence, not with a traceback
        text = f"{type(error).__name__}: {error}"
        screen.failure(text if model is None else model.redact(text))
        return _FAILED


def _sandbox_factory() -> Callable[[], Any]:
    from host_client import SandboxInterpreter, SandboxSettings

    factory: Callable[[], Any] = SandboxInterpreter.factory(settings=SandboxSettings.from_environment())
    return factory


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlm-sandbox demo",
        description="An RLM reads DSPy's own source in the sandbox and lists its modules and optimizers. With an API "
        "key in the environment or in ./.env a real model plays (that costs tokens); without one, a scripted model.",
    )
    parser.add_argument("--scripted", action="store_true", help="use the scripted model even if there is a key")
    parser.add_argument("--fast", action="store_true", help="the scripted model does not pause before it replies")
    parser.add_argument(
        "--out", type=Path, default=_state_dir(), metavar="DIR", help="where the trajectory goes (%(default)s)"
    )
    return parser


def _state_dir() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "rlm-sandbox" / "demo"
