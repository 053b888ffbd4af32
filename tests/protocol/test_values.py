"""Claims about how values travel (the table in docs/values.md)."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import json
import math
import pathlib
import sys
import types
import uuid
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.protocol import limits
from broker.protocol.frames import dump_frame, load_frame
from broker.protocol.values import DecodeError, Decoder, Encoder, ValueNotSendable


def round_trip(value: Any, *, listify: bool = False, arrays: bool = False) -> Any:
    """Send a value through a whole frame, as the wire does."""
    encoder = Encoder(listify=listify)
    header = {"value": encoder.encode(value, "value")}
    parsed, blobs = load_frame(b"".join(dump_frame(header, encoder.blobs)))
    return Decoder(blobs, arrays=arrays).decode(parsed["value"])


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()) | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(PLAIN)
@settings(max_examples=300, deadline=None)
def test_plain_values_arrive_equal_and_of_the_same_type(value: Any) -> None:
    arrived = round_trip(value)
    assert arrived == value
    assert repr(arrived) == repr(value)


@pytest.mark.parametrize(
    "value",
    [
        "\ud800 lone \udfff surrogates",
        "long " * limits.BLOB_THRESHOLD_BYTES + "\ud800",
        b"\x00\xff" * limits.BLOB_THRESHOLD_BYTES,
        2**70,
        -(10**30),
        math.inf,
        -math.inf,
        {1: "int key", (1, 2): "tuple key", None: 3},
        {"$blob": [0, "str"]},
        {"$x": 1, "y": 2},
        {1, 2, 3},
        frozenset({"a"}),
        datetime.datetime(2026, 2, 3, 4, 5, 6, 7, tzinfo=datetime.timezone.utc),
        datetime.date(2026, 2, 3),
        datetime.time(4, 5),
        datetime.timedelta(days=-1, microseconds=5),
        decimal.Decimal("1.10"),
        uuid.UUID(int=5),
        complex(1, -2),
        complex(math.inf, 0),
    ],
    ids=repr,
)
def test_types_that_json_lacks_survive(value: Any) -> None:
    arrived = round_trip(value)
    assert arrived == value
    assert type(arrived) is type(value)


def test_nan_survives_inside_containers() -> None:
    [first, second] = round_trip({"deep": [math.nan, 1.5]})["deep"]
    assert math.isnan(first)
    assert second == 1.5


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Point:
    x: int
    tags: list[str]


Pair = collections.namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    ("value", "arrives_as"),
    [
        (Colour.RED, "red"),
        (Level.HIGH, 3),
        (Point(1, ["a"]), {"x": 1, "tags": ["a"]}),
        (Pair(1, (2,)), {"left": 1, "right": (2,)}),
        (collections.defaultdict(list, {"a": [1]}), {"a": [1]}),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (pathlib.PurePosixPath("/a/b"), "/a/b"),
        (bytearray(b"abc"), b"abc"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_classes_arrive_as_the_data_that_they_hold(value: Any, arrives_as: Any) -> None:
    assert round_trip(value) == arrives_as


def test_pydantic_models_arrive_as_dicts() -> None:
    pydantic = pytest.importorskip("pydantic")
    Model = pydantic.create_model("Model", name=(str, ...), when=(datetime.date, ...))
    day = datetime.date(2026, 1, 1)
    assert round_trip(Model(name="a", when=day)) == {"name": "a", "when": day}


def test_listify_sends_collections_as_json_lists() -> None:
    assert round_trip({"t": (1, (2,)), "s": {3, 1}}, listify=True) == {"t": [1, [2]], "s": [1, 3]}


def test_arrays_arrive_as_arrays_in_the_sandbox_and_as_lists_on_the_host() -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(6, dtype="float32").reshape(2, 3)
    arrived = round_trip(array, arrays=True)
    assert arrived.dtype == array.dtype
    assert (arrived == array).all()
    assert round_trip(array, listify=True) == array.tolist()
    assert round_trip(numpy.int64(7)) == 7


def test_tables_arrive_as_tables_in_the_sandbox_and_as_records_on_the_host() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(
        {"n": [1, 2], "f": [0.5, math.nan], "s": ["a", None], "d": pandas.to_datetime(["2026-01-01", "2026-01-02"])},
        index=["x", "y"],
    )
    arrived = round_trip(table, arrays=True)
    pandas.testing.assert_frame_equal(arrived, table, check_dtype=False)
    assert round_trip(table[["n"]], listify=True) == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, {"b": object()}]}, "docs['a'][1]['b']"),
        ([lambda: None], "docs[0]"),
        (10 ** (limits.MAX_INTEGER_DIGITS + 2000), "docs"),
        (sys, "docs"),
    ],
    ids=["nested object", "function", "huge integer", "module"],
)
def test_what_cannot_travel_is_refused_with_the_path_to_it(value: Any, path: str) -> None:
    with pytest.raises(ValueNotSendable) as caught:
        Encoder().encode(value, "docs")
    assert str(caught.value).startswith(path + ":")


@dataclasses.dataclass(frozen=True)
class FrozenPoint:
    x: int


def test_named_tuples_as_keys_and_members_arrive_as_tuples() -> None:
    assert round_trip({Pair(1, 2): "a"}) == {(1, 2): "a"}
    assert round_trip({Pair(1, Pair(2, 3))}) == {(1, (2, 3))}
    assert round_trip({(1, 2): {3}}, listify=True) == {(1, 2): [3]}


@pytest.mark.parametrize("value", [{FrozenPoint(1): "a"}, {FrozenPoint(1)}, {(1, FrozenPoint(2)): 3}], ids=repr)
def test_a_key_or_member_that_would_arrive_unhashable_is_refused_with_its_path(value: Any) -> None:
    with pytest.raises(ValueNotSendable, match=r"^points (key|member) .*FrozenPoint"):
        Encoder().encode(value, "points")


def test_pandas_timestamps_arrive_as_datetimes() -> None:
    pandas = pytest.importorskip("pandas")
    stamp = pandas.Timestamp("2026-01-02 03:04:05.123456789")
    assert round_trip(stamp) == datetime.datetime(2026, 1, 2, 3, 4, 5, 123456)
    assert math.isnan(round_trip(pandas.NaT))


def test_a_value_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append({"again": loop})
    with pytest.raises(ValueNotSendable, match="contains itself"):
        Encoder().encode(loop, "loop")


def test_a_value_met_twice_is_not_taken_for_a_loop() -> None:
    shared = [1, object.__name__]
    assert round_trip([shared, shared]) == [shared, shared]


def test_too_deep_nesting_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(limits.MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(ValueNotSendable, match="deeper"):
        Encoder().encode(deep, "deep")


def test_large_text_travels_beside_the_json() -> None:
    encoder = Encoder()
    header = encoder.encode({"text": "x" * limits.BLOB_THRESHOLD_BYTES}, "v")
    assert len(json.dumps(header)) < 100
    assert [len(blob) for blob in encoder.blobs] == [limits.BLOB_THRESHOLD_BYTES]


class SimpleKeeper:
    def __init__(self) -> None:
        self.ids: dict[Any, str] = {}

    def known(self, value: str | bytes) -> str | None:
        return self.ids.get(value)

    def added(self, value: str | bytes) -> str | None:
        return self.ids.setdefault(value, f"v{len(self.ids)}")


def test_a_kept_value_is_sent_once_and_then_referred_to() -> None:
    keeper, kept = SimpleKeeper(), dict[str, Any]()
    value = ["y" * limits.KEEP_THRESHOLD_BYTES, "small"]
    first = Encoder(keeper=keeper)
    encoded = first.encode(value, "v")
    assert Decoder(first.blobs, kept=kept).decode(encoded) == value
    second = Encoder(keeper=keeper)
    again = second.encode(value, "v")
    assert second.blobs == []
    assert Decoder([], kept=kept).decode(again) == value


@pytest.mark.parametrize(
    "hostile",
    [
        {"$class": "os.system"},
        {"$blob": [5, "str"]},
        {"$blob": "x"},
        {"$blob": [-1, "str"]},
        {"$ref": "unknown"},
        {"$ref": []},
        {"$int": "9" * (limits.MAX_INTEGER_DIGITS + 10)},
        {"$float": "1e5"},
        {"$bytes": "not base64!"},
        {"$datetime": 5},
        {"$decimal": "x"},
        {"$map": [[[1], 2]]},
        {"$map": [1]},
        {"$set": [[1]]},
        {"$tuple": "abc"},
        {"$ndarray": {"dtype": "O", "shape": [1], "data": {"$bytes": ""}}},
        {"$dataframe": {}},
        {"$timedelta": [10**12, 0, 0]},
        {"$uuid": None},
        {"$complex": ["x", "y"]},
    ],
    ids=str,
)
def test_malformed_values_are_refused(hostile: Any) -> None:
    with pytest.raises(DecodeError):
        Decoder(kept={}).decode(hostile)


def test_decoding_never_imports_a_package_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", types.ModuleType("numpy"))
    with pytest.raises(DecodeError, match="not accepted"):
        Decoder().decode({"$ndarray": {"dtype": "f8", "shape": [0], "data": {"$bytes": ""}}})


def test_keys_and_members_of_one_hash_are_refused_before_they_take_hours() -> None:
    alike = [{"$int": str(number * (2**61 - 1))} for number in range(1, 50_000)]
    for encoded in ({"$set": alike}, {"$frozenset": alike}, {"$map": [[key, 0] for key in alike]}):
        with pytest.raises(DecodeError, match="same hash"):
            Decoder().decode(encoded)
    assert Decoder().decode({"$map": [[number, 0] for number in range(50_000)]})[49_999] == 0


def test_many_references_to_one_blob_share_one_value() -> None:
    decoded = Decoder([b"x" * 5000]).decode([{"$blob": [0, "str"]}, {"$blob": [0, "str"]}, {"$blob": [0, "bytes"]}])
    assert decoded[0] is decoded[1]
    assert decoded[2] == b"x" * 5000


def test_numbers_of_too_many_digits_are_refused_on_both_sides() -> None:
    with pytest.raises(ValueNotSendable, match="digits"):
        Encoder().encode(decimal.Decimal("9" * 5000), "number")
    for tag in ("$int", "$decimal"):
        with pytest.raises(DecodeError, match="too long"):
            Decoder().decode({tag: "9" * 5000})
