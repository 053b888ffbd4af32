"""What a model is told about what a tool returns."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from typing import Any

#: A model reads this before each of its calls.
_MAX_NOTE_CHARS = 1_000
#: Structures inside of structures, described once each.
_MAX_STRUCTURES = 10


def with_returns(doc: str, function: Any, *, signature_shown: bool = False) -> str:
    """Return a docstring with a line on what the function returns, unless it has that line already.

    Args:
        doc: The docstring.
        function: The function.
        signature_shown: Whoever reads it sees the signature too: only fields are worth a line.
    """
    note = returns_note(function)
    if not note or note in doc or (signature_shown and " is a dict: " not in note):
        return doc
    return f"{doc.rstrip()}\n\n{note}" if doc.strip() else note


def returns_note(function: Any) -> str:
    """Describe a function's return annotation, with the fields of models, dataclasses and typed dicts.

    Returns:
        Such as ``Returns list[City]. City is a dict: name (str), inhabitants (int).``; empty without an annotation.
    """
    annotation = _return_hint(function)
    if annotation is inspect.Signature.empty or annotation is None or annotation is type(None):
        return ""
    parts = [f"Returns {annotation_text(annotation)}."]
    seen: set[Any] = set()
    pending = [annotation]
    while pending and len(seen) < _MAX_STRUCTURES:
        each = pending.pop(0)
        pending += typing.get_args(each)
        fields = _fields(each)
        if not fields or each in seen:
            continue
        seen.add(each)
        listed = ", ".join(f"{name} ({annotation_text(kind)})" for name, kind in fields.items())
        parts.append(f"{each.__name__} is a dict: {listed}.")
        pending += fields.values()
    return " ".join(parts)[:_MAX_NOTE_CHARS]


def annotation_text(annotation: Any) -> str:
    """Return an annotation as a model reads it: names without their modules."""
    if isinstance(annotation, str):
        return annotation
    if annotation is type(None):
        return "None"
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is None or not args:
        return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, args))}]"
    if origin is typing.Annotated:
        return annotation_text(args[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(annotation_text, args))
    inner = ", ".join("..." if each is Ellipsis else annotation_text(each) for each in args)
    return f"{getattr(origin, '__name__', origin)}[{inner}]"


def _return_hint(function: Any) -> Any:
    try:
        plain = inspect.unwrap(function)
        written = getattr(plain, "__annotations__", {}).get("return", inspect.Signature.empty)
    except ValueError:
        return inspect.Signature.empty
    try:
        return typing.get_type_hints(plain).get("return", written)
    except Exception:  # a name that is not defined (yet): its text will do
        return written


def _fields(kind: Any) -> dict[str, Any]:
    """Return name and annotation of each field; none for what is no structure."""
    if not isinstance(kind, type) or typing.get_args(kind):
        return {}
    pydantic: Any = sys.modules.get("pydantic")
    if pydantic is not None and issubclass(kind, pydantic.BaseModel):
        fields: dict[str, Any] = kind.model_fields  # type: ignore[attr-defined]
        return {name: field.annotation for name, field in fields.items()}
    if dataclasses.is_dataclass(kind):
        return {field.name: field.type for field in dataclasses.fields(kind)}
    if typing.is_typeddict(kind):
        return dict(kind.__annotations__)
    return {}
