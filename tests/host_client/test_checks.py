"""Claims about arguments that cannot work."""

from __future__ import annotations

import math
from typing import Any

import pytest

from broker.protocol.messages import OutputField
from host_client import checks
from host_client.errors import BadSetting

KEYWORDS: dict[str, Any] = {
    "tools": None,
    "output_fields": None,
    "execution_timeout_s": 1.0,
    "settings": None,
    "sandbox": None,
    "callbacks": None,
}


@pytest.mark.parametrize(
    ("keyword", "value", "named"),
    [
        ("tools", "len", "tools"),
        ("tools", {"print": print}, "print"),
        ("output_fields", "answer", "output_fields"),
        ("execution_timeout_s", 0, "execution_timeout_s"),
        ("execution_timeout_s", -1, "execution_timeout_s"),
        ("execution_timeout_s", True, "execution_timeout_s"),
        ("execution_timeout_s", "10", "execution_timeout_s"),
        ("execution_timeout_s", math.nan, "execution_timeout_s"),
        ("execution_timeout_s", math.inf, "execution_timeout_s"),
        ("settings", {"memory": "1g"}, "settings"),
        ("sandbox", "", "sandbox"),
        ("sandbox", 3, "sandbox"),
        ("callbacks", object(), "callbacks"),
    ],
)
def test_a_wrong_keyword_is_named(keyword: str, value: Any, named: str) -> None:
    with pytest.raises(BadSetting, match=named):
        checks.check_keywords(**{**KEYWORDS, keyword: value})


def test_right_keywords_pass() -> None:
    checks.check_keywords(**KEYWORDS)
    checks.check_keywords(**{**KEYWORDS, "tools": {"a": len}, "execution_timeout_s": None, "sandbox": "default"})


def test_output_fields_are_read_with_types_by_name_or_class() -> None:
    fields = [{"name": "a", "type": "str", "desc": "ignored"}, {"name": "b", "type": list}, {"name": "c"}]
    assert checks.read_output_fields(fields) == (
        OutputField(name="a", type="str"),
        OutputField(name="b", type="list"),
        OutputField(name="c"),
    )


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ([{}], "no name"),
        ([{"name": "1st"}], "1st"),
        ([{"name": "class"}], "class"),
        (["answer"], "answer"),
        ([{"name": "a"}, {"name": "b"}, {"name": "a"}], "'a' is there more than once"),
        ([{"name": "a", "type": "Decimal"}], "Decimal"),
    ],
)
def test_wrong_output_fields_are_named(fields: Any, named: str) -> None:
    with pytest.raises(BadSetting, match=named):
        checks.read_output_fields(fields)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ([("a", 1)], "must be a dict"),
        ({"a b": 1}, "a b"),
        ({1: 1}, "1"),
        ({"def": 1}, "def"),
        ({"SUBMIT": 1}, "SUBMIT"),
        ({"__builtins__": {}}, "__builtins__"),
        ({"search": 1}, "name of a tool"),
    ],
)
def test_wrong_variable_names_are_named(variables: Any, named: str) -> None:
    with pytest.raises(BadSetting, match=named):
        checks.check_variables(variables, {"search"})


def test_dunder_and_builtin_names_are_allowed_for_variables() -> None:
    assert checks.check_variables({"__dspy_host_token": "t", "input": 1}, set())
    assert checks.check_variables(None, set()) == {}


def test_code_must_be_text() -> None:
    with pytest.raises(BadSetting, match="bytes"):
        checks.check_code(b"1")
