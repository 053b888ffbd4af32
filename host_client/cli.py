"""The command ``rlm-sandbox``: set-up, the named sandbox, the demo.

What a command needs is imported by that command: ``--help`` answers at once, and ``down`` works without DSPy.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from host_client import __version__
from host_client.errors import SandboxError
from host_client.machine import Progress
from host_client.settings import DEFAULT_SANDBOX, SandboxSettings

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; an error of ours is one message, never a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["demo"] and not {"-h", "--help"} & set(arguments):
        # The demo reads its own options.
        return _guarded(lambda: _demo(arguments[1:]))
    parsed = _parser().parse_args(arguments)
    command: Command = parsed.command
    return _guarded(lambda: command(parsed))


def _guarded(command: Callable[[], int]) -> int:
    try:
        return command()
    except SandboxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlm-sandbox", description="A self-hosted Docker sandbox for dspy.RLM, on your own machine."
    )
    parser.add_argument("--version", action="version", version=f"rlm-sandbox {__version__}")
    commands = parser.add_subparsers(required=True, metavar="<command>")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=command)
        return added

    def add_named(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        added = add(name, command, text)
        added.add_argument("name", nargs="?", default=DEFAULT_SANDBOX, help="the sandbox's name (default: %(default)s)")
        return added

    add("setup", _setup, "engine, base image, image: whatever is missing")
    add("image", _image, "build the image if its sources or packages changed, and print its tag")
    add_named("up", _up, "start a named sandbox and say what to type next")
    add_named("down", _down, "stop a named sandbox and remove all of it")
    add("status", _status, "what is running, since when, with how many sessions")
    logs = add_named("logs", _logs, "a sandbox's structured logs")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until interrupted")
    shown = add("calls", _calls, "the record of tool calls: when, where, which, how it ended")
    shown.add_argument("-n", "--limit", type=int, default=100, help="at most so many (default: %(default)s)")
    shown.add_argument("--json", action="store_true", help="one JSON object for each line")
    _add_history(add("history", _history, "what runs did: model, code, output, calls, what they cost"))
    _add_sessions(add("sessions", _sessions, "the sessions in your sandboxes: state, age, who holds them; close one"))
    add_named("devsh", _devsh, "a shell inside a sandbox")
    secrets = add("secrets", _secrets, "are secrets there, and do they arrive in a sandbox; their values are not shown")
    secrets.add_argument("action", choices=["check"])
    secrets.add_argument("names", nargs="*", metavar="NAME", help="variables (default: those in RLM_SANDBOX_SECRETS)")
    saved = add("inspect", _inspect, "what is in a saved session; nothing of it is run")
    saved.add_argument("file", type=Path, metavar="FILE", help="a file that interpreter.save() wrote")
    saved.add_argument("--json", action="store_true", help="one JSON object")
    add("doctor", _doctor, "does the boundary hold on this machine, and what would make it stronger")
    add("demo", lambda _: _demo([]), "an RLM reads all of DSPy's source through the sandbox")
    add("clean", _clean, "remove our containers, images and cached packages")
    return parser


def _add_sessions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sandbox", metavar="NAME", help="of this sandbox only")
    parser.add_argument("--json", action="store_true", help="one JSON object for each session and line")
    actions = parser.add_subparsers(dest="action", metavar="close")
    close = actions.add_parser("close", help="end a session", description="End a session; its variables are gone then.")
    close.add_argument("name", metavar="NAME", help="the session's name or id, or SANDBOX/NAME")
    close.add_argument("--force", action="store_true", help="while an execution runs in it, too")


def _add_history(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--limit", type=int, default=20, help="at most so many runs (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object for each run and line")
    actions = parser.add_subparsers(dest="action", metavar="show|prompts|export")
    about = {
        "show": "one run: each iteration's reasoning, code, output and calls",
        "prompts": "what a run's models were asked and what they answered",
        "export": "one run as JSON",
    }
    for name, text in about.items():
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("run", metavar="ID", help="the run's id, or its beginning")
        if name == "export":
            action.add_argument("--out", type=Path, metavar="FILE", help="write it to this file instead of stdout")
        else:
            action.add_argument("--full", action="store_true", help="leave nothing out")


def say(text: str) -> None:
    """Print one line of set-up at once, also into a pipe."""
    print(f"[set-up] {text}", flush=True)


def prepare(settings: SandboxSettings, progress: Progress = say) -> str:
    """Bring up whatever is missing: engine, base and image; or bubblewrap and its files. Return tag or folder."""
    from host_client.preparing import prepare

    return prepare(settings, progress)


def _setup(_: argparse.Namespace) -> int:
    prepare(SandboxSettings.from_environment())
    return 0


def _image(_: argparse.Namespace) -> int:
    # The tag alone on stdout, for scripts; the rest is for people.
    print(prepare(SandboxSettings.from_environment(), lambda text: print(f"[set-up] {text}", file=sys.stderr)))
    return 0


def _commands() -> Any:
    """Return the module with the commands about running sandboxes."""
    from host_client.providers.choice import BUBBLEWRAP, choose

    if choose(SandboxSettings.from_environment()).name == BUBBLEWRAP:
        import host_client.bubblewrap.commands as commands

        return commands
    import host_client.daemon as daemon

    return daemon


def _up(parsed: argparse.Namespace) -> int:
    settings = SandboxSettings.from_environment()
    prepare(settings)
    status: int = _commands().up(parsed.name, settings)
    return status


def _down(parsed: argparse.Namespace) -> int:
    status: int = _commands().down(parsed.name)
    return status


def _status(_: argparse.Namespace) -> int:
    status: int = _commands().status()
    return status


def _logs(parsed: argparse.Namespace) -> int:
    status: int = _commands().logs(parsed.name, parsed.follow)
    return status


def _calls(parsed: argparse.Namespace) -> int:
    from host_client.calls_view import calls

    return calls(SandboxSettings.from_environment(), limit=max(1, parsed.limit), as_json=parsed.json)


def _history(parsed: argparse.Namespace) -> int:
    from host_client.history import view

    history = view.of_settings(SandboxSettings.from_environment())
    if parsed.action == "show":
        return view.show_run(history, parsed.run, full=parsed.full)
    if parsed.action == "prompts":
        return view.show_prompts(history, parsed.run, full=parsed.full)
    if parsed.action == "export":
        return view.export_run(history, parsed.run, parsed.out)
    return view.show_runs(history, limit=max(1, parsed.limit), as_json=parsed.json)


def _sessions(parsed: argparse.Namespace) -> int:
    from host_client import sessions_view

    settings = SandboxSettings.from_environment()
    if parsed.action == "close":
        return sessions_view.close_one(settings, parsed.name, parsed.sandbox, force=parsed.force)
    return sessions_view.show_sessions(settings, parsed.sandbox, as_json=parsed.json)


def _devsh(parsed: argparse.Namespace) -> int:
    prepare(SandboxSettings.from_environment())
    status: int = _commands().devsh(parsed.name)
    return status


def _doctor(_: argparse.Namespace) -> int:
    from host_client.providers.choice import BUBBLEWRAP, choose

    settings = SandboxSettings.from_environment()
    prepare(settings)
    choice = choose(settings)
    if choice.name == BUBBLEWRAP:
        import host_client.bubblewrap.doctor as bubblewrap_doctor

        return bubblewrap_doctor.run(settings, choice.why)
    import host_client.doctor as doctor

    return doctor.run(settings, why=choice.why)


def _secrets(parsed: argparse.Namespace) -> int:
    import host_client.secrets_check as secrets_check

    return secrets_check.run(parsed.names, SandboxSettings.from_environment(), prepare=prepare)


def _inspect(parsed: argparse.Namespace) -> int:
    from host_client.saved_view import inspect

    return inspect(parsed.file, as_json=parsed.json)


def _demo(arguments: Sequence[str]) -> int:
    import host_client.demo as demo

    prepare(SandboxSettings.from_environment())
    return demo.main(list(arguments))


def _clean(_: argparse.Namespace) -> int:
    import shutil

    from host_client.bubblewrap.commands import remove_all
    from host_client.engine import connect_engine
    from host_client.image import remove_images
    from host_client.providers.container_spec import LABEL, LABEL_HOST_UID
    from host_client.reaper import remove_directory
    from host_client.wheels import cache_folder

    try:
        with connect_engine() as engine:
            for container in engine.list({LABEL: "", LABEL_HOST_UID: str(os.geteuid())}):
                engine.remove(container["Id"])
                remove_directory(container)
                print(f"[clean] removed container {container['Id'][:12]}")
            for tag in remove_images(engine):
                print(f"[clean] removed image {tag}")
    except SandboxError as error:
        print(f"[clean] containers and images not looked at: {error.message}")
    try:
        for name in remove_all():
            print(f"[clean] removed sandbox {name}")
    except SandboxError as error:
        print(f"[clean] sandboxes without an engine not looked at: {error.message}")
    if cache_folder().exists():
        shutil.rmtree(cache_folder(), ignore_errors=True)
        print(f"[clean] removed {cache_folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
