"""Claims about declared tools under each supported DSPy, which wraps tools in its own way."""

from __future__ import annotations

import re
from pathlib import Path

import dspy

from host_client import ToolEvent, progress, tool
from tests.conformance.backends import Backend
from tests.conformance.dspy_versions import outputs_of, rlm, writes


@tool(where="sandbox")
def regex_extract(text: str, pattern: str, flags: int = 0) -> list[str]:
    """Extract all matches of a pattern."""
    return re.findall(pattern, text, flags)


@tool(name="look_up", max_calls=1, timeout_s=60, max_concurrent=1, description="Look a word up.")
async def _find(word: str) -> str:
    progress(0.5, f"half of {word}")
    return word.upper()


def test_rlm_runs_tools_of_the_sandbox_beside_limited_ones_of_the_host(real_backend: Backend) -> None:
    seen: list[ToolEvent] = []
    factory = real_backend.factory(on_tool_event=seen.append)
    program = rlm("q -> answer", factory, tools=[regex_extract, _find])
    codes = (
        "print(regex_extract('baab', 'a+'), look_up('x'))",
        "try:\n    print(look_up('y'), look_up(word='z'))\nexcept RuntimeError as error:\n    print(error.type)",
        "SUBMIT(answer=regex_extract(text=look_up('w'), pattern='.')[0])",
    )
    with dspy.context(lm=writes(*codes)):
        prediction = program(q="?")
    assert outputs_of(prediction)[:2] == ["['aa'] X", "ToolBudgetExceeded"]
    assert prediction.answer == "W"
    assert [event.message for event in seen if event.kind == "progress"] == [
        f"50% · half of {word}" for word in ("x", "y", "w")
    ]
    assert {event.tool for event in seen} >= {"look_up"}
    prompt = program.generate_action.signature.instructions
    for told in ("regex_extract", "Extract all matches of a pattern.", "look_up", "Look a word up.", "Returns str."):
        assert told in prompt


def test_artefacts_outlive_the_interpreter_that_rlm_shuts_down(real_backend: Backend, tmp_path: Path) -> None:
    factory = real_backend.factory(artifacts_to=tmp_path)
    code = "import os\nos.makedirs('artifacts', exist_ok=True)\nopen('artifacts/a.csv', 'w').write('x')\nSUBMIT('done')"
    with dspy.context(lm=writes(code)):
        assert rlm("q -> answer", factory)(q="?").answer == "done"
    assert (tmp_path / "a.csv").read_text() == "x"
    assert [artifact.name for artifact in real_backend.made[0].artifacts] == ["a.csv"]
