"""The source of a function that is sent into the sandbox to run there as a tool."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import dis
import inspect
import math
import re
import sys
import textwrap
import types
from collections.abc import Collection, Iterator
from typing import Any

from host_client.errors import BadSetting

_REQUIREMENT = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?(?:==[A-Za-z0-9.+!_-]+)?")
_LOADS_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
#: A constant of the module that the function uses is sent with it; a longer one is data, to be passed as an argument.
_MAX_CONSTANT_CHARS = 1_000
#: Under this name the worker finds the function once the source has run.
FUNCTION_NAME = "__tool__"


@dataclasses.dataclass(frozen=True, slots=True)
class SandboxSource:
    """What is sent of a tool that runs in the sandbox.

    Attributes:
        text: Python source that defines the function and binds it to ``FUNCTION_NAME``.
        requirements: Packages that it needs there, as ``NAME`` or ``NAME==VERSION``.
        modules: Top-level modules that it imports and that are not the standard library's.
    """

    text: str
    requirements: tuple[str, ...]
    modules: tuple[str, ...]


def check_requirements(tool: str, requirements: Any) -> tuple[str, ...]:
    """Read the packages that a tool needs.

    Raises:
        BadSetting: Not a list of names; the message names the tool.
    """
    if isinstance(requirements, str) or not isinstance(requirements, Collection):
        raise BadSetting(f"tool {tool!r}: requirements must be a list of packages, got {requirements!r:.80}")
    for each in requirements:
        if not isinstance(each, str) or not _REQUIREMENT.fullmatch(each):
            raise BadSetting(f"tool {tool!r}: requirement {each!r:.80} must be NAME or NAME==VERSION")
    return tuple(requirements)


def sandbox_source(tool: str, function: Any, requirements: tuple[str, ...]) -> SandboxSource:
    """Return the source of a function with the imports and constants of its module that it uses.

    Args:
        tool: The tool's name, for errors.
        function: A plain function with a ``def`` of its own.
        requirements: Packages that it needs.

    Raises:
        BadSetting: It has no source, or uses what cannot be sent; the message names it.
    """
    plain = _plain_function(tool, function)
    segment, node = _definition(tool, plain)
    header, modules = [], set()
    for name in sorted(_names_used(plain, node) - {node.name}):
        line, module = _bring(tool, plain, name)
        header.append(line)
        if module is not None and module not in sys.stdlib_module_names:
            modules.add(module)
    lines = [*filter(None, header), segment.rstrip("\n"), f"{FUNCTION_NAME} = {node.name}"]
    return SandboxSource("\n".join(lines) + "\n", requirements, tuple(sorted(modules)))


def _plain_function(tool: str, function: Any) -> types.FunctionType:
    if not isinstance(function, types.FunctionType):
        kind = type(function).__name__
        raise BadSetting(
            f"tool {tool!r} cannot run in the sandbox: it is a {kind}, and only a plain function has source"
        )
    if hasattr(function, "__wrapped__"):
        raise BadSetting(f"tool {tool!r} cannot run in the sandbox: another decorator's wrapper stays on the host")
    if inspect.iscoroutinefunction(function):
        raise BadSetting(f"tool {tool!r} cannot run in the sandbox as an async function: write it without async")
    if function.__name__ == "<lambda>":
        raise BadSetting(f"tool {tool!r} cannot run in the sandbox: it is a lambda; write it with def")
    if outer := function.__code__.co_freevars:
        raise BadSetting(
            f"tool {tool!r} cannot run in the sandbox: it uses {', '.join(map(repr, outer))} of the function around it",
            help="make them parameters, or constants inside the tool",
        )
    return function


def _definition(tool: str, function: types.FunctionType) -> tuple[str, ast.FunctionDef]:
    """Return the text from ``def`` on, without decorators, and its syntax tree."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        raise BadSetting(
            f"tool {tool!r} cannot run in the sandbox: its source cannot be read",
            help="define it in a file, not in an interactive session or by exec()",
        ) from None
    text = textwrap.dedent(source)
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a string of several lines at its left margin keeps the text from being dedented
        raise BadSetting(
            f"tool {tool!r} cannot run in the sandbox: its source cannot be read apart from what is around it",
            help="define it at the left margin of a file",
        ) from None
    node = tree.body[0] if tree.body else None
    if not isinstance(node, ast.FunctionDef):
        raise BadSetting(f"tool {tool!r} cannot run in the sandbox: its source is no def")
    return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno]), node


def _names_used(function: types.FunctionType, node: ast.FunctionDef) -> set[str]:
    """Return the names of the module that body and defaults use; annotations are not evaluated there."""
    defaults = [each for each in (*node.args.defaults, *node.args.kw_defaults) if each is not None]
    loaded = {each.id for default in defaults for each in ast.walk(default) if isinstance(each, ast.Name)}
    for code in _codes(function.__code__):
        loaded |= {each.argval for each in dis.get_instructions(code) if each.opname in _LOADS_GLOBAL}
        if changed := [each.argval for each in dis.get_instructions(code) if each.opname == "STORE_GLOBAL"]:
            loaded |= set(changed)
    own = {"__name__", "__builtins__", "__qualname__", "__module__"}
    return {name for name in loaded if name not in own}


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _bring(tool: str, function: types.FunctionType, name: str) -> tuple[str, str | None]:
    """Return the line that defines a name over there, and the top-level module that it needs."""
    scope = function.__globals__
    if name not in scope:
        if hasattr(builtins, name):
            return "", None
        raise BadSetting(f"tool {tool!r} cannot run in the sandbox: it uses {name!r}, which is not defined")
    value = scope[name]
    if isinstance(value, types.ModuleType):
        return f"import {value.__name__} as {name}", value.__name__.partition(".")[0]
    if _is_constant(value) and len(text := repr(value)) <= _MAX_CONSTANT_CHARS:
        return f"{name} = {text}", None
    if (home := _importable_from(value, function.__module__)) is not None:
        module, attribute = home
        return f"from {module} import {attribute} as {name}", module.partition(".")[0]
    raise BadSetting(
        f"tool {tool!r} cannot run in the sandbox: it uses {name!r} ({type(value).__name__}) of the module around it",
        help="define it inside the tool, or pass it as an argument; modules and short constants may be used",
    )


def _is_constant(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_constant, value))
    if type(value) is float:
        return math.isfinite(value)
    return type(value) in (type(None), bool, int, str, bytes)


def _importable_from(value: Any, own_module: str) -> tuple[str, str] | None:
    """Return module and name of a function or class of the standard library, or None for anything else."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module in (own_module, "__main__", "builtins"):
        return None
    known = sys.modules.get(module)
    top = module.partition(".")[0]
    if known is None or top not in sys.stdlib_module_names or getattr(known, name, None) is not value:
        return None
    return module, name
