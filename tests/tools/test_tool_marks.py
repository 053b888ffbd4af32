"""Claims about what a tool may say of itself."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal, TypedDict

import dspy
import pydantic
import pytest

import host_client
from host_client import BadSetting, SandboxInterpreter
from host_client.tool_definitions import HostTool, ToolTable, named_tools
from host_client.tool_docs import returns_note
from host_client.tool_marks import UNMARKED, is_idempotent, marks_of, tool


class City(pydantic.BaseModel):
    name: str
    inhabitants: int = 0


@dataclasses.dataclass
class Point:
    x: float


class Row(TypedDict):
    key: str


class _Nameless:
    def __call__(self) -> int:
        return 1


def look_up(word: str) -> str:
    """Look a word up."""
    return word


def test_a_decorated_function_stays_itself_and_carries_its_marks() -> None:
    @tool(name="find", idempotent=True, timeout_s=5, max_concurrent=2, max_calls=3, description="Find it.")
    def search(query: str) -> list[str]:
        return [query]

    marks = marks_of(search)
    assert search("a") == ["a"]
    assert (marks.name, marks.idempotent, marks.timeout_s, marks.max_calls) == ("find", True, 5.0, 3)
    assert marks.gate is not None
    assert marks.gate.places == 2
    assert search.__name__ == "find"
    assert search.__doc__ == "Find it.\n\nReturns list[str]."


def test_a_function_that_is_not_ours_is_wrapped_and_left_as_it_is() -> None:
    before = json.dumps.__doc__
    dumps = tool(json.dumps, name="to_json", max_calls=5, description="As JSON.")
    assert dumps({"a": 1}, indent=None) == '{"a": 1}'
    assert (dumps.__name__, dumps.__doc__) == ("to_json", "As JSON.")
    assert (json.dumps.__name__, json.dumps.__doc__, marks_of(json.dumps)) == ("dumps", before, UNMARKED)
    assert [p.name for p in HostTool("to_json", dumps).definition.parameters or ()][:2] == ["obj", "skipkeys"]


def test_builtins_partials_and_callable_objects_can_be_tools_too() -> None:
    class Adder:
        def __call__(self, a: int) -> int:
            return a + 1

    assert named_tools([tool(sorted, name="order"), tool(functools.partial(int, base=2), name="binary")]).keys() == {
        "order",
        "binary",
    }
    assert tool(Adder(), name="add", timeout_s=1)(1) == 2
    assert marks_of(tool(idempotent=True)(len)).idempotent


def test_the_bare_decorator_changes_nothing_but_the_marks() -> None:
    def plain(a: int) -> None:
        """Say."""

    assert tool(plain) is plain
    assert plain.__doc__ == "Say."


def test_marks_are_found_below_dspys_wrappers() -> None:
    marked = tool(name="seek", idempotent=True, max_calls=2)(lambda word: word)
    wrapped = functools.wraps(marked)(lambda **kwargs: marked(**kwargs))
    for each in (dspy.Tool(marked), wrapped):
        assert marks_of(each).max_calls == 2
        assert is_idempotent(each)
    assert dspy.Tool(marked).name == "seek"


def test_a_dspy_tool_is_told_what_to_declare_instead() -> None:
    with pytest.raises(BadSetting, match=r"'look_up' is a dspy\.Tool already"):
        tool(dspy.Tool(look_up), max_calls=2)
    declared = dspy.Tool(tool(look_up, max_calls=2, name="seek"))
    assert marks_of(declared).max_calls == 2
    assert [p.name for p in HostTool("seek", declared).definition.parameters or ()] == ["word"]


def test_the_pages_table_is_the_options() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tools.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", page, re.MULTILINE))
    options = {n: p for n, p in inspect.signature(tool).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert list(rows) == list(options)
    shown = {name: cell.strip("`").strip('"') for name, cell in rows.items() if cell.startswith("`")}
    assert shown == {name: str(options[name].default) for name in shown}
    assert options.keys() - shown.keys() == {"name", "description"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_calls": 0}, "'look_up': max_calls must be a whole number of 1 or more"),
        ({"max_calls": True}, "max_calls"),
        ({"max_concurrent": 0}, "'look_up': max_concurrent"),
        ({"max_concurrent": 1.5}, "max_concurrent"),
        ({"timeout_s": 0}, "'look_up': timeout_s must be seconds"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"timeout_s": "5"}, "timeout_s"),
        ({"idempotent": "yes"}, "'look_up': idempotent"),
        ({"name": "not a name"}, "not a name"),
        ({"name": "class"}, "class"),
        ({"where": "moon"}, "'look_up': where must be 'host' or 'sandbox'"),
        ({"requirements": ["numpy"]}, "'look_up': requirements are for where='sandbox'"),
        ({"where": "sandbox", "requirements": "numpy"}, "'look_up': requirements must be a list"),
        ({"where": "sandbox", "requirements": ["numpy>=2"]}, "'numpy>=2' must be NAME or NAME==VERSION"),
        ({"where": "sandbox", "timeout_s": 1}, "'look_up': the host's limits"),
    ],
)
def test_an_option_that_cannot_work_names_the_tool(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadSetting, match=words.replace("(", r"\(")):
        tool(**options)(look_up)


def test_generators_are_refused_decorated_or_not() -> None:
    def lines() -> Iterator[str]:
        yield "a"

    async def later() -> AsyncIterator[str]:
        yield "a"

    with pytest.raises(BadSetting, match=r"'lines' is a generator.*return a list"):
        tool(lines)
    for function in (lines, later, functools.wraps(lines)(lambda: lines())):
        with pytest.raises(BadSetting, match="'each' is a generator"):
            SandboxInterpreter(tools={"each": function})


def test_a_list_of_tools_goes_by_their_names_and_none_comes_twice() -> None:
    named = named_tools([look_up, tool(look_up, name="look_again"), dspy.Tool(look_up, name="third")])
    assert list(named) == ["look_up", "look_again", "third"]
    with pytest.raises(BadSetting, match="there are two called 'look_up'"):
        SandboxInterpreter(tools=[look_up, look_up])
    with pytest.raises(BadSetting, match="has no name"):
        SandboxInterpreter(tools=[_Nameless()])
    with pytest.raises(BadSetting, match="tools must be a dict"):
        SandboxInterpreter(tools=5)  # type: ignore[arg-type]


def test_pydantic_arguments_become_models() -> None:
    @tool(timeout_s=5)
    def grow(city: City, others: list[City] | None = None) -> City:
        assert isinstance(city, City)
        return city

    assert HostTool("grow", grow).call([{"name": "Rom"}], {"others": [{"name": "Ostia"}]}) == City(name="Rom")


def test_what_is_returned_is_described_with_its_fields() -> None:
    def cities() -> list[City] | None: ...
    def points() -> dict[str, Point]: ...
    def row() -> Row: ...
    def kind() -> Literal["a", "b"]: ...
    def nothing() -> None: ...
    def missing() -> NotThere: ...  # type: ignore[name-defined] # noqa: F821

    assert returns_note(cities) == ("Returns list[City] | None. City is a dict: name (str), inhabitants (int).")
    assert returns_note(points).startswith("Returns dict[str, Point]. Point is a dict: x (")
    assert returns_note(row).startswith("Returns Row. Row is a dict: key (")
    assert returns_note(kind) == "Returns Literal['a', 'b']."
    assert returns_note(nothing) == returns_note(print) == ""
    assert returns_note(missing) == "Returns NotThere."
    assert "City is a dict" in HostTool("cities", cities).definition.doc
    assert HostTool("kind", kind).definition.doc == ""  # the signature says as much


def test_a_type_that_contains_itself_is_described_once() -> None:
    class Tree(pydantic.BaseModel):
        children: list[Any]

    def tree() -> Tree: ...

    tree.__annotations__["return"] = Tree
    Tree.model_fields["children"].annotation = list[Tree]  # type: ignore[assignment]
    assert returns_note(tree) == "Returns Tree. Tree is a dict: children (list[Tree])."


def test_the_names_are_public() -> None:
    assert host_client.tool is tool
    assert {"tool", "progress", "ToolEvent", "current_call", "FileRefused"} <= set(host_client.__all__)


def test_the_table_tells_the_tools_of_the_sandbox_from_the_hosts() -> None:
    table = ToolTable()
    table.refresh({"look_up": look_up, "inside": tool(look_up, where="sandbox")})
    assert [each.name for each in table.shipped()] == ["inside"]
    assert [each.source is None for each in table.definitions()] == [True, False]
