"""Claims about factories and about how errors look to the installed DSPy."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
from dspy.primitives.code_interpreter import CodeInterpreter

from host_client import SandboxInterpreter, SandboxSettings, ScriptedBroker
from host_client.dspy_compat import contract, observed
from host_client.errors import BadSetting, BrokerError, EngineUnavailable, SandboxError, SessionLost
from host_client.factory import InterpreterFactory

DSPY = contract()


def test_each_call_gives_a_fresh_interpreter_with_the_keywords() -> None:
    tools = {"one": lambda: 1}
    factory = SandboxInterpreter.factory(tools=tools, execution_timeout_s=7, provider=ScriptedBroker())
    one, two = factory(), factory()
    assert one is not two
    assert one.tools == tools
    assert one.tools is not two.tools
    assert one.execution_timeout_s == 7


def test_a_factory_is_no_interpreter() -> None:
    factory = SandboxInterpreter.factory(provider=ScriptedBroker())
    assert not isinstance(factory, CodeInterpreter)
    assert isinstance(factory(), CodeInterpreter)


def test_a_factory_makes_what_it_was_asked_on() -> None:
    class Mine(SandboxInterpreter):
        pass

    assert type(Mine.factory(provider=ScriptedBroker())()) is Mine


def test_instructions_name_the_packages() -> None:
    factory = SandboxInterpreter.factory(settings=SandboxSettings(packages=("matplotlib",)))
    assert "numpy, pandas, matplotlib" in factory.execution_instructions
    assert factory.execution_instructions == factory().execution_instructions


def test_unknown_and_wrong_keywords_are_refused_at_once() -> None:
    with pytest.raises(BadSetting, match="execution_timeout'"):
        SandboxInterpreter.factory(execution_timeout=3)
    with pytest.raises(BadSetting, match="settings"):
        SandboxInterpreter.factory(settings={"memory": "1g"})


def test_the_environment_is_read_when_the_factory_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLM_SANDBOX_MAX_CONCURRENT_TOOLS", "5")
    factory = SandboxInterpreter.factory(provider=ScriptedBroker())
    monkeypatch.setenv("RLM_SANDBOX_MAX_CONCURRENT_TOOLS", "6")
    assert factory().settings.max_concurrent_tools == 5


def test_threads_share_one_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    both = threading.Barrier(4, timeout=10)

    def default(settings: SandboxSettings) -> object:
        made.append(object())
        return made[-1]

    monkeypatch.setattr("host_client.factory.default_provider", default)
    factory = SandboxInterpreter.factory()

    def call() -> Any:
        both.wait()
        return factory()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: call(), range(4)))
    assert len(made) == 1


def test_copies_and_pickles_of_a_factory_make_the_same() -> None:
    factory = SandboxInterpreter.factory(execution_timeout_s=7)
    assert copy.deepcopy(factory) is copy.copy(factory) is factory
    again = pickle.loads(pickle.dumps(factory))
    assert isinstance(again, InterpreterFactory)
    assert repr(again) == repr(factory)
    assert "execution_timeout_s=7" in repr(factory)


@pytest.mark.parametrize(
    "error",
    [
        EngineUnavailable("no engine", help="start it"),
        BadSetting("wrong"),
        SessionLost("gone", reason="oom"),
        BrokerError("refused", status=413),
    ],
)
def test_terminal_errors_keep_their_class_code_and_fields(error: SandboxError) -> None:
    raised = DSPY.terminal(error)
    assert isinstance(raised, type(error))
    assert type(raised).__name__ == type(error).__name__
    assert (str(raised), raised.code, raised.help) == (str(error), error.code, error.help)
    assert getattr(raised, "reason", None) == getattr(error, "reason", None)
    assert getattr(raised, "status", None) == getattr(error, "status", None)
    assert not isinstance(raised, DSPY.code_error)
    assert DSPY.terminal_base is None or isinstance(raised, DSPY.terminal_base)
    assert DSPY.terminal(raised) is raised
    assert type(DSPY.terminal(error)) is type(raised)


def test_observed_methods_keep_their_name_and_documentation() -> None:
    class Thing:
        callbacks: ClassVar[list[Any]] = []

        @observed
        def execute(self, code: str) -> str:
            """Run."""
            return code

    assert Thing.execute.__doc__ == "Run."
    assert Thing().execute("x") == "x"
    assert Thing.execute(Thing(), "y") == "y"
