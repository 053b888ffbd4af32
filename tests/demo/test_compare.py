"""The pages for people who come from elsewhere name tests, examples and settings that exist."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re

import pytest

import host_client
from host_client import SandboxInterpreter, SandboxPool, SandboxSettings
from tests.demo.example_files import EXAMPLES

ROOT = EXAMPLES.parent
COMPARE = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
COMING_FROM = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
PAGES = pytest.mark.parametrize("page", [COMPARE, COMING_FROM], ids=["compare", "coming-from"])


@PAGES
def test_every_test_and_example_that_a_page_names_exists(page: str) -> None:
    named = set(re.findall(r"`((?:tests|examples)/[^`]+)`", page))
    assert len(named) > 8
    assert sorted(name for name in named if not there(name)) == []


def there(name: str) -> bool:
    """Whether a file, or a test ``file::name`` in it, exists."""
    path, _, test = name.partition("::")
    if not test:
        return (ROOT / path).is_file()
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == test for node in tree.body)


def test_what_does_not_exist_is_noticed() -> None:
    assert there("tests/demo/test_compare.py::test_what_does_not_exist_is_noticed")
    assert not there("tests/demo/test_compare.py::test_that_nobody_wrote")
    assert not there("examples/nothing.py")


@PAGES
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page)
    assert targets
    assert [target for target in targets if not (ROOT / "docs" / target).exists()] == []


def test_every_row_shows_a_test_or_an_example_unless_it_is_not_here() -> None:
    rows = re.findall(r"^\|(?!-)(.*)\|$", COMPARE, re.MULTILINE)
    bare = [row for row in rows if "`tests/" not in row and "`examples/" not in row and "not here" not in row]
    assert [row for row in bare if not row.rstrip().endswith("shown by")] == []


def test_every_example_is_somebodys_and_is_in_the_list() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"`{path.name}`" in listed
        assert f"`examples/{path.name}`" in COMPARE


@PAGES
def test_settings_pools_and_errors_have_the_names_that_the_pages_say(page: str) -> None:
    fields = {field.name for field in dataclasses.fields(SandboxSettings)}
    for kind, known in (("SandboxSettings", fields), ("SandboxPool", keywords(SandboxPool))):
        for arguments in re.findall(rf"\b{kind}\(([^`)]*)\)", page):
            assert set(re.findall(r"(\w+)=", arguments)) <= known
    for arguments in re.findall(r"\bSandboxInterpreter\(([^`)]*)\)", page):
        assert set(re.findall(r"(\w+)=", arguments)) <= keywords(SandboxInterpreter)
    assert set(re.findall(r"`((?:Pool|Session)[A-Z]\w+)`", page)) <= set(host_client.__all__)


def keywords(kind: type) -> set[str]:
    return set(inspect.signature(kind).parameters)
