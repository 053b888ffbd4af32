"""The scripted model reacts to what the REPL printed; it knows no part of the answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from host_client.demo import corpus, reader, script, snippets
from host_client.demo.chat_format import ActionRequest, Step
from host_client.demo.reader import INSIST, describe_class
from host_client.demo.script import ScriptStuck, next_move, read_facts


def after(*outputs: str, code: str = "...") -> ActionRequest:
    return ActionRequest(tuple(Step("", code, output) for output in outputs), len(outputs) + 1, 20)


EXPLORED = "files: 2\ncharacters: 100"
COLLECTED = "classes: 9\nbases: {'Module': 3, 'Teleprompter': 2}"
FOUND = "modules: ['Ab', 'Cd']\noptimizers: ['Ef']"


def test_script_holds_no_part_of_the_answer() -> None:
    truth = corpus.inspect_package()
    for module in (script, snippets, reader):
        text = Path(str(module.__file__)).read_text(encoding="utf-8")
        # "RLM" is the name of the thing that runs it, and part of prose.
        assert [name for name in truth.modules | truth.optimizers if name in text and name != "RLM"] == []


def test_moves_follow_from_what_is_known() -> None:
    assert next_move(after()).code == snippets.EXPLORE
    assert next_move(after(EXPLORED)).code == snippets.COLLECT
    assert 'below("Module"), below("Teleprompter")' in next_move(after(EXPLORED, COLLECTED)).code
    assert "ask(modules)" in next_move(after(EXPLORED, COLLECTED, FOUND)).code


def test_names_and_numbers_in_the_reasoning_are_the_printed_ones() -> None:
    assert "7,654,321 characters" in next_move(after("files: 5\ncharacters: 7654321")).reasoning
    described = "described: 3 of 3\nunclear: ['Strange', 'Stranger']"
    assert (
        "2 of the answers say UNCLEAR: Strange, Stranger"
        in next_move(after(EXPLORED, COLLECTED, FOUND, described)).reasoning
    )


def test_optimizers_are_described_until_all_are() -> None:
    half = after(EXPLORED, COLLECTED, FOUND, "described: 2 of 3\nunclear: []")
    assert "ask(optimizers)" in next_move(half).code
    whole = after(EXPLORED, COLLECTED, FOUND, "described: 3 of 3\nunclear: []")
    assert next_move(whole).code == snippets.VERIFY


def test_error_is_read_and_repaired() -> None:
    failed = after("[Error] AttributeError: 'NoneType' object has no attribute 'splitlines'", code=snippets.COLLECT)
    code = next_move(failed).code
    assert snippets.FRAGILE not in code
    assert "classes = {}" not in code  # what was collected before is kept


def test_unknown_error_stops_the_script() -> None:
    with pytest.raises(ScriptStuck, match="no space left"):
        next_move(after("[Error] OSError: no space left", code=snippets.COLLECT))


def test_repair_that_did_not_help_stops_the_script() -> None:
    error = "[Error] AttributeError: 'NoneType' object has no attribute 'splitlines'"
    with pytest.raises(ScriptStuck, match="two errors in a row"):
        next_move(after(error, error, code=snippets.COLLECT))


@pytest.mark.parametrize(
    "outputs",
    [
        (EXPLORED, "classes: 9\nbases: {'Type': 3}"),
        (EXPLORED, "classes: 9\nbases: not a literal("),
        (EXPLORED, COLLECTED, "modules: []\noptimizers: []"),
        (EXPLORED, COLLECTED, "modules: {'a': 1}\noptimizers: ['Ef']"),
        (EXPLORED, COLLECTED, FOUND, "described: 3 of 3\nunclear: []", "verified: False"),
    ],
)
def test_unexpected_output_stops_the_script(outputs: tuple[str, ...]) -> None:
    with pytest.raises(ScriptStuck):
        next_move(after(*outputs))


def test_later_facts_replace_earlier_ones() -> None:
    steps = (Step("", "", "unclear: ['A']\nnoise"), Step("", "", "unclear: []"))
    assert read_facts(steps) == {"unclear": "[]"}


def test_no_code_ends_itself_with_backticks() -> None:
    for name, value in vars(snippets).items():
        text = getattr(value, "template", value)
        assert not (name.isupper() and "```" in str(text)), name


def ask(source: str, extra: str = "") -> str:
    return describe_class(f"In one sentence, what does the class Thing do?\n<source>\n{source}\n</source>{extra}")


def test_sub_model_answers_with_the_docstring() -> None:
    assert ask('class Thing(Base):\n    """Does one thing well. And more.\n\n    Args: x\n    """') == (
        "Does one thing well."
    )


def test_sub_model_looks_past_a_deprecation_note() -> None:
    source = 'class Thing:\n    """.. deprecated:: 3.4\n       Gone soon.\n\n    Runs a program in a loop.\n    """'
    assert ask(source) == "Deprecated. Runs a program in a loop."


def test_sub_model_does_not_take_a_methods_docstring_for_the_class() -> None:
    source = 'class Thing:\n    def run(self, x: int = 1):\n        """A common argument is two."""\n'
    assert ask(source).startswith("UNCLEAR")
    assert ask(source.replace("A common argument is two", "An optimizer for long prompts")) == (
        "An optimizer for long prompts."
    )


def test_sub_model_names_methods_when_asked_to_answer_anyway() -> None:
    source = "class Thing:\n    def compile(self, student, *, trainset: list[int]):\n        pass\n"
    assert ask(source) == "UNCLEAR: this excerpt does not say."
    assert ask(source, INSIST) == "Undocumented: works through compile(student, trainset)."
    assert ask("class Thing(Base):\n    pass", INSIST) == "Thing adds nothing of its own to its base class."


def test_sub_model_without_source_says_so() -> None:
    assert describe_class("What is the meaning of it all?").startswith("UNCLEAR")
