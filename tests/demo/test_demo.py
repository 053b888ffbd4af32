"""The whole demo, with the real dspy.LM and dspy.RLM."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.primitives.code_interpreter import FinalOutput

from host_client.demo import corpus, main

LocalInterpreter: Any = dspy.LocalInterpreter


def run_demo(tmp_path: Path, factory: Any = LocalInterpreter, *options: str) -> int:
    return main(["--scripted", "--fast", "--out", str(tmp_path / "out"), *options], factory=factory)


@pytest.fixture
def finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, dict[str, Any]]:
    status = run_demo(tmp_path)
    [path] = (tmp_path / "out").iterdir()
    return status, capsys.readouterr().out, json.loads(path.read_text())


def test_demo_answers_right_and_exits_0(finished: tuple[int, str, dict[str, Any]]) -> None:
    status, out, record = finished
    truth = corpus.inspect_package()
    assert status == 0
    assert set(record["answer"]["modules"]) == truth.modules
    assert set(record["answer"]["optimizers"]) == truth.optimizers
    assert f"ok  modules: {len(truth.modules)} of {len(truth.modules)} found, 0 wrong" in out


def test_demo_tells_the_whole_story(finished: tuple[int, str, dict[str, Any]]) -> None:
    _, out, record = finished
    iterations = record["iterations"]
    outcomes = [iteration["outcome"] for iteration in iterations]
    tools = [tool["name"] for iteration in iterations for tool in iteration["tools"]]
    # One error, met and mended; state kept over it; a custom tool; sub-queries in batches; then the answer.
    assert outcomes.count("error") == 1
    assert outcomes[-1] == "submitted"
    assert "kept from before the error: " in iterations[outcomes.index("error") + 1]["output"]
    assert tools.count("public_names") == 1
    assert tools.count("llm_query_batched") >= 2
    assert sum(tool["queries"] or 0 for i in iterations for tool in i["tools"]) >= 20
    assert all(f"\n-- {iteration['number']} -" in out for iteration in iterations)


def test_sentences_are_taken_from_the_source(finished: tuple[int, str, dict[str, Any]]) -> None:
    _, _, record = finished
    text = " ".join("".join(corpus.read_source().values()).split()).lower()
    lines = [*record["answer"]["modules"].values(), *record["answer"]["optimizers"].values()]
    quoted = [line for line in lines if not line.startswith(("Undocumented", "Deprecated"))]
    assert len(quoted) > 10
    assert [line for line in quoted if line.rstrip(".").removesuffix(" ...").lower() not in text] == []


def test_nothing_of_a_run_is_left(finished: tuple[int, str, dict[str, Any]]) -> None:
    assert "scripted-lm" not in {thread.name for thread in threading.enumerate()}
    assert dspy.settings.lm is None


class Forgetful(LocalInterpreter):  # type: ignore[misc]
    """An interpreter that loses one optimizer on the way out."""

    def execute(self, code: str, variables: dict[str, Any] | None = None) -> Any:
        result = super().execute(code, variables)
        if isinstance(result, FinalOutput):
            result.output["optimizers"].pop("GEPA")
        return result


def test_wrong_answer_is_shown_and_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo(tmp_path, Forgetful) == 1
    assert "missing: GEPA" in capsys.readouterr().out


def failing(error: BaseException) -> Any:
    def make_interpreter() -> Any:
        raise error

    return make_interpreter


def test_failure_is_one_sentence_and_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo(tmp_path, failing(RuntimeError("no engine answers"))) == 2
    out, err = capsys.readouterr()
    assert "RuntimeError: no engine answers" in out
    assert "Traceback" not in out + err


def test_ctrl_c_exits_130(tmp_path: Path) -> None:
    assert run_demo(tmp_path, failing(KeyboardInterrupt())) == 130


def test_key_in_an_error_is_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.delenv("RLM_SANDBOX_DEMO_MODEL", raising=False)
    monkeypatch.delenv("DSPY_LM_MODEL", raising=False)
    factory = failing(RuntimeError("bad key sk-very-secret"))
    assert main(["--out", str(tmp_path)], factory=factory) == 2
    out = capsys.readouterr().out
    assert "bad key ***" in out
    assert "openai/gpt-5-mini, with the key in OPENAI_API_KEY" in out


@pytest.mark.docker
def test_demo_runs_in_the_sandbox(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo(tmp_path, None) == 0
    assert "a Docker container of its own" in capsys.readouterr().out
