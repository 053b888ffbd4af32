"""Claims about which functions can be sent into the sandbox, and as what."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from host_client import BadSetting
from host_client.tool_marks import marks_of, tool

LIMIT = 3
TABLE = {"a": 1}


def helper() -> int:
    return 1


def _source(function: Any, **options: Any) -> Any:
    shipped = marks_of(tool(function, where="sandbox", **options)).shipped
    assert shipped is not None
    return shipped


def _run(text: str) -> Any:
    scope: dict[str, Any] = {}
    exec(text, scope)
    return scope["__tool__"]


@tool(where="sandbox", requirements=["numpy"])
def regex_extract(text: str, pattern: str, flags: int = re.IGNORECASE) -> list[str]:
    """Extract all matches of a pattern."""
    counted = Counter(match for match in re.findall(pattern, text, flags))
    return [word for word, _ in counted.most_common(LIMIT)]


def test_imports_and_constants_of_the_module_go_along_and_decorators_stay() -> None:
    shipped = marks_of(regex_extract).shipped
    assert shipped is not None
    assert shipped.text.splitlines()[:4] == [
        "from collections import Counter as Counter",
        "LIMIT = 3",
        "import re as re",
        "def regex_extract(text: str, pattern: str, flags: int = re.IGNORECASE) -> list[str]:",
    ]
    assert shipped.requirements == ("numpy",)
    assert shipped.modules == ()
    assert sorted(_run(shipped.text)("aAb", "[ab]")) == ["A", "a", "b"]


def test_on_the_host_it_is_called_as_ever() -> None:
    assert regex_extract("xy", "X") == ["x"]


def test_modules_of_packages_are_named_for_the_check() -> None:
    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    assert _source(mean).modules == ("numpy",)


def test_an_indented_function_is_sent_whole_and_what_it_lacks_is_named() -> None:
    def squares(values: list[int]) -> list[int]:
        # A comment.
        def square(a: int) -> int:
            return a * a

        return [square(value) for value in values]

    def broken() -> int:
        return not_there  # type: ignore[name-defined,no-any-return] # noqa: F821

    def depth(value: Any) -> int:
        return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

    assert _run(_source(squares).text)([1, 2]) == [1, 4]
    with pytest.raises(BadSetting, match="'not_there', which is not defined"):
        _source(broken)
    with pytest.raises(BadSetting, match="'depth' of the function around it"):
        _source(depth)  # a nested function knows itself through its closure


def test_a_tool_of_another_name_keeps_its_own_inside() -> None:
    shipped = _source(countdown, name="down")
    assert _run(shipped.text)(3) == [3, 2, 1]


def countdown(n: int) -> list[int]:
    """Count down."""
    return [n, *countdown(n - 1)] if n else []


def uses_table() -> Any:
    return TABLE


def uses_helper() -> Any:
    return [helper() for _ in range(2)]


def uses_default(value: Any = TABLE) -> Any:
    return value


def changes_global() -> None:
    global LIMIT
    LIMIT = 4


async def later() -> None: ...


def uses_json(value: Any) -> str:
    return json.dumps(value)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (uses_table, r"'uses_table' .*'TABLE' \(dict\) of the module around it"),
        (uses_helper, r"'uses_helper' .*'helper' \(function\)"),
        (uses_default, "'TABLE'"),
        (later, "'later' .*async"),
        (lambda: 1, "it is a lambda"),
        (len, "'len' .*builtin_function"),
        (functools.partial(uses_json, 1), "partial"),
        (functools.wraps(uses_json)(lambda value: uses_json(value)), "wrapper stays on the host"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(function: Any, words: str) -> None:
    with pytest.raises(BadSetting, match=words):
        tool(function, where="sandbox")


def test_a_closure_is_refused_by_the_names_it_holds() -> None:
    limit, text = 3, "a"

    def cut() -> str:
        return text[:limit]

    with pytest.raises(BadSetting, match="'limit', 'text' of the function around it"):
        tool(cut, where="sandbox")


def test_source_that_nobody_can_read_is_refused() -> None:
    scope: dict[str, Any] = {}
    exec("def made(): return 1", scope)
    with pytest.raises(BadSetting, match=r"'made' .*source cannot be read"):
        tool(scope["made"], where="sandbox")


def test_a_global_that_the_tool_sets_is_its_own_over_there() -> None:
    scope: dict[str, Any] = {}
    exec(_source(changes_global).text, scope)
    scope["__tool__"]()
    assert (scope["LIMIT"], LIMIT) == (4, 3)


def test_the_standard_library_needs_no_check() -> None:
    assert _source(uses_json).modules == ()
    assert _run(_source(uses_json).text)([1]) == "[1]"
