"""Secrets on the host: where values come from, that nothing shows them, and that whatever comes back is masked."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import pickle
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.protocol.messages import ErrorInfo, OpenRequest, Outcome, ToolResult
from broker.protocol.values import Encoder
from broker.testing import InProcessBroker
from broker.worker.display import clip
from host_client import SandboxInterpreter, SandboxSettings, ScriptedBroker, secrets_check
from host_client.dspy_compat import contract
from host_client.errors import BadSetting, ProtocolMismatch
from host_client.journal import SqliteJournal
from host_client.masking import Masker
from host_client.providers.fake import FakeProvider
from host_client.results import ExecutionRecord
from host_client.scripted_broker import Step
from host_client.secret_values import Secrets

SECRET = 'tr0ub4dor&3 "in" the\\attic\'s'
SETTINGS = SandboxSettings(journal=":memory:")


@pytest.fixture(scope="module")
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker() as started:
        yield started


@pytest.fixture
def interpreter(broker: InProcessBroker, tmp_path: Path) -> Iterator[SandboxInterpreter]:
    """One with a secret, whose sessions are real ones."""
    with SandboxInterpreter(
        {"echo": lambda text: text, "fail": _fail, "seen": SEEN.append},
        secrets={"API_KEY": SECRET},
        provider=FakeProvider(broker),
        journal=SqliteJournal(tmp_path / "journal"),
    ) as made:
        SEEN.clear()
        yield made


SEEN: list[str] = []


def _fail(text: str) -> None:
    raise ValueError(f"cannot use {text}")


def run(interpreter: SandboxInterpreter, code: str) -> Any:
    return interpreter.execute(f"import os\nkey = os.environ['API_KEY']\n{code}")


# Where values come from.


def test_names_are_looked_up_in_the_environment_first_and_then_in_the_file(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("A_KEY=from the file\nB_KEY='from the file'\nOTHER=not asked for\n")
    secrets = Secrets.of(["A_KEY", "B_KEY"])
    assert secrets.values({"A_KEY": "from the environment"}, env_file) == {
        "A_KEY": "from the environment",
        "B_KEY": "from the file",
    }


@pytest.mark.parametrize("environ", [{}, {"A_KEY": ""}])
def test_a_missing_secret_is_named_before_anything_starts(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    broker = ScriptedBroker([Step()])
    interpreter = SandboxInterpreter(secrets=["A_KEY"], provider=broker)
    with pytest.raises(BadSetting, match="A_KEY"):
        interpreter.execute("1")
    assert broker.started == 0


def test_they_come_from_settings_and_environment_and_the_keyword_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SandboxSettings.from_environment({"RLM_SANDBOX_SECRETS": "A_KEY, B_KEY"})
    assert list(settings.secrets) == ["A_KEY", "B_KEY"]
    made = SandboxInterpreter(settings=settings, secrets={"C_KEY": SECRET}, provider=ScriptedBroker())
    assert list(made.settings.secrets) == ["C_KEY"]
    factory = SandboxInterpreter.factory(settings=settings, secrets=(), provider=ScriptedBroker())
    assert list(factory().settings.secrets) == []
    assert "A_KEY" in SandboxInterpreter.factory(settings=settings).execution_instructions


@pytest.mark.parametrize(
    "secrets",
    [SECRET, {"A_KEY": 5}, {"A_KEY": "short"}, {"A_KEY": ""}, {SECRET: SECRET}, [SECRET], {"PATH": SECRET}, 5],
)
def test_what_cannot_be_a_secret_is_refused_without_being_shown(secrets: Any) -> None:
    for make in (
        lambda: SandboxSettings(secrets=secrets),
        lambda: SandboxInterpreter(secrets=secrets),
        lambda: SandboxInterpreter.factory(secrets=secrets),
    ):
        with pytest.raises(BadSetting) as refused:
            make()
        assert SECRET not in str(refused.value)


def test_a_name_cannot_be_a_secret_and_none_at_once() -> None:
    with pytest.raises(BadSetting, match="A_KEY"):
        SandboxSettings(environment={"A_KEY": "x"}, secrets={"A_KEY": SECRET})


# Nothing shows them.


def test_nothing_that_holds_a_secret_shows_it() -> None:
    settings = SandboxSettings(secrets={"API_KEY": SECRET})
    factory = SandboxInterpreter.factory(settings=settings)
    shown = [settings, dataclasses.asdict(settings), copy.deepcopy(settings), factory, factory(), Masker({"K": SECRET})]
    assert "tr0ub4dor" not in f"{shown!r}{shown}{factory.execution_instructions}"
    assert "API_KEY" in repr(settings)
    assert not hasattr(settings.secrets, "__dict__")


def test_values_are_not_pickled_but_names_are() -> None:
    with pytest.raises(TypeError, match="API_KEY") as refused:
        pickle.dumps(SandboxInterpreter.factory(secrets={"API_KEY": SECRET}))
    assert "tr0ub4dor" not in str(refused.value)
    settings = SandboxSettings(secrets=["API_KEY"])
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_copies_have_the_same_secrets() -> None:
    made = SandboxInterpreter(secrets={"API_KEY": SECRET}, provider=ScriptedBroker())
    assert copy.deepcopy(made).settings.secrets == made.settings.secrets


# What comes back is masked.


def test_code_has_the_secret_and_so_have_the_tools_that_it_calls(interpreter: SandboxInterpreter) -> None:
    assert run(interpreter, "seen(key)\nlen(key)") == len(SECRET)
    assert SEEN == [SECRET]
    assert run(interpreter, "echo(key) == key") is True


@pytest.mark.parametrize(
    "code",
    [
        "print(key)",
        "key",
        "[{'a': (key, 1)}]",
        "{key: 1}",
        "key.encode()",
        "import json, urllib.parse\nprint(repr(key), json.dumps([key]), urllib.parse.quote(key, ''))",
        "object.__new__(type('K', (), {'__repr__': lambda self: key}))",
        "print('x' + key * 3 + 'y')",
    ],
)
def test_no_result_shows_it(interpreter: SandboxInterpreter, code: str) -> None:
    result = run(interpreter, code)
    assert "[secret API_KEY]" in str(result)
    assert "tr0ub4dor" not in f"{result!r}{interpreter.last_result!r}"


@pytest.mark.parametrize("code", ["raise ValueError(key)", "int(key)", "fail(key)", "print(key); 1/0"])
def test_no_error_shows_it(interpreter: SandboxInterpreter, caplog: pytest.LogCaptureFixture, code: str) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(contract().code_error) as failed:
        run(interpreter, code)
    assert "[secret API_KEY]" in str(failed.value)
    assert "tr0ub4dor" not in f"{failed.value!r}{failed.value.__cause__!r}{interpreter.last_result!r}{caplog.text}"


def test_what_is_submitted_does_not_show_it(interpreter: SandboxInterpreter) -> None:
    interpreter.output_fields = [{"name": "answer", "type": "str"}]
    assert run(interpreter, "SUBMIT(answer=f'it is {key}')").output == {"answer": "it is [secret API_KEY]"}


def test_a_syntax_error_does_not_show_it(interpreter: SandboxInterpreter) -> None:
    with pytest.raises(contract().code_error) as failed:
        run(interpreter, "exec(f'{key} = (')")
    assert "tr0ub4dor" not in str(failed.value)


def test_callbacks_of_dspy_do_not_see_it(broker: InProcessBroker) -> None:
    from dspy.utils.callback import BaseCallback

    if not hasattr(BaseCallback, "on_interpreter_execute_start"):
        return  # this DSPy tells nobody of executions
    seen: list[Any] = []

    class Curious(BaseCallback):
        def on_interpreter_execute_end(self, call_id: str, outputs: Any, exception: Any = None) -> None:
            seen.append((outputs, exception))

    made = SandboxInterpreter(
        secrets={"API_KEY": SECRET}, provider=FakeProvider(broker), settings=SETTINGS, callbacks=[Curious()]
    )
    with made:
        assert run(made, "key") == "[secret API_KEY]"
        with pytest.raises(contract().code_error):
            run(made, "raise ValueError(key)")
    assert len(seen) == 2
    assert "tr0ub4dor" not in repr(seen)


def test_output_that_is_cut_inside_a_secret_shows_no_part_of_it(broker: InProcessBroker) -> None:
    settings = dataclasses.replace(SETTINGS, max_output_bytes=1024)
    with SandboxInterpreter(secrets={"API_KEY": SECRET}, provider=FakeProvider(broker), settings=settings) as made:
        shown = run(made, "print('x' * 1010 + key)")
        assert "tr0ub" not in shown
        assert shown.startswith("x" * 1010 + "[secret API_KEY]\n")


def test_a_text_that_the_worker_cut_in_the_middle_of_a_secret_shows_no_part_of_it() -> None:
    masker = Masker({"API_KEY": "0123456789abcdef"})
    for before in range(81):
        masked = masker.text(clip("x" * before + "0123456789abcdef" + "y" * (80 - before), 60))
        assert "012345" not in masked
        assert "abcdef" not in masked


def test_the_journal_keeps_no_outcome_that_holds_it(interpreter: SandboxInterpreter, tmp_path: Path) -> None:
    run(interpreter, "echo(key)\necho(key.encode())\necho({'large': key * 1000})")
    with pytest.raises(contract().code_error):
        run(interpreter, "fail(key)")
    assert run(interpreter, "echo('harmless')") == "harmless"
    interpreter.shutdown()
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"echo" in files
    assert b"tr0ub4dor" not in files


@pytest.mark.parametrize("value", [SECRET, SECRET.encode(), [{"a": SECRET * 300}], {SECRET: 1}, SECRET.encode() * 300])
def test_a_secret_is_found_in_every_form_of_a_tools_result(value: Any) -> None:
    masker, encoder = Masker({"API_KEY": SECRET}), Encoder()
    result = ToolResult(attempt=1, value=encoder.encode(value, "value"))
    assert masker.is_in(result, encoder.blobs)
    assert not Masker({"API_KEY": "another secret"}).is_in(result, encoder.blobs)


def test_an_error_of_a_tool_that_holds_a_secret_is_found() -> None:
    failed = ToolResult(attempt=1, error=ErrorInfo(type="ValueError", message=f"cannot use {SECRET}"))
    assert Masker({"API_KEY": SECRET}).is_in(failed, ())


def test_the_longer_of_two_secrets_is_masked_as_a_whole() -> None:
    masker = Masker({"A": "abcdef", "B": "xxabcdefxx"})
    assert masker.text("abcdef xxabcdefxx") == "[secret A] [secret B]"


def test_each_way_to_write_a_secret_is_masked() -> None:
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASC\nnaïve=\n-----END KEY-----"
    masker = Masker({"PEM": key})
    for written in (key, repr(key), ascii(key), json.dumps(key), urllib.parse.quote(key, safe=""), key.splitlines()[1]):
        assert "MIIEvQ" not in masker.text(f"<{written}>")


def test_what_holds_no_secret_comes_back_as_the_same_object() -> None:
    masker = Masker({"API_KEY": SECRET})
    value = [{"a": ("b", 1.5, None, b"c")}, {1, 2}]
    assert masker.value(value) is value
    record = ExecutionRecord(outcome=Outcome.OK, value=value, output="text")
    assert Masker({}).record(record) is record


# Attaching.


def test_who_attaches_without_the_secret_is_refused_and_with_it_masks_it(broker: InProcessBroker) -> None:
    provider = FakeProvider(broker)
    first = SandboxInterpreter(secrets={"API_KEY": SECRET}, provider=provider, settings=SETTINGS, session="mine")
    assert run(first, "kept = key\n1") == 1
    with pytest.raises(BadSetting, match="API_KEY"):
        SandboxInterpreter.attach("mine", provider=provider, settings=SETTINGS)
    assert first.execute("kept") == "[secret API_KEY]", "a refused attach changes nothing"
    second = SandboxInterpreter.attach("mine", provider=provider, settings=SETTINGS, secrets={"API_KEY": SECRET})
    assert second.execute("kept") == "[secret API_KEY]"
    second.shutdown()
    first.shutdown()


# Older sandboxes, and the command.


class Forgetful(InProcessBroker):
    """A broker of a version that knows nothing but a session's name."""

    def __enter__(self) -> Forgetful:
        super().__enter__()
        opened = self.daemon.sessions.open
        self.daemon.sessions.open = lambda wanted: opened(OpenRequest(name=wanted.name))  # type: ignore[method-assign]
        return self


