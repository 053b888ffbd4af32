"""How Python values travel: JSON where JSON has the type, a tagged object where it lacks it.

The table that users read is ``docs/values.md``. A tagged object has exactly one key, which begins
with ``$``; a dict that happens to look so travels as ``$map``. Large strings and bytes travel as
blobs beside the JSON (``$blob``), and a value that the other side still holds as ``$ref``.

Decoding builds builtin and standard-library values only. Nothing on the wire names a class.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import decimal
import enum
import math
import pathlib
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from broker.protocol import limits
from broker.protocol.frames import Blob

_ATOMS = frozenset({type(None), bool})
_JSON_SAFE_INT = 10**18


class ValueNotSendable(TypeError):
    """A value (or a part of it, named by its path) has no rule in the table of ``docs/values.md``."""


class Keeper(Protocol):
    """Remembers large values across frames; the sender's side and the receiver's side differ."""

    def known(self, value: str | bytes) -> str | None:
        """Return the id under which the other side holds this value, or None."""

    def added(self, value: str | bytes) -> str | None:
        """Return a new id for a value that is sent now, or None if it shall not be kept."""


@dataclasses.dataclass(slots=True)
class Encoder:
    """Encodes values into one frame.

    Args:
        listify: Send tuples and sets as lists, and arrays and tables as nested lists and records.
            Generated code sends so, because tools and output fields are validated as JSON shapes.
        keeper: Where given, large strings and bytes are sent once and referred to afterwards.
        lazy: Leave ASCII texts among the blobs as they are: encoded they would be in memory twice.
    """

    listify: bool = False
    keeper: Keeper | None = None
    blobs: list[Any] = dataclasses.field(default_factory=list)
    lazy: bool = False

    def encode(self, value: Any, path: str) -> Any:
        """Return the JSON form of ``value``; large parts are appended to ``blobs``.

        Args:
            value: Any value of the table in ``docs/values.md``.
            path: Name of the value, used in errors, such as ``documents``.

        Raises:
            ValueNotSendable: Some part has no rule; the message holds the path to it.
        """
        return self._encode(value, path, 0, ())

    def _encode(self, value: Any, path: str, depth: int, parents: tuple[int, ...]) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return value
        if kind is str:
            return self._text(value)
        if kind is int:
            return _encode_int(value, path)
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if depth >= limits.MAX_DEPTH:
            raise ValueNotSendable(f"{path}: nested deeper than {limits.MAX_DEPTH} levels")
        if id(value) in parents:
            raise ValueNotSendable(f"{path}: the value contains itself")
        inside = (*parents, id(value))
        if kind is list:
            return self._items(value, path, depth, inside)
        if kind is dict:
            return self._mapping(value, path, depth, inside)
        return self._tagged(value, path, depth, inside)

    def _text(self, value: str) -> Any:
        if len(value) < limits.BLOB_THRESHOLD_BYTES:
            return value
        if self.lazy and value.isascii():
            return self._blob(value, "str", lambda: value)
        return self._blob(value, "str", lambda: value.encode("utf-8", "surrogatepass"))

    def _bytes(self, value: bytes) -> Any:
        if len(value) < limits.BLOB_THRESHOLD_BYTES:
            return {"$bytes": base64.b64encode(value).decode("ascii")}
        return self._blob(value, "bytes", lambda: value)

    def _blob(self, value: str | bytes, kind: str, raw: Callable[[], Blob | str]) -> Any:
        kept = None
        if self.keeper is not None and len(value) >= limits.KEEP_THRESHOLD_BYTES:
            known = self.keeper.known(value)
            if known is not None:
                return {"$ref": known}
            kept = self.keeper.added(value)
        self.blobs.append(raw())
        note: list[Any] = [len(self.blobs) - 1, kind]
        return {"$blob": note if kept is None else [*note, kept]}

    def _items(self, items: Sequence[Any], path: str, depth: int, parents: tuple[int, ...]) -> list[Any]:
        kinds = set(map(type, items))
        if kinds <= _ATOMS:
            return list(items)
        if kinds == {str} and max(map(len, items)) < limits.BLOB_THRESHOLD_BYTES:
            return list(items)
        if kinds <= {int, float} and all(map(_is_plain_number, items)):
            return list(items)
        return [self._encode(item, f"{path}[{i}]", depth + 1, parents) for i, item in enumerate(items)]

    def _mapping(self, mapping: Mapping[Any, Any], path: str, depth: int, parents: tuple[int, ...]) -> Any:
        if all(type(key) is str and not key.startswith("$") for key in mapping):
            return {k: self._encode(v, f"{path}[{k!r}]", depth + 1, parents) for k, v in mapping.items()}
        pairs: list[list[Any]] = []
        for key, item in mapping.items():
            encoded_key = self._hashable(key, f"{path} key {key!r:.40}", depth + 1, parents)
            pairs.append([encoded_key, self._encode(item, f"{path}[{key!r:.40}]", depth + 1, parents)])
        return {"$map": pairs}

    def _tagged(self, value: Any, path: str, depth: int, parents: tuple[int, ...]) -> Any:
        if isinstance(value, (bytes, bytearray, memoryview)):
            return self._bytes(bytes(value))
        if isinstance(value, enum.Enum):
            return self._encode(value.value, path, depth + 1, parents)
        if isinstance(value, decimal.Decimal) and len(str(value)) > limits.MAX_INTEGER_DIGITS:
            raise ValueNotSendable(f"{path}: a number of more than {limits.MAX_INTEGER_DIGITS} digits")
        plain = _plain_standard(value)
        if plain is not None:
            return plain
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            return self._mapping(value._asdict(), path, depth, parents)
        if isinstance(value, (tuple, set, frozenset)):
            return self._collection(value, path, depth, parents)
        if isinstance(value, (bool, int, float, str, list, dict)):
            return self._encode(_without_subclass(value), path, depth, parents[:-1])
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return self._mapping(fields, path, depth, parents)
        return self._foreign(value, path, depth, parents)

    def _collection(self, value: Any, path: str, depth: int, parents: tuple[int, ...]) -> Any:
        ordered = value if isinstance(value, tuple) else _stable_order(value)
        if self.listify:
            return self._items(ordered, path, depth, parents)
        if isinstance(value, tuple):
            return {"$tuple": self._items(ordered, path, depth, parents)}
        members = [self._hashable(item, f"{path} member {item!r:.40}", depth + 1, parents) for item in ordered]
        return {"$frozenset" if isinstance(value, frozenset) else "$set": members}

    def _hashable(self, value: Any, path: str, depth: int, parents: tuple[int, ...]) -> Any:
        """Encode a key or a set's member: it must arrive hashable, so a tuple stays one even where lists are sent."""
        exact = Encoder(keeper=self.keeper, blobs=self.blobs) if self.listify else self
        encoded = exact._encode(_plain_tuple(value), path, depth, parents)
        if _arrives_unhashable(encoded):
            raise ValueNotSendable(f"{path}: a {type(value).__qualname__} cannot be a key or a member of a set there")
        return encoded

    def _foreign(self, value: Any, path: str, depth: int, parents: tuple[int, ...]) -> Any:
        """Types of packages that may or may not be installed: recognised without importing them."""
        if not isinstance(value, type) and callable(getattr(value, "model_dump", None)):  # pydantic
            return self._encode(value.model_dump(), path, depth + 1, parents)
        numpy, pandas = sys.modules.get("numpy"), sys.modules.get("pandas")
        if numpy is not None and isinstance(value, numpy.generic):
            return self._encode(value.item(), path, depth + 1, parents)
        if numpy is not None and isinstance(value, numpy.ndarray):
            return self._array(value, path, depth, parents)
        if pandas is not None and isinstance(value, pandas.DataFrame):
            return self._frame(value, path, depth, parents)
        if pandas is not None and isinstance(value, (pandas.Series, pandas.Index)):
            return self._items(value.tolist(), path, depth, parents)
        raise ValueNotSendable(
            f"{path}: a value of type {type(value).__module__}.{type(value).__qualname__} cannot cross the sandbox "
            "boundary; send JSON values, bytes, tuples, sets, dates, decimals, arrays, tables, dataclasses or pydantic "
            "models"
        )

    def _array(self, value: Any, path: str, depth: int, parents: tuple[int, ...]) -> Any:
        if self.listify or value.dtype.kind not in "biufc" or value.dtype.byteorder == ">":
            return self._encode(value.tolist(), path, depth + 1, parents)
        data = self._encode(value.tobytes(), path, depth + 1, parents)
        return {"$ndarray": {"dtype": value.dtype.str, "shape": list(value.shape), "data": data}}

    def _frame(self, value: Any, path: str, depth: int, parents: tuple[int, ...]) -> Any:
        if self.listify:
            return self._encode(value.to_dict(orient="records"), path, depth + 1, parents)
        columns = [
            [
                self._encode(name, path, depth + 1, parents),
                str(value.dtypes.iloc[position]),
                self._column(value.iloc[:, position], path, depth, parents),
            ]
            for position, name in enumerate(value.columns)
        ]
        index = self._encode(value.index.tolist(), f"{path} index", depth + 1, parents)
        return {"$dataframe": {"columns": columns, "index": index}}

    def _column(self, series: Any, path: str, depth: int, parents: tuple[int, ...]) -> Any:
        array = series.to_numpy()
        if array.dtype.kind in "biufc" and str(series.dtype) == str(array.dtype):
            return self._array(array, path, depth + 1, parents)
        return self._items(series.tolist(), f"{path} column {series.name!r}", depth + 1, parents)


