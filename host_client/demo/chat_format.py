"""Reading and writing DSPy's chat format, from the model's side.

An action prompt of ``dspy.RLM`` shows the model everything that happened so far as text; ``read_action``
turns that text back into steps, and ``write_fields`` writes a reply that the adapter can parse.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from host_client.demo.scripted_lm import Message

# The inputs of an action prompt in their order; the text between two headers is the first one's value.
_HISTORY, _ITERATION = "[[ ## repl_history ## ]]", "[[ ## iteration ## ]]"

# As ``dspy.primitives.repl_types.REPLEntry.format`` writes it (3.1.3 to 3.4.1).
_STEP = re.compile(
    r"(?:Reasoning: (?P<reasoning>.*?)\n)?Code:\n```python\n(?P<code>.*?)\n```\n"
    r"Output \([\d,]+ chars\):\n(?P<output>.*)",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One past iteration as the model sees it (a long output may have been shortened by DSPy)."""

    reasoning: str
    code: str
    output: str

    @property
    def failed(self) -> bool:
        """Whether the code raised."""
        return self.output.startswith("[Error]")


@dataclasses.dataclass(frozen=True, slots=True)
class ActionRequest:
    """What an action prompt says: the steps so far, and which iteration of how many this is."""

    steps: tuple[Step, ...]
    iteration: int
    max_iterations: int


def is_action(messages: Sequence[Message]) -> bool:
    """Tell an action prompt of an RLM from a sub-query, which has no system message."""
    return messages[0].role == "system" and _HISTORY in messages[-1].text


def read_action(messages: Sequence[Message]) -> ActionRequest:
    """Read an action prompt.

    Raises:
        ValueError: The prompt is not one of ``dspy.RLM``.
    """
    text = messages[-1].text
    # The history may quote these very headers (DSPy's source does), so: the first one, and the last one.
    start, end = text.find(_HISTORY), text.rfind(_ITERATION)
    counter = re.match(r"\s*(\d+)/(\d+)", text[end + len(_ITERATION) :])
    if start < 0 or end < start or counter is None:
        raise ValueError("not an action prompt of dspy.RLM")
    steps = read_steps(text[start + len(_HISTORY) : end])
    return ActionRequest(steps, int(counter[1]), int(counter[2]))


def read_steps(history: str) -> tuple[Step, ...]:
    """Split the text of a REPL history into its steps."""
    steps: list[Step] = []
    rest = history.partition("=== Step 1 ===\n")[2]
    while rest:
        # Steps count up, so an output that quotes "=== Step 1 ===" does not cut a step in two.
        own, _, rest = rest.partition(f"\n=== Step {len(steps) + 2} ===\n")
        match = _STEP.match(own)
        if match is None:
            raise ValueError(f"step {len(steps) + 1} of the history is not in DSPy's format")
        steps.append(Step(match["reasoning"] or "", match["code"], match["output"].strip()))
    return tuple(steps)


def write_fields(**fields: str) -> str:
    """Write a reply with these output fields, as DSPy's chat adapter reads it."""
    parts = [f"[[ ## {name} ## ]]\n{value}" for name, value in fields.items()]
    return "\n\n".join([*parts, "[[ ## completed ## ]]"])


def write_action(reasoning: str, code: str) -> str:
    """Write the reply to an action prompt."""
    return write_fields(reasoning=reasoning, code=f"```python\n{code.strip()}\n```")
