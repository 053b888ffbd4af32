"""What a user can get wrong in the arguments of an interpreter; nothing has run when one of these raises."""

from __future__ import annotations

import keyword
import math
import os
import re
from collections.abc import Mapping, Set
from typing import Any

from broker.protocol import limits
from broker.protocol.messages import OutputField
from broker.protocol.opening import MAX_NAME_CHARS
from host_client.budgets import Budget
from host_client.errors import BadSetting
from host_client.secret_values import Secrets
from host_client.settings import SandboxSettings
from host_client.tool_definitions import RESERVED_NAMES, named_tools

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_FIELD_TYPES = frozenset({"str", "int", "float", "bool", "list", "dict", "NoneType"})


def check_keywords(
    *,
    tools: Any,
    output_fields: Any,
    execution_timeout_s: Any,
    settings: Any,
    sandbox: Any,
    callbacks: Any,
    session: Any = None,
    attach: Any = None,
    idempotent: Any = (),
    journal: Any = None,
    secrets: Any = None,
    on_tool_event: Any = None,
    artifacts_to: Any = None,
    budget: Any = None,
    pool: Any = None,
    provider: Any = None,
    keep: Any = False,
) -> None:
    """Check the constructor's arguments.

    Raises:
        BadSetting: One of them cannot work; the message names it.
    """
    named_tools(tools)
    read_output_fields(output_fields)
    if settings is not None and not isinstance(settings, SandboxSettings):
        raise BadSetting(f"settings must be a SandboxSettings, got {type(settings).__name__}")
    if sandbox is not None and (not isinstance(sandbox, str) or not sandbox):
        raise BadSetting(f"sandbox must be the name of a running sandbox, got {sandbox!r:.80}")
    _check_session(session, attach, sandbox)
    _check_keep(keep, session, sandbox)
    others = {"sandbox": sandbox, "attach": attach, "journal": journal, "provider": provider}
    if pool is not None and (given := [name for name, value in others.items() if value is not None]):
        raise BadSetting(f"{given[0]} cannot be set beside pool: the pool has its own")
    if pool is not None and not isinstance(pool, str) and not callable(getattr(pool, "acquire", None)):
        raise BadSetting(f"pool must be a SandboxPool or the name of one, got {type(pool).__name__}")
    if isinstance(idempotent, str) or not isinstance(idempotent, (Set, list, tuple)):
        raise BadSetting(f"idempotent must be a list of names of tools, got {idempotent!r:.80}")
    if journal is not None and not callable(getattr(journal, "intend", None)):
        raise BadSetting(f"journal must be a Journal, got {type(journal).__name__}; a path belongs in the settings")
    Secrets.of(secrets)
    if on_tool_event is not None and not callable(on_tool_event):
        raise BadSetting(f"on_tool_event must be callable, got {type(on_tool_event).__name__}")
    if artifacts_to is not None and not isinstance(artifacts_to, (str, os.PathLike)):
        raise BadSetting(f"artifacts_to must be the path of a folder, got {type(artifacts_to).__name__}")
    if callbacks is not None and not isinstance(callbacks, (list, tuple)):
        raise BadSetting(f"callbacks must be a list, got {type(callbacks).__name__}")
    if budget is not None and not isinstance(budget, Budget):
        raise BadSetting(f"budget must be a Budget, got {type(budget).__name__}")
    check_timeout(execution_timeout_s)


def _check_session(session: Any, attach: Any, sandbox: Any) -> None:
    if session is not None and (not isinstance(session, str) or not _NAME.fullmatch(session)):
        raise BadSetting(f"session must be 1 to 64 letters, digits, '_', '.' or '-', got {session!r:.80}")
    if attach is None:
        return
    if not isinstance(attach, str) or not attach:
        raise BadSetting(f"attach must be the name or id of a session, got {attach!r:.80}")
    if session is not None or sandbox is not None:
        raise BadSetting("attach stands alone: the session has its name and its sandbox (sandbox/session says both)")


