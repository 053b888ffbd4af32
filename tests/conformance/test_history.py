"""Claims about budgets and the history that DSPy's own modules leave, on every supported DSPy."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import dspy
import pytest
from dspy.utils.callback import BaseCallback

from host_client import Budget, BudgetExceeded, SandboxSettings
from host_client.errors import BadSetting
from host_client.history import History
from host_client.history.records import EXTRACTED, FAILED, OVER_BUDGET
from tests.conformance.backends import IN_PROCESS, Backend
from tests.conformance.conftest import Open
from tests.conformance.dspy_versions import HAS_FACTORY, only_if, outputs_of, rlm, with_interpreter, writes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

_TOKENS = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
_PRICE = 0.01


class PricedLM(dspy.BaseLM):  # type: ignore[misc]
    """Writes these pieces of code, answers every other prompt with 'four', and says what each call costs."""

    def __init__(self, *codes: str) -> None:
        super().__init__(model="priced", cache=False)
        self._codes = iter(codes)
        self.asked_in: list[str] = []

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        text = str(prompt or messages)
        self.asked_in.append(threading.current_thread().name)
        answer = "four"
        if "## code ##" in text:
            answer = (
                f"[[ ## reasoning ## ]]\nI think.\n\n[[ ## code ## ]]\n{next(self._codes)}\n\n[[ ## completed ## ]]"
            )
        elif "## answer ##" in text:
            answer = "[[ ## answer ## ]]\nextracted\n\n[[ ## completed ## ]]"
        message = SimpleNamespace(
            content=answer, tool_calls=None, reasoning_content=None, provider_specific_fields=None
        )
        return SimpleNamespace(
            model="priced",
            choices=[SimpleNamespace(message=message, finish_reason="stop", index=0)],
            usage=dict(_TOKENS),
            _hidden_params={"response_cost": _PRICE},
        )

    async def aforward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        return self.forward(prompt, messages, **kwargs)


@pytest.fixture
def backend(open_provider: Open) -> Iterator[Backend]:
    """Real workers, and a container would add nothing: all of this is the host's."""
    made = Backend(IN_PROCESS, open_provider(IN_PROCESS))
    yield made
    made.close()


def test_a_run_is_recorded_with_its_steps_code_and_prompts(backend: Backend) -> None:
    program = rlm("book -> answer", backend.factory())
    codes = ["print(len(book))", "print(llm_query('what?'))", "nope", "SUBMIT('whales')"]
    with dspy.context(lm=PricedLM(*codes)):
        program(book="call me ishmael")
    backend.close()
    [run] = History().runs()
    whole = History().find(run.id)
    assert (run.module, run.signature, run.outcome, run.iterations) == ("RLM", "book -> answer", "done", 4)
    assert json.loads(run.inputs) == {"book": "str, 15 characters"}
    assert json.loads(run.outputs) == {"answer": "whales"}
    assert (run.calls, run.tokens) == (1, 5 * 120)
    assert run.cost == pytest.approx(5 * _PRICE)
    assert [(step.kind, step.reasoning, step.code) for step in whole.iterations] == [
        ("action", "I think.", code) for code in codes
    ]
    ran = [execution for execution in whole.executions if execution.iteration]
    assert [(execution.iteration, execution.outcome) for execution in ran] == [
        (1, "ok"),
        (2, "ok"),
        (3, "raised"),
        (4, "submitted"),
    ]
    assert ran[0].output == "15"
    assert ran[2].error is not None
    assert "NameError" in ran[2].error
    asked = [call for call in whole.calls if call.via or call.kind == "tool"]
    assert [(call.kind, call.name, call.iteration) for call in asked] == [
        ("model", "priced", 2),
        ("tool", "llm_query", 2),
    ]
    assert json.loads(asked[0].prompt)[0]["content"] == "what?"
    assert (asked[0].tokens_in, asked[0].tokens_out, asked[0].answer_chars) == (100, 20, 4)


def test_a_run_without_submit_is_told_as_extracted(backend: Backend) -> None:
    with dspy.context(lm=PricedLM("1", "2")):
        rlm("q -> answer", backend.factory(), max_iters=2)(q="?")
    backend.close()
    [run] = History().runs()
    assert (run.outcome, run.iterations) == (EXTRACTED, 3)