def _is_plain_number(value: int | float) -> bool:
    return -_JSON_SAFE_INT < value < _JSON_SAFE_INT  # False for NaN and infinities as well


def _encode_int(value: int, path: str) -> Any:
    if -_JSON_SAFE_INT < value < _JSON_SAFE_INT:
        return value
    if value.bit_length() > limits.MAX_INTEGER_DIGITS * 3:
        raise ValueNotSendable(f"{path}: an integer of more than {limits.MAX_INTEGER_DIGITS} digits")
    return {"$int": str(value)}


def _stable_order(values: set[Any] | frozenset[Any]) -> list[Any]:
    try:
        return sorted(values)
    except TypeError:
        return list(values)


def _plain_tuple(value: Any) -> Any:
    return tuple(map(_plain_tuple, value)) if isinstance(value, tuple) else value


def _arrives_unhashable(encoded: Any) -> bool:
    if isinstance(encoded, list):
        return True
    if not isinstance(encoded, dict):
        return False
    for tag in ("$tuple", "$frozenset"):
        if tag in encoded:
            return any(map(_arrives_unhashable, encoded[tag]))
    return len(encoded) != 1 or next(iter(encoded)) not in (*_SCALARS, "$blob", "$ref")


def _without_subclass(value: Any) -> Any:
    """The builtin behind a subclass such as ``defaultdict`` or an ``IntEnum`` member's int."""
    if isinstance(value, str):
        return str.__str__(value)
    kinds: tuple[Callable[[Any], Any], ...] = (int, float, list, dict)
    for builtin in kinds:
        if isinstance(value, builtin):  # type: ignore[arg-type]
            return builtin(value)
    raise AssertionError(type(value))


