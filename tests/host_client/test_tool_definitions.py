"""Claims about what the sandbox is told of a tool, and about how calls are bound."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import dspy
import pydantic
import pytest

from broker.protocol.messages import ToolDefinition
from host_client.errors import BadSetting
from host_client.tool_definitions import HostTool, ToolTable, check_tool


class City(pydantic.BaseModel):
    name: str
    inhabitants: int = 0


def _keywords_only(function: Any) -> Any:
    """What DSPy 3.3 and later put around a tool."""

    @functools.wraps(function)
    def wrapper(**kwargs: Any) -> Any:
        return function(**kwargs)

    wrapper.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return wrapper


def test_a_definition_survives_the_wire() -> None:
    def search(query: str, *more: str, limit: int = 10, **options: Any) -> list[str]:
        """Search the index."""

    definition = HostTool("search", search).definition
    assert ToolDefinition.from_json(definition.to_json()) == definition
    assert definition.doc == "Search the index."
    assert definition.returns == "list[str]"
    assert [(p.name, p.kind, p.default) for p in definition.parameters or ()] == [
        ("query", "positional_or_keyword", None),
        ("more", "var_positional", None),
        ("limit", "keyword_only", "10"),
        ("options", "var_keyword", None),
    ]


def test_defaults_that_would_show_the_hosts_insides_are_left_out() -> None:
    class Client:
        def __repr__(self) -> str:
            return "<Client token=secret>"

    def ask(question: str, client: Any = Client(), kinds: Any = ()) -> None:  # noqa: B008
        """Ask."""

    assert "secret" not in str(HostTool("ask", ask).definition.to_json())
    assert [p.default for p in HostTool("ask", ask).definition.parameters or ()] == [None, "...", "()"]


def test_a_callable_without_signature_takes_anything() -> None:
    tool = HostTool("smallest", min)
    assert tool.definition.parameters is None
    assert tool.call([3, 1, 2], {}) == 1


def test_positional_arguments_become_keywords() -> None:
    tool = HostTool("join", _keywords_only(lambda left, right="!": left + right))
    assert tool.call(["a", "b"], {}) == "ab"
    assert tool.call(["a"], {}) == "a!"
    assert tool.call(["a"], {"right": "c"}) == "ac"


def test_positional_only_and_star_args_stay_positional() -> None:
    def total(first: int, /, second: int, *rest: int, factor: int = 1) -> int:
        return (first + second + sum(rest)) * factor

    tool = HostTool("total", total)
    assert tool.call([1, 2, 3, 4], {"factor": 10}) == 100
    assert tool.call([1], {"second": 2}) == 3


def test_arguments_that_do_not_fit_are_a_type_error_that_names_them() -> None:
    tool = HostTool("join", _keywords_only(lambda left, right: left + right))
    with pytest.raises(TypeError, match="right"):
        tool.call(["a"], {})
    with pytest.raises(TypeError, match="too many positional"):
        tool.call(["a", "b", "c"], {})


def test_dicts_become_models_where_a_parameter_asks_for_them() -> None:
    def describe(city: City, others: list[City] | None = None) -> str:
        return ", ".join(each.name for each in [city, *(others or [])])

    tool = HostTool("describe", describe)
    assert tool.call([{"name": "Oslo"}], {"others": [{"name": "Rome"}]}) == "Oslo, Rome"
    with pytest.raises(ValueError, match="inhabitants"):
        tool.call([], {"city": {"name": "Oslo", "inhabitants": "many"}})


def test_other_annotations_are_not_enforced() -> None:
    def double(number: int) -> Any:
        return number * 2

    assert HostTool("double", double).call(["ab"], {}) == "abab"


def test_a_dspy_tool_shows_its_functions_signature_and_its_own_description() -> None:
    def lookup(key: str, depth: int = 1) -> str:
        """From the function."""
        return f"{key}/{depth}"

    tool = HostTool("lookup", dspy.Tool(lookup, desc="From the tool."))
    assert [p.name for p in tool.definition.parameters or ()] == ["key", "depth"]
    assert tool.definition.doc == "From the tool."
    assert tool.call(["a", 2], {}) == "a/2"


def test_a_dspy_tool_made_from_a_schema_shows_the_schemas_parameters() -> None:
    async def remote(**kwargs: Any) -> Any:
        return kwargs

    schema = {"path": {"type": "string"}, "mode": {"type": "string", "default": "r"}}
    tool = HostTool("open_file", dspy.Tool(remote, name="open_file", args=schema, arg_types={"path": str, "mode": str}))
    assert [(p.name, p.default) for p in tool.definition.parameters or ()] == [("path", None), ("mode", "'r'")]


@pytest.mark.parametrize(
    "name", ["", "1st", "a-b", "class", "SUBMIT", "__builtins__", "print", "open", "__import__", 3]
)
def test_names_that_cannot_be_globals_of_the_session_are_refused(name: Any) -> None:
    with pytest.raises(BadSetting, match="tool name"):
        check_tool(name, len)


@pytest.mark.parametrize("name", ["llm_query", "__dspy_construct__", "größe", "match"])
def test_other_names_are_taken(name: str) -> None:
    check_tool(name, len)


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(BadSetting, match=r"'answer' is not callable: int"):
        check_tool("answer", 42)


def test_the_table_notices_additions_removals_and_replacements_and_nothing_else() -> None:
    table, live = ToolTable(), {"one": lambda: 1}
    assert table.refresh(live)
    assert not table.refresh(live)
    assert not table.refresh(dict(live))
    live["two"] = lambda: 2
    assert table.refresh(live)
    live["one"] = lambda: 3
    assert table.refresh(live)
    del live["two"]
    assert table.refresh(live)
    assert table.names() == {"one"}
    assert not table.refresh(live)


def test_a_refused_tool_leaves_the_table_as_it_was() -> None:
    table = ToolTable()
    table.refresh({"one": lambda: 1})
    with pytest.raises(BadSetting):
        table.refresh({"two": lambda: 2, "print": print})
    assert table.names() == {"one"}