def test_sub_calls_beyond_the_budget_raise_in_the_code_which_can_still_submit(backend: Backend) -> None:
    factory = backend.factory(budget=Budget(max_calls=2))
    codes = [
        "print(llm_query('a'), budget())",
        "try:\n    llm_query_batched(['b', 'c'])\nexcept Exception as error:\n    print(error)",
        "llm_query('d')",
        "llm_query('e')",
        "SUBMIT('what I have')",
    ]
    with dspy.context(lm=PricedLM(*codes)):
        prediction = rlm("q -> answer", factory)(q="?")
    seen = outputs_of(prediction)
    assert seen[0] == "four {'calls': 1}"
    assert "2 sub-calls do not fit into the budget max_calls=2: 1 are left" in seen[1]
    assert "[Error]" not in seen[2]
    assert "BudgetExceeded: the budget max_calls=2 is used up" in seen[3]
    assert prediction.answer == "what I have"


def test_a_run_that_goes_on_without_budget_ends_with_a_typed_error(backend: Backend) -> None:
    program = rlm("q -> answer", backend.factory(budget=Budget(max_tokens=300)), max_iters=9)
    lm = PricedLM(*["print('on')"] * 9)
    with dspy.context(lm=lm), pytest.raises(BudgetExceeded, match="max_tokens=300") as caught:
        program(q="?")
    assert (caught.value.budget, caught.value.limit) == ("max_tokens", 300)
    # Two actions within the budget, two of grace, and the one whose code was refused.
    assert len(lm.asked_in) == 5
    backend.close()
    [run] = History().runs()
    assert run.outcome == OVER_BUDGET


def test_each_run_of_a_factory_has_a_budget_of_its_own(backend: Backend) -> None:
    program = rlm("q -> answer", backend.factory(budget=Budget(max_calls=1)))
    for _ in range(2):
        with dspy.context(lm=PricedLM("SUBMIT(llm_query('a'))")):
            assert program(q="?").answer == "four"


def test_nested_runs_and_batches_in_threads_count_into_the_budget_around_them(backend: Backend) -> None:
    def ask_deeper(question: str) -> str:
        """Answer with an RLM of its own."""
        inner = rlm("q -> answer", backend.factory())
        with dspy.context(lm=PricedLM("SUBMIT(llm_query_batched(['x', 'y', 'z'])[0])")):
            return str(inner(q=question).answer)

    program = rlm("q -> answer", backend.factory(), tools=[ask_deeper], sub_lm=PricedLM())
    lm = PricedLM("a = llm_query_batched(['b', 'c'])", "SUBMIT(ask_deeper(question='?'))")
    with dspy.context(lm=lm), Budget(max_calls=100, max_cost=1.0) as budget:
        assert program(q="?").answer == "four"
    spent = budget.spent()
    # Two prompts, the nested run's action, and its three prompts; two actions of the run itself are no sub-calls.
    assert (spent["calls"], spent["tokens"]) == (2 + 1 + 3, (2 + 1 + 3 + 2) * 120)
    assert spent["cost"] == pytest.approx(8 * _PRICE)
    backend.close()
    inner, outer = sorted(History().runs(), key=lambda run: run.calls)
    assert (inner.parent_id, outer.parent_id) == (outer.id, None)
    assert (inner.calls, outer.calls) == (3, 6)


def test_a_nested_run_gets_no_grace_when_the_run_around_it_has_nothing_left(backend: Backend) -> None:
    refused: list[BaseException] = []

    def ask_deeper() -> str:
        """Answer with an RLM of its own."""
        try:
            with dspy.context(lm=PricedLM("SUBMIT('inner')")):
                rlm("q -> answer", backend.factory())(q="?")
        except BudgetExceeded as error:
            refused.append(error)
            raise
        return "?"

    program = rlm("q -> answer", backend.factory(budget=Budget(max_tokens=120)), tools=[ask_deeper])
    with dspy.context(lm=PricedLM("ask_deeper()", "SUBMIT('outer')")):
        prediction = program(q="?")
    assert len(refused) == 1
    assert "BudgetExceeded" in outputs_of(prediction)[0]
    assert prediction.answer == "outer"


