"""The demo's run: read DSPy's source, let an RLM answer about it in a sandbox, check the answer."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import inspect
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from host_client.demo import corpus
from host_client.demo.keys import ModelChoice
from host_client.demo.models import language_model
from host_client.demo.run_log import RunLog
from host_client.demo.screen import Ending, Opening, Screen
from host_client.demo.script import SourceReader
from host_client.demo.scripted_lm import Message

QUESTION = "Which modules and which optimizers does DSPy define? One line each."

INSTRUCTIONS = """`source` is the source code of the DSPy package: path to text.
Find its public modules (direct and indirect subclasses of dspy.Module, without dspy.Module itself) and its public
optimizers (direct and indirect subclasses of Teleprompter, without Teleprompter itself). Public means: listed by the
tool public_names(). Give for each its class name and one line (at most 200 characters) on what it does."""

# Ten iterations do; a real model may take detours. One sub-query per class is about 25, twice that is room enough.
MAX_ITERATIONS, MAX_SUB_QUERIES = 20, 100

# So that a person can follow a scripted run: about what a fast real model takes, and said on the screen.
ACTION_THINK_S, SUB_QUERY_THINK_S = 0.9, 0.35

InterpreterFactory = Callable[[], Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run.

    Attributes:
        factory: Makes the interpreter, as ``SandboxInterpreter.factory()`` does.
        sandbox: One line on it, for the screen.
        model: A real model, or None for the scripted one.
        think: Whether the scripted model takes its time.
        out_dir: Where the trajectory goes.
    """

    factory: InterpreterFactory
    sandbox: str
    model: ModelChoice | None
    think: bool
    out_dir: Path


def run(plan: Plan, screen: Screen) -> bool:
    """Run the demo and show it.

    Returns:
        Whether the answer is right.

    Raises:
        SandboxError: No sandbox could be started, or it was lost.
        Exception: What the model's client raises.
    """
    with quiet_libraries():
        with screen.waiting("loading DSPy"):
            import dspy

            source = corpus.read_source()
        screen.opening(_opening(plan, source, dspy.__version__))
        log = RunLog(screen)
        started = time.monotonic()
        with (
            language_model(plan.model, SourceReader(), think_s=_think_s if plan.think else None) as lm,
            screen.waiting("starting the sandbox"),
        ):
            prediction = _ask(lm, source, plan.factory, log)
        total_s = time.monotonic() - started
        verdicts = corpus.check_answer(prediction.modules, prediction.optimizers, corpus.inspect_package())
        answer = {"modules": prediction.modules, "optimizers": prediction.optimizers}
        record = {"dspy": dspy.__version__, "model": lm.model, "seconds": total_s, "answer": answer}
        path = write_trajectory(plan.out_dir, {**record, "iterations": log.to_json()})
    screen.ending(Ending(answer=answer, verdicts=verdicts, log=log, total_s=total_s, trajectory=path))
    return all(verdict.passed for verdict in verdicts)


def _opening(plan: Plan, source: Mapping[str, str], version: str) -> Opening:
    size = sum(map(len, source.values()))
    if plan.model is not None:
        model = f"{plan.model.model}, with the key in {plan.model.found_in}"
    else:
        pauses = f"; it pauses {ACTION_THINK_S} s per reply so that you can follow" if plan.think else ""
        model = f"scripted, so no API key is needed: real dspy.LM, real HTTP on loopback{pauses}"
    return Opening(
        question=QUESTION,
        source=f"DSPy {version}, as installed: {len(source)} files, {size / 1e6:.1f} million characters",
        model=model,
        sandbox=plan.sandbox,
    )


def _think_s(messages: Sequence[Message]) -> float:
    return ACTION_THINK_S if messages[0].role == "system" else SUB_QUERY_THINK_S


def _ask(lm: Any, source: Mapping[str, str], factory: InterpreterFactory, log: RunLog) -> Any:
    import dspy

    from host_client.demo.observe import ActionCallback, WatchedInterpreter

    def watched_factory() -> WatchedInterpreter:
        return WatchedInterpreter(factory(), log)

    # DSPy puts these instructions into the prompt where it finds them (since 3.3.1).
    watched_factory.execution_instructions = getattr(factory, "execution_instructions", "")  # type: ignore[attr-defined]
    signature = dspy.Signature(
        "source: dict[str, str] -> modules: dict[str, str], optimizers: dict[str, str]", INSTRUCTIONS
    )
    with contextlib.ExitStack() as stack:
        # Named, because the threads of llm_query_batched do not see dspy.context in DSPy 3.1 and 3.2.
        keywords = {"tools": [corpus.public_names], "max_llm_calls": MAX_SUB_QUERIES, "sub_lm": lm}
        rlm = make_rlm(signature, watched_factory, stack, **keywords)
        stack.enter_context(dspy.context(lm=lm, callbacks=[ActionCallback(log)]))
        return rlm(source=dict(source))


def make_rlm(signature: Any, factory: InterpreterFactory, stack: contextlib.ExitStack, **keywords: Any) -> Any:
    """Make a ``dspy.RLM`` with whichever words the installed DSPy has for its loop and its interpreter."""
    import dspy

    known = inspect.signature(dspy.RLM.__init__).parameters
    keywords["max_iters" if "max_iters" in known else "max_iterations"] = MAX_ITERATIONS
    if "interpreter_factory" in known:
        return dspy.RLM(signature, interpreter_factory=factory, **keywords)
    interpreter = factory()
    stack.callback(interpreter.shutdown)
    interpreter.start()  # DSPy 3.1 and 3.2 would start it with the first code, when the model has already replied
    return dspy.RLM(signature, interpreter=interpreter, **keywords)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep warnings and logs of LiteLLM and DSPy out of the story, and LiteLLM from fetching its price list."""
    before = os.environ.get("LITELLM_LOCAL_MODEL_COST_MAP")
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if before is None:
            os.environ.pop("LITELLM_LOCAL_MODEL_COST_MAP", None)
        else:
            os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = before


def write_trajectory(out_dir: Path, record: Mapping[str, Any]) -> Path:
    """Write a run as JSON and return the file's path; the newest one is last by name."""
    out_dir.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    path = out_dir / f"demo-{stamp}-{os.getpid()}.json"
    path.write_text(json.dumps(record, indent=2, default=str), encoding="utf-8")
    return path
