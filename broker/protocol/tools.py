"""What generated code sees of a tool and of SUBMIT."""

from __future__ import annotations

import dataclasses
import keyword
from typing import Any

from broker.protocol.reading import BadRequest, JsonObject, Reader


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ToolParameter:
    """One parameter of a tool.

    Attributes:
        name: As in the host's function.
        kind: ``positional_only``, ``positional_or_keyword``, ``var_positional``, ``keyword_only`` or ``var_keyword``.
        default: Text of the default (its ``repr``), or None where there is none. Shown only: the host applies it.
        annotation: Text of the annotation, or None.
    """

    name: str
    kind: str
    default: str | None = None
    annotation: str | None = None

    KINDS = ("positional_only", "positional_or_keyword", "var_positional", "keyword_only", "var_keyword")

    def to_json(self) -> JsonObject:
        return {"name": self.name, "kind": self.kind, "default": self.default, "annotation": self.annotation}

    @classmethod
    def from_json(cls, data: Any) -> ToolParameter:
        read = Reader(data, "tool parameter")
        kind = read.text("kind")
        if kind not in cls.KINDS:
            raise BadRequest(f"tool parameter: unknown kind {kind!r}")
        return cls(
            name=_identifier(read.text("name"), "tool parameter"),
            kind=kind,
            default=read.optional_text("default"),
            annotation=read.optional_text("annotation"),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ToolDefinition:
    """What generated code sees of a tool.

    Attributes:
        name: Global name in the session.
        parameters: Its parameters, or None where the host could not read a signature (then anything is passed on).
        doc: Docstring for ``help(tool)``.
        returns: Text of the return annotation, or None.
        idempotent: Whether the host says that running it twice does no harm: after a crash it is run again.
        source: Where given, the tool runs in the sandbox and the host is not asked: Python source that binds a function
            to ``__tool__``, run in a namespace of its own at the first call.
    """

    name: str
    parameters: tuple[ToolParameter, ...] | None
    doc: str = ""
    returns: str | None = None
    idempotent: bool = False
    source: str | None = None

    def to_json(self) -> JsonObject:
        parameters = None if self.parameters is None else [p.to_json() for p in self.parameters]
        data: JsonObject = {
            "name": self.name,
            "parameters": parameters,
            "doc": self.doc,
            "returns": self.returns,
            "idempotent": self.idempotent,
        }
        if self.source is not None:
            data["source"] = self.source
        return data

    @classmethod
    def from_json(cls, data: Any) -> ToolDefinition:
        read = Reader(data, "tool")
        parameters = None
        if read.has("parameters"):
            parameters = tuple(ToolParameter.from_json(p) for p in read.items("parameters"))
        return cls(
            name=_identifier(read.text("name"), "tool"),
            parameters=parameters,
            doc=read.text("doc", ""),
            returns=read.optional_text("returns"),
            idempotent=read.flag("idempotent", False),
            source=read.optional_text("source"),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutputField:
    """One output field of SUBMIT; ``type`` is a builtin's name (``str int float bool list dict NoneType``) or None."""

    name: str
    type: str | None = None

    def to_json(self) -> JsonObject:
        return {"name": self.name} if self.type is None else {"name": self.name, "type": self.type}

    @classmethod
    def from_json(cls, data: Any) -> OutputField:
        read = Reader(data, "output field")
        return cls(name=_identifier(read.text("name"), "output field"), type=read.optional_text("type"))


def _identifier(name: str, where: str) -> str:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise BadRequest(f"{where}: {name[:80]!r} is not a Python identifier")
    return name
