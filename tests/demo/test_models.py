"""Scripted actions come in order, and a real model is only used when one is chosen."""

from __future__ import annotations

from pathlib import Path

import dspy
import pytest

from host_client.demo.keys import ModelChoice
from host_client.demo.models import ScriptedActions, example_model, first_sentence, language_model


def test_actions_come_in_order_and_sub_queries_are_answered() -> None:
    script = ScriptedActions([("Look.", "print(1)"), ("Done.", "SUBMIT(answer=llm_query('x'))")], str.upper)
    with example_model(script, only_scripted=True):
        rlm = dspy.RLM("context -> answer", interpreter_factory=dspy.LocalInterpreter)
        result = rlm(context="c")
    assert result.answer == "X"
    assert [step["reasoning"] for step in result.trajectory] == ["Look.", "Done."]


def test_script_that_has_ended_is_an_error_that_says_so() -> None:
    script = ScriptedActions([("Look.", "print(1)")])
    with example_model(script, only_scripted=True) as lm:
        rlm = dspy.RLM("context -> answer", interpreter_factory=dspy.LocalInterpreter)
        with pytest.raises(Exception, match="1 actions and none after that"):
            rlm(context="c")
        with pytest.raises(Exception, match="no answer to sub-queries"):
            lm("hello")


def test_chosen_model_gets_its_key_and_no_server() -> None:
    def never(messages: object) -> str:
        raise AssertionError("the scripted model was asked")

    choice = ModelChoice(model="openai/gpt-5-mini", api_key="k", api_base="http://proxy", found_in="X")
    with language_model(choice, never) as lm:
        assert lm.model == "openai/gpt-5-mini"
        assert (lm.kwargs["api_key"], lm.kwargs["api_base"]) == ("k", "http://proxy")


def test_example_without_a_key_is_scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "OPENROUTER_API_KEY", "GEMINI_API_KEY", "DSPY_LLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)  # where no .env is
    with example_model(ScriptedActions([], lambda prompt: "scripted"), only_scripted=False) as lm:
        assert lm("hello") == ["scripted"]
        assert dspy.settings.lm is lm


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "# A title\n\n**Decision.** All goes\nthrough 1.5 pipes. Nothing else does.",
            "Decision. All goes through 1.5 pipes.",
        ),
        (
            "```python\nprint(1)  # No. Prose.\n```\n\n| a | b. |\n\nHere is the prose, at last! And so on.",
            "Here is the prose, at last!",
        ),
        ("without an end", "without an end"),
        ("", ""),
    ],
)
def test_first_sentence_is_prose_and_not_the_question(text: str, sentence: str) -> None:
    assert first_sentence(f"What is said here? Be brief.\n\n{text}") == sentence
