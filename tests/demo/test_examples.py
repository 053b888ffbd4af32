"""The examples run: with an interpreter in this process here, and in the sandbox under the marker ``docker``."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dspy.primitives.code_interpreter import CodeExecutionError, FinalOutput

import host_client
from broker.testing import InProcessBroker
from host_client.providers.fake import FakeProvider
from tests.demo.example_files import load


class InProcess:
    """In place of ``SandboxInterpreter``: no sandbox at all, but a tool's KeyError is a KeyError here, too."""

    def __init__(self) -> None:
        self.tools: dict[str, Any] = {}
        self.output_fields: Any = None
        self._globals: dict[str, Any] = {"SUBMIT": self._submit}
        self._submitted: FinalOutput | None = None

    @classmethod
    def factory(cls, **keywords: Any) -> Any:
        return cls

    def start(self) -> None: ...

    def shutdown(self) -> None: ...

    def execute(self, code: str, variables: dict[str, Any] | None = None) -> Any:
        self._globals.update({name: by_keywords(tool) for name, tool in self.tools.items()}, **(variables or {}))
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                exec(compile(code, "<code>", "exec"), self._globals)
        except Exception as error:
            raise CodeExecutionError(f"{type(error).__name__}: {error}") from error
        return self._submitted or out.getvalue()

    def _submit(self, **fields: Any) -> None:
        self._submitted = FinalOutput(fields)


def by_keywords(tool: Any) -> Any:
    """DSPy's tools take keywords only; generated code calls them as it likes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return tool(**inspect.signature(tool).bind(*args, **kwargs).arguments)

    return call


@pytest.fixture(params=["in-process", pytest.param("sandbox", marks=pytest.mark.docker)])
def interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "in-process":
        monkeypatch.setitem(vars(host_client), "SandboxInterpreter", InProcess)
    return str(request.param)


@pytest.fixture
def novel(tmp_path: Path) -> Path:
    """A book of 25 chapters with a table of contents: Anna grows rich, Boris poor."""
    contents = "".join(f"Chapter {n}. The part\n" for n in range(1, 26))
    chapters = [
        f"Chapter {n}. The part\n\n{'The weather was mild that day. ' * 20}\n"
        f"Anna found {'gold and a fortune' if n > 10 else 'nothing but debt'}. "
        f"Boris was {'in debt and ruin' if n > 10 else 'a rich banker'}.\n\n"
        for n in range(1, 26)
    ]
    path = tmp_path / "novel.txt"
    path.write_text("A Novel\n\nContents\n" + contents + "\n" + "".join(chapters), encoding="utf-8")
    return path


def test_quickstart_prints_the_commands_of_the_readme(interpreter: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load("quickstart").main(["--scripted"]) == 0
    commands = capsys.readouterr().out.strip().split(", ")
    assert {"make demo", "make test", "make sandbox-up"} <= set(commands)


def test_custom_tool_adds_up_what_only_the_host_knows(interpreter: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load("custom_tool").main(["--scripted"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["Ada", "42.50"], ["Grace", "10.00"]]  # Nobody is unknown: KeyError, caught in the sandbox


def test_custom_tool_takes_hostile_text_as_a_name() -> None:
    example = load("custom_tool")
    orders_of = example.make_tool(example.ORDERS)
    with pytest.raises(KeyError):
        orders_of("Ada' OR '1'='1")


def test_the_four_hooks_bring_a_helper_block_a_name_and_give_a_hint(
    interpreter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load("hooks_example").main(["--scripted"]) == 0
    first, rest = capsys.readouterr().out.split("--- step 2\n")
    assert "print(# BLOCKED(" in first
    assert "-> [Error]" in first
    assert "grep(search_pattern, text) is already in scope" in first
    assert rest.splitlines()[-1] == "3 steps: TODO, HACK, FIXME"


def test_the_budget_hook_stops_the_run_and_the_answer_is_extracted(
    interpreter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load("hooks_example").main(["--scripted", "--budget", "0.03"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 steps: TODO, HACK, FIXME"


@pytest.fixture(params=["real workers", pytest.param("sandbox", marks=pytest.mark.docker)])
def forking(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Arguments for an interpreter whose sessions can fork, which the one of this process cannot."""
    if request.param == "sandbox":
        yield {}
        return
    with InProcessBroker() as broker:
        yield {"provider": FakeProvider(broker)}


def test_the_search_finds_a_ladder_and_comes_back(
    forking: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load("search_over_states")
    monkeypatch.setattr(example, "SandboxInterpreter", functools.partial(host_client.SandboxInterpreter, **forking))
    assert example.main([]) == 0
    ladder, back = capsys.readouterr().out.splitlines()
    words = ladder.split(" -> ")
    assert (words[0], words[-1]) == ("cold", "warm")
    assert all(sum(a != b for a, b in zip(*pair, strict=True)) == 1 for pair in itertools.pairwise(words))
    assert back.startswith("and back at ['cold'] with ")
    assert not back.endswith(" 0 shapes")


def test_novel_analysis_covers_every_chapter_and_plots(
    interpreter: str, novel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plot.png"
    arguments = ["--scripted", "--file", str(novel), "--characters", "Anna", "Boris", "--out", str(out)]
    assert load("novel_analysis").main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("25 chapters, ")
    assert [line.split() for line in lines[1:3]] == [["Anna", "25", "chapters"], ["Boris", "25", "chapters"]]
    assert out.read_bytes().startswith(b"\x89PNG")


def test_chapters_are_told_from_the_table_of_contents(novel: Path) -> None:
    chapters = load("novel_analysis").split_chapters(novel.read_text())
    assert len(chapters) == 25
    assert chapters[24].startswith("Chapter 25. The part\n\nThe weather")


def test_roman_chapters_are_found_and_a_text_without_chapters_is_refused() -> None:
    split = load("novel_analysis").split_chapters
    assert len(split("CHAPTER I\n" + "word " * 200 + "\n  Chapter IX. Title\n" + "word " * 200)) == 2
    with pytest.raises(ValueError, match="found no chapters"):
        split("Once upon a time. " * 100)


def test_scripted_reader_rates_by_words_and_quotes_the_text() -> None:
    prompt = 'characters: ["Anna"]\n<chapter 7>\nAnna was rich. Anna had gold! Boris starved.\n</chapter>'
    [row] = json.loads(load("novel_analysis").count_words(prompt))
    assert row == {"chapter": 7, "character": "Anna", "wealth": 10, "event": "Anna was rich."}


def test_rows_that_are_not_what_was_asked_for_are_left_out() -> None:
    good = {"chapter": 1, "character": "Anna", "wealth": 5, "event": "x"}
    bad = [{**good, "chapter": 99}, {**good, "wealth": 11}, {**good, "character": "Zoe"}, {"chapter": "1"}, {}]
    assert load("novel_analysis").checked_points([good, *bad], 3, ["Anna"]) == [good]
