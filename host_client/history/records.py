"""What the history holds: one dataclass for each table; its fields are the columns, the first ones the key."""

from __future__ import annotations

import dataclasses
from typing import Any

#: How a run ends; ``running`` is also what one shows whose process was killed.
RUNNING, DONE, EXTRACTED, FAILED, INTERRUPTED, OVER_BUDGET = (
    "running",
    "done",
    "extracted",
    "failed",
    "interrupted",
    "over budget",
)
#: The module of code that was executed without one.
NO_MODULE = "execute"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One call of a module that writes code, or all that was executed in one interpreter without one.

    Attributes:
        id: What ``history show`` takes.
        parent_id: The run in whose tool it ran, or None.
        module: ``RLM``, ``CodeAct``, ... or ``execute``.
        signature: Its signature.
        inputs: JSON object: what each input was, by kind and size; never its value.
        started_at: Wall-clock seconds.
        duration_s: Or None while it runs.
        outcome: ``running``, ``done``, ``extracted`` (no SUBMIT, the answer was extracted at the end), ``failed``,
            ``interrupted``, ``over budget``.
        outputs: JSON object of its output fields, or None.
        error: What ended it.
        iterations: Steps of its model, the extraction too.
        executions: Pieces of code that ran.
        calls: Sub-calls, nested runs included.
        tokens: Of all calls of models, nested runs included.
        cost: In US dollars.
        unpriced: Calls of models without a known cost.
        process: Id of the process.
    """

    id: str
    parent_id: str | None
    module: str
    signature: str
    inputs: Any
    started_at: float
    duration_s: float | None = None
    outcome: str = RUNNING
    outputs: Any = None
    error: str | None = None
    iterations: int = 0
    executions: int = 0
    calls: int = 0
    tokens: int = 0
    cost: float = 0.0
    unpriced: int = 0
    process: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IterationRow:
    """One step of a run's model.

    Attributes:
        run_id: Its run.
        number: From 1.
        kind: ``action`` where it wrote code, else ``answer``, such as the extraction after the last iteration.
        started_at: Wall-clock seconds.
        duration_s: Of the model's step, without what its code took.
        reasoning: What the model thought.
        code: What it wrote.
        error: Why there is no step.
    """

    run_id: str
    number: int
    kind: str
    started_at: float
    duration_s: float
    reasoning: str | None
    code: str | None
    error: str | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionRow:
    """One piece of code that ran.

    Attributes:
        run_id: Its run.
        number: From 1.
        iteration: The step that wrote it; 0 for none.
        session_id: Where it ran.
        started_at: Wall-clock seconds.
        duration_s: Seen by the host.
        sandbox_s: In the sandbox, or None where it never ran.
        outcome: ``ok``, ``submitted``, ``raised``, ... as in ``docs/protocol.md``; or the name of the host's error.
        code: What ran.
        output: What was printed, then the value of the last expression.
        error: What it raised.
    """

    run_id: str
    number: int
    iteration: int
    session_id: str | None
    started_at: float
    duration_s: float
    sandbox_s: float | None
    outcome: str
    code: str
    output: str
    error: str | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CallRow:
    """One call of a tool, or of a model.

    Attributes:
        run_id: Its run.
        number: From 1.
        iteration: The step during which it was made.
        kind: ``tool`` or ``model``.
        name: The tool's, or the model's.
        via: For a model: the tool that called it; empty for the run's own step.
        started_at: Wall-clock seconds.
        duration_s: How long it took.
        prompt: JSON: the messages to a model, or the arguments of a tool, ``{"args": [...], "kwargs": {...}}``.
        answer: JSON: a model's outputs, or the result of ``llm_query`` and ``llm_query_batched``.
        answer_chars: How large the answer is as text; None where there is none. To be written: the answer itself.
        tokens_in: Of the prompt.
        tokens_out: Of the answer.
        cost: In US dollars; None where it is not known.
        cached: Whether the answer came from DSPy's cache.
        error: What it raised.
    """

    run_id: str
    number: int
    iteration: int
    kind: str
    name: str
    via: str
    started_at: float
    duration_s: float
    prompt: Any
    answer: Any
    answer_chars: Any
    tokens_in: int
    tokens_out: int
    cost: float | None
    cached: bool
    error: str | None


Row = RunRow | IterationRow | ExecutionRow | CallRow


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WholeRun:
    """A run with all that is known of it, in the order in which it happened."""

    run: RunRow
    iterations: tuple[IterationRow, ...]
    executions: tuple[ExecutionRow, ...]
    calls: tuple[CallRow, ...]
    nested: tuple[RunRow, ...]
