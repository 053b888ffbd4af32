"""What the sandbox is told about a tool, and how a call from there is bound to the host's function."""

from __future__ import annotations

import builtins
import inspect
import keyword
import sys
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from broker.protocol.messages import ToolDefinition, ToolParameter
from host_client.errors import BadSetting
from host_client.tool_docs import with_returns
from host_client.tool_marks import check_runnable, marks_of, name_of

#: Longer texts of defaults, annotations and docstrings say nothing more to a model.
_MAX_DEFAULT_CHARS = 200
_MAX_ANNOTATION_CHARS = 500
_MAX_DOC_CHARS = 20_000

#: Names that the sandbox sets itself.
RESERVED_NAMES = frozenset({"SUBMIT", "__builtins__"})
_BUILTIN_NAMES = frozenset(dir(builtins))
_LITERALS = (type(None), bool, int, float, str, bytes)


class HostTool:
    """One tool: the callable, its definition for the sandbox, and how arguments are bound.

    Args:
        name: Global name in the session.
        function: Any callable, also a ``dspy.Tool``.
        idempotent: Whether it counts as idempotent whatever it says itself.
    """

    def __init__(self, name: str, function: Callable[..., Any], *, idempotent: bool = False) -> None:
        self.name = name
        self.function = function
        self.marks = marks_of(function)
        self.signature = _signature(function)
        # Most tools have ordinary parameters only; binding those the long way takes ten times as long.
        self._plain_names = _plain_names(self.signature)
        self._adapters = {} if _is_dspy_tool(function) else _model_adapters(function, self.signature)
        self.definition = _definition(self, idempotent or self.marks.idempotent)

    def call(self, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Call the function; what it returns may still have to be awaited.

        Positional arguments become keywords where the signature allows, because the wrappers that DSPy
        puts around tools take keywords only. Parameters annotated with a pydantic model (or with a
        container of such) get model instances, made from the dicts that generated code sends.

        Raises:
            TypeError: The arguments do not fit the signature.
            NameError: It runs in the sandbox: whoever calls it here has forged the call.
        """
        if self.marks.shipped is not None:
            raise NameError(f"there is no tool {self.name!r} on the host; it runs in the sandbox")
        if args and self.signature is not None:
            if len(args) <= len(self._plain_names) and kwargs.keys().isdisjoint(self._plain_names):
                args, kwargs = [], {**dict(zip(self._plain_names, args, strict=False)), **kwargs}
            else:
                args, kwargs = _by_keyword(self.signature, args, kwargs)
        for name in self._adapters.keys() & kwargs.keys():
            kwargs[name] = self._adapters[name](kwargs[name])
        return self.function(*args, **kwargs)


class ToolTable:
    """The tools of an interpreter as they were at the last ``refresh``.

    Args:
        idempotent: Names of tools that count as idempotent whatever they say themselves.
    """

    def __init__(self, idempotent: Collection[str] = ()) -> None:
        self._idempotent = frozenset(idempotent)
        self._tools: dict[str, HostTool] = {}

    def get(self, name: str) -> HostTool | None:
        """Return a tool of the last refresh."""
        return self._tools.get(name)

    def is_idempotent(self, name: str) -> bool:
        """Tell whether a tool of the last refresh may run twice for one call."""
        return name in self._tools and self._tools[name].definition.idempotent

    def names(self) -> frozenset[str]:
        """Return the names of the last refresh."""
        return frozenset(self._tools)

    def shipped(self) -> tuple[HostTool, ...]:
        """Return the tools of the last refresh that run in the sandbox."""
        return tuple(tool for tool in self._tools.values() if tool.marks.shipped is not None)

    def definitions(self) -> tuple[ToolDefinition, ...]:
        """Return what the sandbox is told."""
        return tuple(tool.definition for tool in self._tools.values())

    def refresh(self, live: Mapping[str, Callable[..., Any]]) -> bool:
        """Take over additions, removals and replacements; tell whether there were any.

        Raises:
            BadSetting: A name that cannot be a global, or a value that cannot be called.
        """
        tools = self._tools
        items = list(live.items())
        if len(items) == len(tools) and all(
            name in tools and tools[name].function is function for name, function in items
        ):
            return False
        for name, function in items:
            check_tool(name, function)
        self._tools = {name: self._tool(name, function) for name, function in items}
        return True

    def _tool(self, name: str, function: Callable[..., Any]) -> HostTool:
        known = self._tools.get(name)
        return (
            known
            if known is not None and known.function is function
            else HostTool(name, function, idempotent=name in self._idempotent)
        )


def check_tool(name: Any, function: Any) -> None:
    """Refuse a tool that could not work.

    Raises:
        BadSetting: The name is no identifier, or would hide a keyword, a builtin or a name of the
            sandbox; or the tool is not callable.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise BadSetting(f"tool name {name!r:.80} is not a Python identifier")
    if keyword.iskeyword(name):
        raise BadSetting(f"tool name {name!r} is a Python keyword")
    if name in RESERVED_NAMES:
        raise BadSetting(f"tool name {name!r} is taken: the sandbox defines it")
    if name in _BUILTIN_NAMES:
        raise BadSetting(f"tool name {name!r} would hide Python's builtin of that name; give the tool another name")
    check_runnable(name, function)


def named_tools(tools: Mapping[str, Callable[..., Any]] | Iterable[Callable[..., Any]] | None) -> dict[str, Any]:
    """Return tools by name: a dict as it is, a list by the tools' own names.

    Raises:
        BadSetting: Neither, a tool of a list without a name, two of the same name, or one that could not work.
    """
    if tools is None:
        return {}
    if isinstance(tools, Mapping):
        named = dict(tools)
    elif isinstance(tools, (list, tuple)):
        named = _by_name(tools)
    else:
        raise BadSetting(f"tools must be a dict of name and callable, or a list of them, got {type(tools).__name__}")
    for name, function in named.items():
        check_tool(name, function)
    return named


def _by_name(tools: Iterable[Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for function in tools:
        name = name_of(function)
        if name is None:
            raise BadSetting(
                f"tools: {function!r:.80} has no name", help="give it one: host_client.tool(function, name='...')"
            )
        if name in named:
            raise BadSetting(
                f"tools: there are two called {name!r}", help="rename one: host_client.tool(function, name='...')"
            )
        named[name] = function
    return named


def _is_dspy_tool(function: Any) -> bool:
    dspy = sys.modules.get("dspy")
    return dspy is not None and isinstance(function, getattr(dspy, "Tool", ()))


def _signature(function: Any) -> inspect.Signature | None:
    """Return the signature that generated code shall see; None where Python cannot tell it."""
    try:
        if not _is_dspy_tool(function):
            return inspect.signature(function)
        own = inspect.signature(function.func)
    except (TypeError, ValueError):
        return None
    return _signature_of_schema(function, own)


def _signature_of_schema(tool: Any, own: inspect.Signature) -> inspect.Signature:
    """A ``dspy.Tool`` made from MCP or LangChain takes ``**kwargs``; its real parameters stand in its schema."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    schema = getattr(tool, "args", None)
    if not schema or not all(parameter.kind in variable for parameter in own.parameters.values()):
        return own
    named = [name for name in schema if name.isidentifier() and not keyword.iskeyword(name)]
    named = [name for name in named if name not in own.parameters]
    ordered = sorted(named, key=lambda name: "default" in schema[name])
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=schema[name].get("default", inspect.Parameter.empty),
            annotation=schema[name].get("type", inspect.Parameter.empty),
        )
        for name in ordered
    ]
    return inspect.Signature(parameters) if parameters else own


def _plain_names(signature: inspect.Signature | None) -> tuple[str, ...]:
    """Return the parameters' names where each may be given either way, else nothing."""
    parameters = () if signature is None else tuple(signature.parameters.values())
    plain = all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    return tuple(parameter.name for parameter in parameters) if plain else ()


def _by_keyword(
    signature: inspect.Signature, args: list[Any], kwargs: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    bound = signature.bind(*args, **kwargs)
    positional: list[Any] = []
    named: dict[str, Any] = {}
    spread = any(
        parameter.kind is parameter.VAR_POSITIONAL and bound.arguments.get(name)
        for name, parameter in signature.parameters.items()
    )
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            positional.extend(value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is inspect.Parameter.POSITIONAL_ONLY or (spread and kind is inspect.Parameter.POSITIONAL_OR_KEYWORD):
            positional.append(value)
        else:
            named[name] = value
    return positional, named


def _definition(tool: HostTool, idempotent: bool) -> ToolDefinition:
    function: Any = tool.function
    signature, shipped = tool.signature, tool.marks.shipped
    described = function.func if _is_dspy_tool(function) else function
    doc = (getattr(function, "desc", None) if described is not function else None) or inspect.getdoc(described) or ""
    return ToolDefinition(
        name=tool.name,
        parameters=None if signature is None else _parameters(signature),
        doc=with_returns(doc, described, signature_shown=True)[:_MAX_DOC_CHARS],
        returns=None if signature is None else _annotation(signature.return_annotation),
        idempotent=idempotent,
        source=None if shipped is None else shipped.text,
    )


def _parameters(signature: inspect.Signature) -> tuple[ToolParameter, ...] | None:
    if any(not name.isidentifier() or keyword.iskeyword(name) for name in signature.parameters):
        return None  # only a hand-made __signature__ has such; then anything is passed on
    return tuple(
        ToolParameter(
            name=parameter.name,
            kind=parameter.kind.name.lower(),
            default=_default(parameter.default),
            annotation=_annotation(parameter.annotation),
        )
        for parameter in signature.parameters.values()
    )


def _default(default: Any) -> str | None:
    """Text of a default; only literals are spelled out, as a ``repr`` may show paths and addresses of the host."""
    if default is inspect.Parameter.empty:
        return None
    if isinstance(default, (list, tuple, dict, set, frozenset)) and not default:
        return repr(default)
    text = repr(default) if type(default) in _LITERALS else "..."
    return text if len(text) <= _MAX_DEFAULT_CHARS else "..."


def _annotation(annotation: Any) -> str | None:
    if annotation is inspect.Parameter.empty:
        return None
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text.replace("typing.", "")[:_MAX_ANNOTATION_CHARS]


def _model_adapters(function: Any, signature: inspect.Signature | None) -> dict[str, Callable[[Any], Any]]:
    """Return a validator for each parameter whose annotation names a pydantic model."""
    pydantic = sys.modules.get("pydantic")
    if pydantic is None or signature is None:
        return {}
    try:
        hints = typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    except Exception:  # an annotation that cannot be resolved is the function's own affair
        return {}
    return {
        name: pydantic.TypeAdapter(hints[name]).validate_python
        for name, parameter in signature.parameters.items()
        if name in hints and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.kind is not parameter.POSITIONAL_ONLY and _names_a_model(hints[name], pydantic.BaseModel)
    }


def _names_a_model(annotation: Any, model: type) -> bool:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return issubclass(annotation, model)
    return any(_names_a_model(part, model) for part in typing.get_args(annotation))
