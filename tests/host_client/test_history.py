"""Claims about the history's file, writer and views; what DSPy's modules leave in it is in tests/conformance."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from host_client import (
    BadSetting,
    BudgetExceeded,
    HistoryUnusable,
    SandboxInterpreter,
    SandboxSettings,
    ScriptedBroker,
    UnknownRun,
)
from host_client.cli import main
from host_client.history import (
    CallRow,
    ExecutionRow,
    History,
    IterationRow,
    RunRow,
    WholeRun,
    default_path,
    store,
    view,
)
from host_client.history.records import OVER_BUDGET, RUNNING, Row
from host_client.history.runs import Run
from host_client.history.texts import MAX_CHARS, MAX_JSON_CHARS, as_json, clipped
from host_client.history.writer import HistoryWriter, writer_for
from host_client.scripted_broker import Step

ROOT = Path(__file__).parents[2]
SECRET = "hunter2-hunter2"


def plain(text: str) -> str:
    return text


def a_run(run_id: str = "aaaabbbb", **changed: Any) -> RunRow:
    values = {
        "parent_id": None,
        "module": "RLM",
        "signature": "book, question -> answer",
        "inputs": {"book": "str, 9 characters"},
        "started_at": 2_000_000_000.0,  # never too old to be kept
        "duration_s": 41.2,
        "outcome": "done",
        "outputs": {"answer": "whales"},
        "iterations": 2,
        "executions": 2,
        "calls": 17,
        "tokens": 120_345,
        "cost": 0.043,
    }
    return RunRow(id=run_id, **{**values, **changed})


def a_step(number: int, **changed: Any) -> IterationRow:
    values = {
        "kind": "action",
        "started_at": 0.0,
        "duration_s": 1.0,
        "reasoning": "I look at the book first. " * 30,
        "code": f"print({number})",
        "error": None,
    }
    return IterationRow(run_id="aaaabbbb", number=number, **{**values, **changed})


def an_execution(number: int, **changed: Any) -> ExecutionRow:
    values = {
        "iteration": number,
        "session_id": "s",
        "started_at": 0.0,
        "duration_s": 0.005,
        "sandbox_s": 0.004,
        "outcome": "ok",
        "code": f"print({number})",
        "output": f"{number}\n" * 40 + "\x1b[31mred" + "w" * 300,
        "error": None,
    }
    return ExecutionRow(run_id="aaaabbbb", number=number, **{**values, **changed})


def a_call(number: int, **changed: Any) -> CallRow:
    values = {
        "iteration": 1,
        "kind": "tool",
        "name": "llm_query",
        "via": "",
        "started_at": 0.0,
        "duration_s": 0.9,
        "prompt": {"args": ["Who is Ishmael?"], "kwargs": {}},
        "answer": "A sailor.",
        "answer_chars": "A sailor.",
        "tokens_in": 0,
        "tokens_out": 0,
        "cost": None,
        "cached": False,
        "error": None,
    }
    return CallRow(run_id="aaaabbbb", number=number, **{**values, **changed})


def a_model_call(number: int, **changed: Any) -> CallRow:
    messages = [{"role": "system", "content": "You write code."}, {"role": "user", "content": "Who is\nIshmael?"}]
    values = {
        "kind": "model",
        "name": "gpt",
        "prompt": messages,
        "answer": ["a sailor"],
        "tokens_in": 7,
        "tokens_out": 3,
    }
    return a_call(number, **{**values, **changed})


@pytest.fixture
def history(state_folder: Path) -> History:
    """One run with everything in it, and the nested run that its tool made."""
    path = str(default_path())
    rows: list[Row] = [
        a_run(),
        a_run("aaaacccc", parent_id="aaaabbbb", outcome=OVER_BUDGET, started_at=2_000_000_001.0),
        a_step(1),
        a_step(2, kind="answer", code=None),
        an_execution(1),
        an_execution(2, iteration=2, code="other()", error="NameError: nope", outcome="raised"),
        a_model_call(1),
        a_call(2),
        a_model_call(3, via="llm_query"),
    ]
    db = store.connect(path)
    store.write(db, [(row, plain) for row in rows])
    db.close()
    return History()


# The file.


def test_what_was_written_is_read_back(history: History) -> None:
    whole = history.find("aaaabbbb")
    assert (whole.run.signature, json.loads(whole.run.inputs)) == (
        "book, question -> answer",
        {"book": "str, 9 characters"},
    )
    assert [step.number for step in whole.iterations] == [1, 2]
    assert whole.executions[1].error == "NameError: nope"
    assert whole.calls[1].answer_chars == len("A sailor.")
    assert [run.id for run in whole.nested] == ["aaaacccc"]
    assert [call.number for call in history.prompts("aaaabbbb")] == [1, 3]


def test_runs_come_oldest_first_and_the_newest_are_taken(history: History) -> None:
    assert [run.id for run in history.runs()] == ["aaaabbbb", "aaaacccc"]
    assert [run.id for run in history.runs(limit=1)] == ["aaaacccc"]


def test_the_beginning_of_an_id_is_enough_where_it_is_the_only_one(history: History) -> None:
    assert history.find("aaaab").run.id == "aaaabbbb"
    with pytest.raises(UnknownRun, match="several runs begin with 'aaaa': aaaabbbb, aaaacccc"):
        history.find("aaaa")


@pytest.mark.parametrize("run_id", ["zzzz", "", "%", "aaaa_", "x" * 500])
def test_an_unknown_id_is_named_with_what_helps(history: History, run_id: str) -> None:
    with pytest.raises(UnknownRun, match="rlm-sandbox history lists them") as caught:
        history.find(run_id)
    assert run_id[:70] in str(caught.value)


def test_the_file_is_nobody_else_s(history: History) -> None:
    assert stat.S_IMODE(os.stat(history.path).st_mode) == 0o600


def test_a_damaged_file_and_one_of_a_newer_version_are_typed_errors(history: History, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_text("this is no database" * 100)
    with pytest.raises(HistoryUnusable, match=r"mv .*damaged"):
        History(damaged).runs()
    with sqlite3.connect(history.path) as db:
        db.execute(f"PRAGMA user_version={store.SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(HistoryUnusable, match="update rlm-sandbox"):
        history.runs()


def test_old_runs_and_then_the_oldest_of_too_many_are_forgotten_with_all_they_have(tmp_path: Path) -> None:
    db = store.connect(str(tmp_path / "h"))
    now = 2_000_000_000.0
    rows: list[tuple[Row, Callable[[str], str]]] = []
    for number in range(30):
        began = now - 40 * 86_400 if number == 0 else now - 1_000 + number
        rows.append((a_run(f"run{number:03}", started_at=began), plain))
        execution = an_execution(1, output="o" * 90_000)
        rows.append((ExecutionRow(**{**_fields(execution), "run_id": f"run{number:03}"}), plain))
    store.write(db, rows)
    store.prune(db, clock=lambda: now)
    assert _ids(db) == [f"run{number:03}" for number in range(1, 30)]
    store.prune(db, clock=lambda: now, max_bytes=1_500_000)
    left = _ids(db)
    assert left == [f"run{number:03}" for number in range(30 - len(left), 30)]
    assert 0 < len(left) < 20
    assert db.execute("SELECT count(*) FROM executions").fetchone()[0] == len(left)
    db.close()


def _fields(row: ExecutionRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__dataclass_fields__}


def _ids(db: sqlite3.Connection) -> list[str]:
    return [row[0] for row in db.execute("SELECT id FROM runs ORDER BY started_at")]


def test_texts_are_bounded_and_what_json_lacks_is_named() -> None:
    assert len(clipped("x" * 10 * MAX_CHARS)) < MAX_CHARS + 100
    assert json.loads(as_json({"f": len, "b": b"123", "n": [1, 2.5, None], "big": 1 << 80}, plain)) == {
        "f": "builtin_function_or_method",
        "b": "bytes, 3 bytes",
        "n": [1, 2.5, None],
        "big": "<int of 81 bits>",
    }
    assert len(as_json(["x" * MAX_CHARS] * 900, plain)) < 1_100_000


# The writer.


def test_rows_are_written_in_the_background_and_the_last_user_lets_the_thread_end(tmp_path: Path) -> None:
    writer = HistoryWriter(str(tmp_path / "h"))
    others = set(threading.enumerate())

    def writing() -> list[str]:
        return [each.name for each in threading.enumerate() if each not in others]

    writer.acquire()
    for number in range(200):
        run = a_run(f"run{number}")
        writer.put(lambda run=run: run, plain)  # type: ignore[misc]
    assert writing() == ["rlm-sandbox history"]
    writer.release()
    writer.join()
    assert writing() == []
    assert len(History(tmp_path / "h").runs(limit=1_000)) == 200
    late = a_run("late")
    writer.put(lambda: late, plain)  # such as the end of a run, after its interpreter's
    writer.join()
    assert History(tmp_path / "h").find("late").run == _stored(late)


def _stored(run: RunRow) -> RunRow:
    values = {name: getattr(run, name) for name in run.__dataclass_fields__}
    return RunRow(**{**values, "inputs": json.dumps(run.inputs), "outputs": json.dumps(run.outputs)})


def test_what_waits_when_the_process_ends_is_written_also_by_what_runs_at_its_end(tmp_path: Path) -> None:
    program = """if True:
        import atexit, sys
        from tests.host_client.test_history import a_run, plain
        atexit.register(lambda: writer.put(lambda: a_run("last"), plain))
        from host_client.history.writer import writer_for
        writer = writer_for(sys.argv[1])
        writer.acquire()
        atexit.register(lambda: writer.put(lambda: a_run("before"), plain))
        writer.put(lambda: a_run("first"), plain)
    """
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "h")], check=True, timeout=60, cwd=ROOT)
    assert sorted(run.id for run in History(tmp_path / "h").runs()) == ["before", "first", "last"]


def test_a_forked_child_writes_its_own_rows_and_not_its_parent_s(tmp_path: Path) -> None:
    writer = writer_for(str(tmp_path / "h"))
    with writer._writing:  # as if the parent's thread were writing at that moment
        writer.put(lambda: a_run("parent"), plain)
        child = os.fork()
        if child == 0:
            writer.put(lambda: a_run("child"), plain)
            writer.flush()
            os._exit(0 if [run.id for run in History(writer.path).runs()] == ["child"] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    writer.flush()
    writer.join()
    assert sorted(run.id for run in History(writer.path).runs()) == ["child", "parent"]


def test_a_history_that_cannot_be_written_is_said_once_and_fails_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    settings = SandboxSettings(journal=":memory:", history=str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.WARNING, "host_client.history"):
        for _ in range(3):
            steps = [Step(value=1), Step(value=2)]
            with SandboxInterpreter(provider=ScriptedBroker(steps), settings=settings) as interpreter:
                assert [interpreter.execute("1"), interpreter.execute("2")] == [1, 2]
    assert len([record for record in caplog.records if "cannot be written" in record.message]) == 1


def test_a_row_that_cannot_be_made_is_said_and_takes_no_other_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = HistoryWriter(str(tmp_path / "h"))
    broken: dict[str, Row] = {}
    with caplog.at_level(logging.WARNING):
        writer.put(lambda: broken["row"], plain)
        writer.put(a_run, plain)
        writer.flush()
        writer.join()
    assert "cannot be written" in caplog.text
    assert [run.id for run in History(tmp_path / "h").runs()] == ["aaaabbbb"]


# What an interpreter leaves.


@pytest.fixture
def execute() -> Iterator[Callable[..., SandboxInterpreter]]:
    made = []

    def make(*steps: Any, **keywords: Any) -> SandboxInterpreter:
        keywords.setdefault("settings", SandboxSettings(journal=":memory:"))
        made.append(SandboxInterpreter(provider=ScriptedBroker(steps), **keywords))
        return made[-1]

    yield make
    for interpreter in made:
        interpreter.shutdown()


def test_somebody_keeps_the_writer_before_its_first_row(
    execute: Callable[..., SandboxInterpreter], monkeypatch: pytest.MonkeyPatch
) -> None:
    users = []
    put = HistoryWriter.put

    def noted(writer: HistoryWriter, make: Any, mask: Any) -> None:
        users.append(writer._users)
        put(writer, make, mask)

    monkeypatch.setattr(HistoryWriter, "put", noted)
    execute(Step(value=1)).execute("1")
    assert users, "a row was put"
    assert min(users) > 0, "else its thread would open the file while the first execution runs"


def test_what_is_executed_without_a_module_is_one_run(execute: Callable[..., SandboxInterpreter]) -> None:
    ask = lambda execution: Step(output=f"{execution.call('look_up', 'whale', times=2)}\n")  # noqa: E731
    interpreter = execute(ask, Step(error=ValueError("no")), tools={"look_up": lambda word, times: word * times})
    interpreter.execute("print(look_up('whale', times=2))")
    with pytest.raises(Exception, match="no"):
        interpreter.execute("raise ValueError('no')")
    [run] = History().runs()
    assert (run.module, run.outcome) == ("execute", RUNNING)
    interpreter.shutdown()
    whole = History().find(run.id)
    assert (whole.run.outcome, whole.run.executions) == ("done", 2)
    assert [(ran.outcome, ran.output) for ran in whole.executions] == [("ok", "whalewhale"), ("raised", "")]
    [call] = whole.calls
    assert json.loads(call.prompt) == {"args": ["whale"], "kwargs": {"times": 2}}
    assert (call.answer, call.answer_chars) == (None, 10)


def test_secrets_are_masked_wherever_they_come_from(execute: Callable[..., SandboxInterpreter]) -> None:
    def llm_query(prompt: str) -> str:
        return f"you said {prompt}"

    ask = lambda execution: Step(output=execution.call("llm_query", f"my key is {SECRET}"))  # noqa: E731
    interpreter = execute(ask, tools={"llm_query": llm_query}, secrets={"KEY": SECRET})
    interpreter.execute(f"print(llm_query('my key is {SECRET}'))")
    interpreter.shutdown()
    [run] = History().runs()
    assert "[secret KEY]" in History().find(run.id).calls[0].prompt
    everything = b"".join(path.read_bytes() for path in default_path().parent.glob("history*"))
    assert SECRET.encode() not in everything


def test_an_inner_run_s_prompts_hide_the_secrets_of_the_run_around_it() -> None:
    class Hides:
        def __bool__(self) -> bool:
            return True

        def text(self, text: str) -> str:
            return text.replace(SECRET, "[secret KEY]")

    outer = Run("RLM")
    outer.hide(Hides())  # type: ignore[arg-type]
    inner = Run("RLM")
    inner.parent = outer
    assert inner.mask(SECRET) == "[secret KEY]"


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "done"),
        (ValueError("no"), "failed"),
        (BudgetExceeded("used up"), "over budget"),
        (KeyboardInterrupt(), "interrupted"),
        (asyncio.CancelledError(), "interrupted"),
    ],
)
def test_a_run_ends_as_what_ended_it(tmp_path: Path, error: BaseException | None, outcome: str) -> None:
    run = Run("CodeAct")
    run.record_to(writer_for(str(tmp_path / "h")))
    run.finish(outputs={} if error is None else None, error=error)
    assert History(tmp_path / "h").find(run.id).run.outcome == outcome
    writer_for(str(tmp_path / "h")).join()


@pytest.mark.parametrize("off", ["0", "off", "false"])
def test_one_setting_turns_it_off(
    execute: Callable[..., SandboxInterpreter], monkeypatch: pytest.MonkeyPatch, off: str
) -> None:
    monkeypatch.setenv("RLM_SANDBOX_HISTORY", off)
    execute(Step(value=1), settings=SandboxSettings.from_environment(journal=":memory:")).execute("1")
    assert not default_path().exists()
    assert History().runs() == []


def test_another_file_by_setting(
    execute: Callable[..., SandboxInterpreter], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RLM_SANDBOX_HISTORY", str(tmp_path / "mine"))
    execute(Step(value=1), settings=SandboxSettings.from_environment(journal=":memory:")).execute("1")
    assert len(History(tmp_path / "mine").runs()) == 1
    assert not default_path().exists()


@pytest.mark.parametrize("wrong", ["", ":memory:", 3])
def test_a_setting_that_is_neither_yes_no_nor_a_path_is_refused(wrong: Any) -> None:
    with pytest.raises(BadSetting, match="history"):
        SandboxSettings(history=wrong)


def test_one_writer_for_a_file(tmp_path: Path) -> None:
    assert writer_for(str(tmp_path / "a")) is writer_for(str(tmp_path / "a"))


# The views.


@pytest.mark.parametrize("width", [80, 120])
def test_tables_and_runs_fit_the_screen_and_cannot_steer_it(history: History, width: int) -> None:
    runs = [*history.runs(), a_run("x", outcome=RUNNING, duration_s=None, process=0, signature="a" * 300)]
    whole = history.find("aaaabbbb")
    prompts = [line for call in history.prompts("aaaabbbb") for line in view.prompt_lines(call, width, full=False)]
    lines = [*view.table(runs, width), *view.run_lines(whole, width, full=False), *prompts]
    assert max(map(len, lines)) <= width
    assert "\x1b" not in "\n".join(lines)


def test_a_run_is_shown_step_by_step(history: History) -> None:
    text = "\n".join(view.run_lines(history.find("aaaabbbb"), 100, full=False))
    assert "run aaaabbbb, RLM book, question -> answer" in text
    assert "2 iterations, 2 executions, 17 sub-calls, 120,345 tokens, $0.0430" in text
    assert "output answer: whales" in text
    assert "nested run aaaacccc" in text
    assert "── 1, model 900 ms, 7 + 3 tokens" in text
    assert "    print(1)\noutput (ok, 5 ms)\n    1\n" in text
    assert "more lines" in text
    assert "  llm_query, 900 ms, answer 9 characters\n      Who is Ishmael?" in text
    assert "gpt for llm_query" not in text
    assert "code that ran\n    other()\noutput (raised, 5 ms)\n    NameError: nope" in text


def test_full_leaves_nothing_out(history: History) -> None:
    text = "\n".join(view.run_lines(history.find("aaaabbbb"), 80, full=True))
    assert "w" * 300 in text
    assert "gpt for llm_query" in text
    assert "more lines" not in text


def test_a_run_whose_process_is_gone_is_told_as_cut_off(history: History) -> None:
    assert "cut off" in view.table([a_run(outcome=RUNNING, process=0)], 100)[1]
    assert "running" in view.table([a_run(outcome=RUNNING, process=os.getpid())], 100)[1]


def test_prompts_show_messages_and_answers(history: History) -> None:
    text = "\n".join(
        line for call in history.prompts("aaaa" + "bbbb") for line in view.prompt_lines(call, 100, full=False)
    )
    assert "system:\n    You write code.\nuser:\n    Who is\n    Ishmael?\nanswer:\n    a sailor\n" in text
    assert "3: gpt for llm_query" in text


# The command.


def test_the_command_lists_shows_and_exports(
    history: History, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["history"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == ["ID", "aaaabbbb", "aaaacccc"]
    assert "└ RLM" in listed[2]
    assert main(["history", "-n", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == "aaaacccc"
    assert main(["history", "show", "aaaab"]) == 0
    assert "run aaaabbbb" in capsys.readouterr().out
    assert main(["history", "prompts", "aaaab", "--full"]) == 0
    assert "a sailor" in capsys.readouterr().out
    assert main(["history", "export", "aaaab", "--out", str(tmp_path / "run.json")]) == 0
    exported = json.loads((tmp_path / "run.json").read_text())
    assert exported["outputs"] == {"answer": "whales"}
    assert exported["call_list"][0]["prompt"][1]["content"] == "Who is\nIshmael?"
    assert [step["number"] for step in exported["iteration_list"]] == [1, 2]
    assert stat.S_IMODE((tmp_path / "run.json").stat().st_mode) == 0o600
    capsys.readouterr()
    assert main(["history", "export", "aaaab"]) == 0
    assert json.loads(capsys.readouterr().out) == exported


def test_the_command_says_what_is_wrong(history: History, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["history", "show", "zzzz"]) == 1
    assert "there is no run 'zzzz'" in capsys.readouterr().err
    assert main(["history", "export", "aaaab", "--out", str(tmp_path / "no" / "where")]) == 1
    assert "No such file or directory" in capsys.readouterr().err


def test_the_command_where_nothing_was_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["history"]) == 0
    assert "no run is recorded in" in capsys.readouterr().out
    assert main(["history", "show", "aaaa"]) == 1


def test_whole_runs_of_a_killed_process_have_no_holes() -> None:
    whole = WholeRun(
        run=a_run(), iterations=(), executions=(an_execution(1),), calls=(a_call(1, answer_chars=9),), nested=()
    )
    assert any("llm_query" in line for line in view.run_lines(whole, 100, full=False))


def test_one_large_text_a_thousand_times_is_not_kept_a_thousand_times() -> None:
    text = "x" * 1_000_000
    value = [text] * 1_000 + [{"k": [text] * 1_000}] * 100
    tracemalloc.start()
    kept = as_json(value, lambda unmasked: unmasked)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(kept) < 2 * MAX_JSON_CHARS
    assert peak < 16 << 20
    assert "str, 1,000,000 characters" in kept