def test_runs_side_by_side_have_an_account_and_a_record_each(backend: Backend) -> None:
    program = rlm("q -> answer", backend.factory(budget=Budget(max_calls=2))) if HAS_FACTORY else None

    def run(number: int) -> str:
        # Before 3.3 a module has one interpreter, and two runs cannot share it.
        mine = program or rlm("q -> answer", backend.factory(budget=Budget(max_calls=2)))
        with dspy.context(lm=PricedLM("x = llm_query('a')", "y = llm_query('b')", f"SUBMIT('{number}')")):
            return str(mine(q="?").answer)

    numbers = list(range(6))
    with ThreadPoolExecutor(1 if program is None else 4) as pool:
        assert list(pool.map(run, numbers)) == [str(number) for number in numbers]
    backend.close()
    runs = History().runs()
    assert [(run.parent_id, run.iterations, run.calls, run.tokens) for run in runs] == [(None, 3, 2, 600)] * 6


def test_dspy_s_settings_can_still_be_copied_and_pickled(backend: Backend) -> None:
    backend.make()
    callbacks = dspy.settings.callbacks
    assert len(callbacks) >= 1
    assert pickle.loads(pickle.dumps(callbacks))[0] is copy.deepcopy(callbacks)[0] is callbacks[0]


def test_aforward_is_recorded_and_limited_too(backend: Backend) -> None:
    async def main() -> Any:
        with dspy.context(lm=PricedLM("print(llm_query('a'))", "SUBMIT('b')")), Budget(max_calls=5) as budget:
            prediction = await rlm("q -> answer", backend.factory()).acall(q="?")
        return prediction, budget

    prediction, budget = asyncio.run(main())
    assert prediction.answer == "b"
    assert budget.spent()["calls"] == 1
    backend.close()
    [run] = History().runs()
    assert (run.iterations, run.calls, run.tokens) == (2, 1, 360)


@only_if(HAS_FACTORY, "before DSPy 3.3 nothing is made inside the run that could notice it")
def test_callbacks_that_replace_ours_do_not_hide_a_run(backend: Backend) -> None:
    program = rlm("q -> answer", backend.factory(budget=Budget(max_tokens=1_000)))
    with dspy.context(lm=PricedLM("SUBMIT('a')"), callbacks=[BaseCallback()]):
        program(q="?")
    backend.close()
    [run] = History().runs()
    assert (run.module, run.iterations, run.tokens) == ("RLM", 1, 120)


def test_other_modules_that_write_code_are_runs_too(backend: Backend) -> None:
    program = with_interpreter(dspy.ProgramOfThought, "q -> answer", factory=backend.factory())
    code = "```python\nSUBMIT({'answer': 1 + 1})\n```"
    answers = [{"reasoning": "sum", "generated_code": code}, {"reasoning": "so", "answer": "2"}]
    with dspy.context(lm=dspy.utils.DummyLM(answers)):
        program(q="?")
    backend.close()
    [run] = History().runs()
    whole = History().find(run.id)
    assert (run.module, run.outcome) == ("ProgramOfThought", "done")
    assert [step.kind for step in whole.iterations] == ["action", "answer"]
    assert len(whole.executions) == 1


@only_if(HAS_FACTORY, "before DSPy 3.3 no interpreter has heard of a run that fails before its first code")
def test_a_failed_run_says_why(backend: Backend) -> None:
    class Broken(PricedLM):
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            raise ConnectionError("no model")

    with pytest.raises(Exception, match="no model"), dspy.context(lm=Broken()):
        rlm("q -> answer", backend.factory())(q="?")
    backend.close()
    [run] = History().runs()
    assert run.outcome == FAILED
    assert "no model" in str(run.error)


def test_usage_that_dspy_does_not_note_cannot_be_limited() -> None:
    with dspy.context(disable_history=True), pytest.raises(BadSetting, match="disable_history"), Budget(max_tokens=1):
        pass


def test_nothing_is_recorded_where_history_is_off(backend: Backend) -> None:
    program = rlm("q -> answer", backend.factory(settings=SandboxSettings(history=False)))
    with dspy.context(lm=writes("SUBMIT('a')")):
        program(q="?")
    backend.close()
    assert History().runs() == []
