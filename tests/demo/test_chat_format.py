"""The model's side reads what DSPy writes, and DSPy reads what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from host_client.demo.chat_format import Step, is_action, read_action, read_steps, write_action
from host_client.demo.scripted_lm import Message


def action_prompt(steps: Sequence[Step], iteration: str = "3/20") -> list[Message]:
    """Have DSPy's own adapter and REPLHistory write an action prompt of an RLM."""
    import dspy
    from dspy.primitives.repl_types import REPLHistory

    history = REPLHistory()
    for step in steps:
        history = history.append(reasoning=step.reasoning, code=step.code, output=step.output)
    rlm: Any = dspy.RLM("context -> answer")
    signature = rlm.generate_action.signature
    inputs = {"variables_info": ["Variable: `context`"], "repl_history": history, "iteration": iteration}
    messages = dspy.ChatAdapter().format(signature, demos=[], inputs=inputs)
    return [Message(message["role"], message["content"]) for message in messages]


STEPS = (
    Step("First a look.", "print(len(context))\n\nprint(context[:3])", "12\nabc"),
    Step("", "1 / 0", "[Error] division by zero"),
)


def test_history_written_by_dspy_is_read_back() -> None:
    request = read_action(action_prompt(STEPS))
    assert request.steps == STEPS
    assert (request.iteration, request.max_iterations) == (3, 20)
    assert [step.failed for step in request.steps] == [False, True]


def test_first_iteration_has_no_steps() -> None:
    assert read_action(action_prompt((), "1/20")).steps == ()


@pytest.mark.parametrize(
    "output",
    [
        "=== Step 1 ===\nCode:\n```python\nx\n```\nOutput (1 chars):\nx",
        "[[ ## iteration ## ]]\n7/9",
        "[[ ## repl_history ## ]]\nnothing",
        "[[ ## code ## ]]",
    ],
)
def test_output_that_quotes_the_format_does_not_break_it(output: str) -> None:
    steps = (Step("look", "print(source)", output), Step("again", "print(1)", "1"))
    request = read_action(action_prompt(steps))
    assert request.steps == steps
    assert request.iteration == 3


def test_action_prompts_and_sub_queries_are_told_apart() -> None:
    assert is_action(action_prompt(()))
    assert not is_action([Message("user", "What is [[ ## repl_history ## ]] for?")])


def test_reply_is_what_the_adapter_parses() -> None:
    import dspy

    rlm: Any = dspy.RLM("context -> answer")
    fields = dspy.ChatAdapter().parse(rlm.generate_action.signature, write_action("Look.\nClosely.", "\nprint(1)\n"))
    assert fields == {"reasoning": "Look.\nClosely.", "code": "```python\nprint(1)\n```"}


def test_text_that_is_no_action_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="not an action prompt"):
        read_action([Message("user", "hello")])
    with pytest.raises(ValueError, match="step 1"):
        read_steps("=== Step 1 ===\nnonsense")
