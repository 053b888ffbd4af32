"""What the broker's packages import and a broker never uses is left out: loading it took a third of the start.

Flask loads a template engine, command lines and a development server; the standard library loads OpenSSL. None of it
serves a request here. Each name of a module that is left out is a class that cannot be made, so that whatever should
come to use one says so. For the broker's own program alone, whose packages are pinned (``requirements-broker.txt``).
"""

from __future__ import annotations

import contextlib
import gc
import sys
import types
from collections.abc import Iterator
from typing import Any, NoReturn

#: Packages and modules of which only names are imported.
LEFT_OUT = ("click", "itsdangerous", "jinja2", "jinja2.loaders", "werkzeug.serving", "werkzeug.test")
#: Modules without which others do as well: ``http.client`` and ``hashlib`` (which has its own of all that OpenSSL has).
DONE_WITHOUT = ("ssl", "_hashlib")


class LeftOut(types.ModuleType):
    """A module with a class for every name that is asked for."""

    __path__: list[str] = []  # noqa: RUF012 - as modules have it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        # An exception, so that it can be a base class as well as stand after ``except``.
        made = type(name, (Exception,), {"__init__": _refuse, "__module__": self.__name__})
        setattr(self, name, made)
        return made


class NoCommands:
    """In the place of ``flask.cli.AppGroup``: every Flask app and blueprint makes one."""

    name: str | None = None
    commands: tuple[()] = ()


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """Import what a broker needs in here; nothing of it is left for the garbage collector to look at afterwards."""
    gc.disable()
    sys.modules.update({name: LeftOut(name) for name in LEFT_OUT})
    commands: Any = LeftOut("flask.cli")
    commands.AppGroup = NoCommands
    sys.modules["flask.cli"] = commands
    without: Any = dict.fromkeys(set(DONE_WITHOUT) - set(sys.modules))
    sys.modules.update(without)
    try:
        yield
    finally:
        for name in without:
            del sys.modules[name]
        gc.freeze()
        gc.enable()


def _refuse(self: Any, *args: Any, **keywords: Any) -> NoReturn:
    kind = type(self)
    raise RuntimeError(f"{kind.__module__}.{kind.__qualname__} is left out of the broker: see broker/lean_imports.py")