@pytest.mark.parametrize(
    ("keywords", "dropped"),
    [
        ({"secrets": {"API_KEY": SECRET}}, "secrets"),
        ({"session": "novel", "keep": True}, "sessions that stay"),
        ({"settings": dataclasses.replace(SETTINGS, session_ttl_s=60)}, "time to live"),
    ],
)
def test_a_sandbox_that_would_drop_a_wish_in_silence_is_refused(keywords: dict[str, Any], dropped: str) -> None:
    with Forgetful() as broker:
        given = {"settings": SETTINGS, "sandbox": "old", **keywords}
        interpreter = SandboxInterpreter(provider=FakeProvider(broker), **given)
        with pytest.raises(ProtocolMismatch, match=dropped):
            interpreter.start()
        assert broker.host.request("GET", "/v1/sessions")[1] == {"sessions": []}


def test_the_command_tells_presence_and_arrival_and_no_value(
    broker: InProcessBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", SECRET)
    monkeypatch.setenv("EMPTY_KEY", "")
    monkeypatch.setenv("SHORT_KEY", "abc")
    monkeypatch.delenv("NO_KEY", raising=False)
    said: list[str] = []
    provider = FakeProvider(broker)
    settings = dataclasses.replace(SETTINGS, secrets=["API_KEY"])
    assert secrets_check.run([], settings, say=said.append, provider=provider) == 0
    assert [line.split() for line in said] == [["API_KEY", "set", "in", "the", "sandbox:", "present"]]
    names = ["API_KEY", "EMPTY_KEY", "SHORT_KEY", "NO_KEY"]
    assert secrets_check.run(names, SETTINGS, say=said.append, provider=provider) == 1
    assert [line.split()[1] for line in said[1:5]] == ["set", "empty", "set", "missing"]
    assert [line.split()[-1] for line in said[1:5]] == ["present", "absent", "absent", "absent"]
    assert not any(value in "\n".join(said) for value in ("tr0ub4dor", "abc"))
    assert secrets_check.run([], SETTINGS, say=said.append) == 1
    assert os.environ["API_KEY"] == SECRET
