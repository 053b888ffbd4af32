"""The documents say what the code does."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import math
import os
import pathlib
import re
import uuid
from pathlib import Path
from typing import Any

import numpy
import pandas
import pydantic
import pytest

from broker.protocol.values import Decoder, Encoder, ValueNotSendable
from host_client import SandboxSettings, errors
from host_client.demo.keys import DEFAULT_MODELS
from host_client.demo.models import ScriptedActions
from host_client.demo.scripted_lm import serve
from host_client.settings import parse_size

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
VALUES = (ROOT / "docs" / "values.md").read_text(encoding="utf-8")


def table(text: str, first_heading: str) -> list[list[str]]:
    """Return the body rows of the table whose first heading is this."""
    block = re.search(rf"^\| {first_heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert block is not None
    return [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in block[1].splitlines()]


def test_settings_table_is_the_settings() -> None:
    rows = {row[0].strip("`"): row for row in table(README, "setting")}
    fields = {field.name: field for field in dataclasses.fields(SandboxSettings)}
    assert list(rows) == list(fields)
    for name, (_, default, environment, _) in rows.items():
        actual = getattr(SandboxSettings(), name)
        shown = default.strip("`")
        assert shown == str(actual) or parse_size(shown) == actual, name
        assert environment.strip("`").partition("=")[0] == f"RLM_SANDBOX_{name.upper()}"


def test_every_error_is_in_the_troubleshooting_table() -> None:
    named = set(re.findall(r"`(\w+)`", " ".join(row[0] for row in table(README, "error"))))
    kinds = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.SandboxError)
    }
    assert named == kinds - {"SandboxError", "SetupError"}


def test_make_targets_in_the_documents_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    documents = [
        README,
        *(path.read_text(encoding="utf-8") for path in (ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md")),
    ]
    used = set(re.findall(r"(?:`|^)make ([a-z-]+)", "\n".join(documents), re.MULTILINE))
    assert used
    assert used <= targets


def test_links_lead_somewhere() -> None:
    for document in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        ROOT / "examples" / "README.md",
    ):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def run_snippet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the README's snippet word for word; only the environment says where the model is."""
    import dspy

    [snippet] = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "dspy.configure(lm=" in code]
    assert len(snippet.splitlines()) <= 10
    script = ScriptedActions([("Count.", "n = len(document)\nprint(n)"), ("Done.", "SUBMIT(answer=f'{n} characters')")])
    with serve(script) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "not-a-key")
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_BASE", server.base_url)
        monkeypatch.setenv("DSPY_CACHEDIR", os.devnull)
        monkeypatch.chdir(ROOT)
        before = dspy.settings.lm
        try:
            exec(compile(snippet, "README.md", "exec"), {})
        finally:
            dspy.configure(lm=before)


@pytest.mark.docker
def test_readme_snippet_runs_word_for_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_snippet(monkeypatch)
    assert capsys.readouterr().out == f"{len(README)} characters\n"


def test_readme_names_the_keys_that_the_demo_knows() -> None:
    examples = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert [name for name in DEFAULT_MODELS if name not in examples] == []


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    y: list[int]


class Model(pydantic.BaseModel):
    name: str


Pair = collections.namedtuple("Pair", "a b")

#: One value for each row of the table, by the row's first cell without backticks.
EXAMPLES: dict[str, Any] = {
    "None": None,
    "bool": True,
    "int": 10**50,
    "float": -math.inf,
    "complex": complex(1, -2),
    "str": "naïve \ud800",
    "bytes": b"\x00\xff",
    "bytearray": bytearray(b"ab"),
    "memoryview": memoryview(b"ab"),
    "list": [1, ["a"]],
    "tuple": (1, "a"),
    "set": {3, 1, 2},
    "frozenset": frozenset({2, 1}),
    "dict": {"a": 1, 2: "b", (1, 2): None},
    "namedtuple": Pair(1, 2),
    "dataclass": Point(1, [2]),
    "pydantic model": Model(name="n"),
    "Enum member": Colour.RED,
    "datetime": datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc),
    "date": datetime.date(2026, 1, 2),
    "time": datetime.time(1, 2, 3),
    "timedelta": datetime.timedelta(days=1, microseconds=5),
    "Decimal": decimal.Decimal("1.10"),
    "UUID": uuid.UUID(int=5),
    "Path": pathlib.PurePosixPath("/tmp/x"),
    "numpy scalar": numpy.float32(0.5),
    "numpy array": numpy.arange(6, dtype="int16").reshape(2, 3),
    "pandas DataFrame": pandas.DataFrame({"a": [1, 2], "b": ["x", "y"]}),
    "pandas Series": pandas.Series([1, 2]),
    "pandas Timestamp": pandas.Timestamp("2026-01-02 03:04:05"),
    "subclass of a builtin, such as defaultdict": collections.defaultdict(int, a=1),
}

ROWS = {row[0].replace("`", ""): row for row in table(VALUES, "type")}


def test_every_row_of_the_values_table_has_an_example() -> None:
    assert list(ROWS) == list(EXAMPLES)


def cross(value: Any, *, out: bool) -> Any:
    encoder = Encoder(listify=out)
    encoded = encoder.encode([value], "value")
    return Decoder(encoder.blobs, arrays=not out).decode(encoded)[0]


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("out", [False, True], ids=["in", "out"])
def test_values_arrive_as_the_table_says(name: str, out: bool) -> None:
    arrived = cross(EXAMPLES[name], out=out)
    [documented, *_] = re.findall(r"`(\w+)`", ROWS[name][2 if out else 1])
    assert type(arrived).__name__ == documented


@pytest.mark.parametrize(
    "name", ["int", "float", "str", "bytes", "datetime", "Decimal", "UUID", "timedelta", "complex"]
)
def test_values_keep_their_value_both_ways(name: str) -> None:
    assert cross(EXAMPLES[name], out=False) == cross(EXAMPLES[name], out=True) == EXAMPLES[name]


def test_sets_leave_in_order_and_tables_as_records() -> None:
    assert cross({3, 1, 2}, out=True) == [1, 2, 3]
    assert cross(EXAMPLES["pandas DataFrame"], out=True) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert cross(EXAMPLES["numpy array"], out=True) == [[0, 1, 2], [3, 4, 5]]


def test_value_without_a_rule_is_named_by_its_path() -> None:
    with pytest.raises(ValueNotSendable, match=re.escape("documents[3]['loader']")):
        Encoder().encode([0, 1, 2, {"loader": object()}], "documents")
