"""Signatures of SUBMIT and of the tools: what ``help`` shows, and the interpreter's own checks and wording."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

from broker.protocol.messages import ToolParameter

_KINDS = {
    "positional_only": inspect.Parameter.POSITIONAL_ONLY,
    "positional_or_keyword": inspect.Parameter.POSITIONAL_OR_KEYWORD,
    "var_positional": inspect.Parameter.VAR_POSITIONAL,
    "keyword_only": inspect.Parameter.KEYWORD_ONLY,
    "var_keyword": inspect.Parameter.VAR_KEYWORD,
}


class SourceText:
    """Stands for a default or an annotation of the host's function; its repr is the text there."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def make_signature(parameters: Sequence[ToolParameter], returns: str | None = None) -> inspect.Signature:
    """Return a signature to show.

    Raises:
        ValueError: The parameters are in an order that no function can have.
    """
    empty = inspect.Parameter.empty
    shown = [
        inspect.Parameter(
            parameter.name,
            _KINDS[parameter.kind],
            default=empty if parameter.default is None else SourceText(parameter.default),
            annotation=empty if parameter.annotation is None else SourceText(parameter.annotation),
        )
        for parameter in parameters
    ]
    return inspect.Signature(
        shown, return_annotation=inspect.Signature.empty if returns is None else SourceText(returns)
    )


def make_check(name: str, signature: inspect.Signature) -> Callable[..., None]:
    """Return a function that takes what ``signature`` takes, does nothing, and complains in Python's own words."""
    parameters = signature.parameters.values()
    checked = _native_check(list(parameters))
    if checked is None:
        return _slow_check(name, signature)
    checked.__name__ = checked.__qualname__ = name
    return checked


def _native_check(parameters: list[inspect.Parameter]) -> types.FunctionType | None:
    """Compile a function with these parameters; names were checked to be identifiers, texts do not go in."""
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty, default=_default(parameter)) for parameter in parameters
    ]
    text = str(inspect.Signature(bare))
    scope: dict[str, Any] = {}
    try:
        exec(f"def check{text}: pass", {"__builtins__": {}}, scope)
    except SyntaxError:  # such as a parameter called __debug__
        return None
    function: types.FunctionType = scope["check"]
    code = function.__code__
    names = set(code.co_varnames)
    # Python normalises some letters in source; then keywords would no longer fit.
    return function if names == {parameter.name for parameter in parameters} else None


def _default(parameter: inspect.Parameter) -> Any:
    return parameter.default if parameter.default is inspect.Parameter.empty else None


def _slow_check(name: str, signature: inspect.Signature) -> Callable[..., None]:
    def check(*args: Any, **kwargs: Any) -> None:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}() {error}") from None

    return check