def _check_keep(keep: Any, session: Any, sandbox: Any) -> None:
    if not isinstance(keep, bool):
        raise BadSetting(f"keep must be True or False, got {keep!r:.80}")
    if keep and (session is None or sandbox is None):
        missing = "session" if session is None else "sandbox"
        raise BadSetting(
            f"keep=True needs {missing}=: what is kept has a name, and a sandbox that outlives this program",
            help="start one with rlm-sandbox up; SandboxInterpreter.create(name) opens a session in it that is kept",
        )


def check_timeout(timeout_s: Any) -> None:
    """Check ``execution_timeout_s``: seconds, or None for no deadline.

    Raises:
        BadSetting: Neither.
    """
    if timeout_s is None:
        return
    number = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool)
    if not number or not math.isfinite(timeout_s) or not 0.001 <= timeout_s <= 1e9:
        raise BadSetting(f"execution_timeout_s must be seconds (at least 0.001) or None, got {timeout_s!r:.80}")


def read_output_fields(fields: Any) -> tuple[OutputField, ...] | None:
    """Read ``[{"name": "answer", "type": "str"}, ...]``; a type may also be the class itself.

    Raises:
        BadSetting: Not a list of such, a name that is no identifier, an unknown type, or a name given twice.
    """
    if fields is None:
        return None
    if not isinstance(fields, (list, tuple)):
        raise BadSetting(f"output_fields must be a list of dicts, got {type(fields).__name__}")
    read = tuple(_field(field) for field in fields)
    names = [field.name for field in read]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadSetting(f"output_fields: {twice[0]!r} is there more than once")
    return read


def check_variables(variables: Any, tool_names: Set[str]) -> dict[str, Any]:
    """Check the names of variables.

    Raises:
        BadSetting: Not a dict, a name that is no identifier, or one that the sandbox or a tool has.
    """
    if variables is None:
        return {}
    if not isinstance(variables, dict):
        raise BadSetting(f"variables must be a dict, got {type(variables).__name__}")
    for name in variables:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise BadSetting(f"variable name {name!r:.80} is not a Python identifier")
        if name in RESERVED_NAMES:
            raise BadSetting(f"variable name {name!r} is taken: the sandbox defines it")
        if name in tool_names:
            raise BadSetting(f"variable name {name!r} is the name of a tool")
    return variables


def check_code(code: Any) -> str:
    """Check that the code is text.

    Raises:
        BadSetting: It is not.
    """
    if not isinstance(code, str):
        raise BadSetting(f"code must be a str, got {type(code).__name__}")
    return code


def _field(field: Any) -> OutputField:
    name = field.get("name") if isinstance(field, Mapping) else None
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise BadSetting(f"output_fields: {field!r:.80} has no name that is a Python identifier")
    kind = field.get("type")
    kind = kind.__name__ if isinstance(kind, type) else kind
    if kind is not None and kind not in _FIELD_TYPES:
        raise BadSetting(
            f"output_fields: {name!r} has the type {kind!r:.80}; known are {', '.join(sorted(_FIELD_TYPES))}"
        )
    return OutputField(name=name, type=kind)


def check_snapshot_name(name: Any) -> None:
    """Check what a snapshot is to be called.

    Raises:
        BadSetting: It cannot be.
    """
    if name is not None and not (isinstance(name, str) and 1 <= len(name) <= MAX_NAME_CHARS and name.isprintable()):
        raise BadSetting(f"a snapshot's name is 1 to {MAX_NAME_CHARS} characters that can be printed, got {name!r:.80}")


def check_fork_count(count: Any) -> None:
    """Check how many branches are wanted.

    Raises:
        BadSetting: There cannot be that many.
    """
    if type(count) is not int or not 1 <= count < limits.MAX_FAMILY:
        raise BadSetting(f"fork() makes 1 to {limits.MAX_FAMILY - 1} branches, got {count!r:.80}")