def _plain_standard(value: Any) -> Any:
    """Tag a value of the standard library that has one spelling as text; None if it is no such value."""
    if isinstance(value, datetime.datetime):
        if value != value:  # pandas.NaT
            return {"$float": "nan"}
        if hasattr(value, "to_pydatetime"):  # pandas.Timestamp: its nanoseconds have no place in a datetime
            value = value.to_pydatetime(warn=False)
        return {"$datetime": value.isoformat()}
    if isinstance(value, datetime.date):
        return {"$date": value.isoformat()}
    if isinstance(value, datetime.time):
        return {"$time": value.isoformat()}
    if isinstance(value, datetime.timedelta):
        return {"$timedelta": [value.days, value.seconds, value.microseconds]}
    if isinstance(value, decimal.Decimal):
        return {"$decimal": str(value)}
    if isinstance(value, uuid.UUID):
        return {"$uuid": str(value)}
    if isinstance(value, complex) and not isinstance(value, float):
        return {"$complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, pathlib.PurePath):
        return str(value)
    return None


class DecodeError(ValueError):
    """The JSON form breaks a rule of ``docs/values.md``; the message says which."""


@dataclasses.dataclass(slots=True)
class Decoder:
    """Decodes the values of one frame; everything in it counts as hostile.

    Args:
        blobs: The frame's blobs.
        kept: Values kept from earlier frames, by id; new ones are added.
        arrays: Build numpy arrays and pandas tables, where those packages can be imported. The host
            leaves this off: it builds lists and records instead.
    """

    blobs: Sequence[Blob] = ()
    kept: dict[str, Any] | None = None
    arrays: bool = False
    # Each blob is decoded once: a thousand references to one are a thousand references here, not a thousand copies.
    _decoded: dict[tuple[int, bool], str | bytes] = dataclasses.field(default_factory=dict)

    def decode(self, encoded: Any) -> Any:
        """Return the value that ``encoded`` stands for.

        Raises:
            DecodeError: An unknown tag, a wrong operand, a missing blob, or nesting that is too deep.
        """
        try:
            return self._decode(encoded, 0)
        except DecodeError:
            raise
        except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, RecursionError) as error:
            raise DecodeError(f"malformed value: {type(error).__name__}: {error}") from None

    def _decode(self, encoded: Any, depth: int) -> Any:
        kind = type(encoded)
        if kind is list:
            if set(map(type, encoded)) <= _PLAIN_JSON:
                return encoded
            _check_depth(depth)
            return [self._decode(item, depth + 1) for item in encoded]
        if kind is dict:
            _check_depth(depth)
            if len(encoded) == 1:
                [(tag, operand)] = encoded.items()
                if tag.startswith("$"):
                    return self._untag(tag, operand, depth + 1)
            return {key: self._decode(item, depth + 1) for key, item in encoded.items()}
        return encoded

    def _untag(self, tag: str, operand: Any, depth: int) -> Any:
        if tag == "$blob":
            return self._blob(operand)
        if tag == "$ref":
            if self.kept is None or operand not in self.kept:
                raise DecodeError(f"the value {operand!r} is not held here (any more)")
            return self.kept[operand]
        if tag in _COLLECTIONS:
            members = [self._decode(item, depth) for item in _expect(operand, list)]
            return _COLLECTIONS[tag](members if tag == "$tuple" else _spread(members))
        if tag == "$map":
            pairs = [(self._decode(key, depth), self._decode(item, depth)) for key, item in _expect(operand, list)]
            _spread([key for key, _ in pairs])
            return dict(pairs)
        if tag == "$ndarray":
            return self._array(operand, depth)
        if tag == "$dataframe":
            return self._table(operand, depth)
        if tag in _SCALARS:
            return _SCALARS[tag](operand)
        raise DecodeError(f"unknown tag {tag[:40]!r}")

    def _blob(self, operand: list[Any]) -> str | bytes:
        index, kind, *kept_as = operand
        if type(index) is not int or not 0 <= index < len(self.blobs):
            raise DecodeError(f"no blob {index!r} in this frame")
        value = self._decoded.get((index, kind == "str"))
        if value is None:
            blob = self.blobs[index]
            value = str(blob, "utf-8", "surrogatepass") if kind == "str" else bytes(blob)
            self._decoded[index, kind == "str"] = value
        if kept_as and self.kept is not None:
            self.kept[_expect(kept_as[0], str)] = value
        return value

    def _array(self, operand: dict[str, Any], depth: int) -> Any:
        data = self._decode(operand["data"], depth)
        if not self.arrays:
            raise DecodeError("arrays are not accepted in this direction")
        import numpy

        dtype = numpy.dtype(_expect(operand["dtype"], str))
        return numpy.frombuffer(data, dtype=dtype).reshape(operand["shape"]).copy()

    def _table(self, operand: dict[str, Any], depth: int) -> Any:
        if not self.arrays:
            raise DecodeError("tables are not accepted in this direction")
        import pandas

        columns = operand["columns"]
        series = [pandas.Series(self._decode(data, depth)) for _, _, data in columns]
        table = pandas.concat(series, axis=1) if series else pandas.DataFrame(index=range(len(operand["index"])))
        for position, (_, dtype, _) in enumerate(columns):
            table = _with_dtype(table, position, dtype)
        table.columns = [self._decode(name, depth) for name, _, _ in columns]
        table.index = self._decode(operand["index"], depth)
        return table


