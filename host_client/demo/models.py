"""The language model of the demo and the examples: a real one, or a scripted one behind a real server."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from host_client.demo.chat_format import is_action, read_action, write_action
from host_client.demo.keys import ModelChoice, choose_model
from host_client.demo.scripted_lm import Message, ScriptedModel, serve

# Room for reasoning models; DSPy before 3.2 insists on these two for some of them.
_REAL_MODEL = {"temperature": 1.0, "max_tokens": 16_000}


class ScriptedActions:
    """A scripted model with a fixed list of actions, one per iteration.

    Args:
        actions: Reasoning and code of each iteration.
        answer: What answers a sub-query (``llm_query``), given its prompt.
    """

    def __init__(self, actions: Sequence[tuple[str, str]], answer: Callable[[str], str] | None = None) -> None:
        self._actions = list(actions)
        self._answer = answer

    def __call__(self, messages: Sequence[Message], /) -> str:
        """Return the action after the steps so far, or the answer to a sub-query."""
        if is_action(messages):
            done = len(read_action(messages).steps)
            if done >= len(self._actions):
                raise RuntimeError(f"the script has {len(self._actions)} actions and none after that")
            return write_action(*self._actions[done])
        if self._answer is None:
            raise RuntimeError("the script has no answer to sub-queries")
        return self._answer(messages[-1].text)


def first_sentence(prompt: str) -> str:
    """Play the sub-model that sums up: give the first sentence of the Markdown after a prompt's first empty line."""
    text = prompt.partition("\n\n")[2]
    prose = re.sub(r"^#.*?$|^\|.*?$|^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    plain = " ".join(prose.replace("**", "").split())
    # A label such as "Decision." is none.
    found = re.match(r".{20,}?[.!?](?=\s|$)", plain)
    return found[0] if found else plain


@contextlib.contextmanager
def language_model(
    choice: ModelChoice | None,
    scripted: ScriptedModel,
    *,
    think_s: Callable[[Sequence[Message]], float] | None = None,
) -> Iterator[Any]:
    """Give the ``dspy.LM`` for a choice; a scripted one has its server for as long as the block lasts.

    Args:
        choice: A real model, or None for the scripted one.
        scripted: What plays the model then.
        think_s: How long the scripted one waits before each reply, in seconds.
    """
    import dspy

    if choice is not None:
        base = {} if choice.api_base is None else {"api_base": choice.api_base}
        yield dspy.LM(choice.model, api_key=choice.api_key, **_REAL_MODEL, **base)
        return
    with serve(scripted, think_s=think_s) as server:
        # The cache would replay the replies of the last run; retries would hide a script that is stuck.
        keywords = {"api_key": "not-a-key", "cache": False, "num_retries": 0}
        yield dspy.LM("openai/scripted", api_base=server.base_url, **keywords)


@contextlib.contextmanager
def example_model(scripted: ScriptedModel, *, only_scripted: bool) -> Iterator[Any]:
    """Configure DSPy for an example: the model whose key is in the environment or in ``.env``, else the script."""
    import dspy

    choice = None if only_scripted else choose_model(os.environ, Path(".env"))
    with language_model(choice, scripted) as lm, dspy.context(lm=lm):
        yield lm
