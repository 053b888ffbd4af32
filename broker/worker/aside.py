"""What the host asks of a session beside generated code: files, artefacts, which packages there are.

The host posts an execution of two lines that import ``serve`` and call it; the request is a variable. Both names are
taken out of the namespace before anything else happens, so that generated code finds it as it was. All of this runs
with the session's own rights, and generated code could change it: the host believes nothing that it answers.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from broker.worker import artifacts, files

SERVE, REQUEST = "__rlm_sandbox_serve__", "__rlm_sandbox_request__"


def serve() -> dict[str, Any] | str:
    """Do what the caller's namespace asks for.

    Returns:
        ``{"answer": ...}``, or an answer itself that is a text, or ``{"error": text, "path": path}``.
    """
    namespace = sys._getframe(1).f_globals
    namespace.pop(SERVE, None)
    request = namespace.pop(REQUEST)
    try:
        operation = request.pop("operation")
        if operation in _OF_THE_NAMESPACE:
            request["namespace"] = namespace
        answer = OPERATIONS[operation](**request)
        return answer if isinstance(answer, str) else {"answer": answer}
    except files.Refused as refused:
        return {"error": str(refused), "path": refused.path}
    except OSError as error:
        return {
            "error": error.strerror or str(error),
            "path": error.filename if isinstance(error.filename, str) else "",
        }


def missing(requirements: list[str], modules: list[str]) -> dict[str, str]:
    """Return what is not there, and in which version it is there where another one is wanted.

    Args:
        requirements: Packages, as ``NAME`` or ``NAME==VERSION``.
        modules: Top-level modules to import.
    """
    import importlib.metadata  # it costs more than all the rest of this, and few ask

    found = {}
    for requirement in requirements:
        name, _, wanted = requirement.partition("==")
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[requirement] = ""
            continue
        if wanted not in ("", version):
            found[requirement] = version
    return found | {name: "" for name in modules if not _has_module(name)}


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # one without a spec, made by hand, is there all the same
        return name in sys.modules


def saving(step: str, **arguments: Any) -> Any:
    """Take a step of saving or restoring the namespace; see ``broker.worker.durable``."""
    from broker.worker.durable import packages, restorer, saver  # few sessions ever do

    steps: dict[str, Callable[..., Any]] = {
        "versions": packages.versions,
        "start": saver.start,
        "wait": saver.wait,
        "part": saver.part,
        "end": saver.end,
        "restore": restorer.start,
        "restore_part": restorer.part,
        "restore_load": restorer.load,
    }
    return steps[step](**arguments)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "list": files.listing,
    "read": files.read,
    "write": files.write,
    "folders": files.make_folders,
    "missing": missing,
    "artifacts": artifacts.collect,
    "save": lambda **arguments: saving("start", **arguments),
    "restore": lambda **arguments: saving("restore_load", **arguments),
    "saving": saving,
}
#: These are given the caller's namespace.
_OF_THE_NAMESPACE = frozenset({"save", "restore"})