def _with_dtype(table: Any, position: int, dtype: str) -> Any:
    """Restore a column's dtype; a dtype that this pandas does not know stays as it was read."""
    if str(table.dtypes.iloc[position]) == dtype:
        return table
    try:
        return table.astype({table.columns[position]: dtype})
    except (TypeError, ValueError):
        return table


def _check_depth(depth: int) -> None:
    if depth > limits.MAX_DEPTH * 2:
        raise DecodeError("nested too deep")


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise DecodeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _spread(members: list[Any]) -> list[Any]:
    """Refuse members that were chosen to have the same hash."""
    hashes = sorted(map(hash, members))
    for first, later in zip(hashes, hashes[limits.MAX_EQUAL_HASHES :], strict=False):
        if first == later:
            raise DecodeError(f"more than {limits.MAX_EQUAL_HASHES} keys with the same hash")
    return members


def _digits(text: Any) -> str:
    if len(_expect(text, str)) > limits.MAX_INTEGER_DIGITS + 1:
        raise DecodeError("number too long")
    return str(text)


_PLAIN_JSON = frozenset({type(None), bool, int, float, str})
_COLLECTIONS: dict[str, Callable[..., Any]] = {"$tuple": tuple, "$set": set, "$frozenset": frozenset}
_SCALARS: dict[str, Callable[[Any], Any]] = {
    "$float": lambda text: {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[text],
    "$int": lambda text: int(_digits(text)),
    "$bytes": lambda text: base64.b64decode(_expect(text, str), validate=True),
    "$datetime": lambda text: datetime.datetime.fromisoformat(text),
    "$date": lambda text: datetime.date.fromisoformat(text),
    "$time": lambda text: datetime.time.fromisoformat(text),
    "$timedelta": lambda parts: datetime.timedelta(days=parts[0], seconds=parts[1], microseconds=parts[2]),
    "$decimal": lambda text: decimal.Decimal(_digits(text)),
    "$uuid": lambda text: uuid.UUID(_expect(text, str)),
    "$complex": lambda parts: complex(float(parts[0]), float(parts[1])),
}
