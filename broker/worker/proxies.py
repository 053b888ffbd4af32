"""The tools as plain functions in the namespace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from broker.protocol.messages import ToolDefinition
from broker.worker.shipped import ShippedFunction
from broker.worker.signatures import SourceText, make_check, make_signature
from broker.worker.tool_calls import ToolCalls

_BY_POSITION = ("positional_only", "positional_or_keyword")


class Proxies:
    """The wrappers of one session; a tool that did not change keeps its function.

    Attributes:
        functions: Wrapper by name.
    """

    def __init__(self, calls: ToolCalls) -> None:
        self._calls = calls
        self._definitions: dict[str, ToolDefinition] = {}
        self.functions: dict[str, Any] = {}

    def set_tools(self, definitions: Iterable[ToolDefinition]) -> None:
        """Make wrappers for these tools, and for no others."""
        wanted = {definition.name: definition for definition in definitions}
        self.functions = {
            name: self.functions[name]
            if self._definitions.get(name) == definition
            else make_proxy(definition, self._calls)
            for name, definition in wanted.items()
        }
        self._definitions = wanted
        self._calls.known = frozenset(name for name, definition in wanted.items() if definition.source is None)


def make_proxy(definition: ToolDefinition, calls: ToolCalls) -> Any:
    """Return a function with the tool's name, signature and docstring that calls it and waits, or runs its source.

    It takes ``*args`` and ``**kwargs`` only, so that parameters of the tool may have any name.
    """
    name, call, parameters = definition.name, calls.call, definition.parameters
    if definition.source is not None:
        shipped = ShippedFunction(name, definition.source)

        def tool(*args: Any, **kwargs: Any) -> Any:
            return shipped.function()(*args, **kwargs)

        if parameters is not None:
            tool.__signature__ = make_signature(parameters, definition.returns)  # type: ignore[attr-defined]

    elif parameters is None:

        def tool(*args: Any, **kwargs: Any) -> Any:
            return call(name, (), args, kwargs)

    else:
        signature = make_signature(parameters, definition.returns)
        check = make_check(name, signature)
        names = tuple(parameter.name for parameter in parameters if parameter.kind in _BY_POSITION)

        def tool(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            return call(name, names, args, kwargs)

        tool.__signature__ = signature  # type: ignore[attr-defined]
        tool.__annotations__ = {p.name: SourceText(p.annotation) for p in parameters if p.annotation is not None}
        if definition.returns is not None:
            tool.__annotations__["return"] = SourceText(definition.returns)

    tool.__name__ = tool.__qualname__ = name
    tool.__doc__ = definition.doc or None
    tool.__module__ = "__main__"
    return tool
