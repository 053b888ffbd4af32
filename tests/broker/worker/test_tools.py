"""The wrappers: real signatures, errors before anything is sent, and answers as values or exceptions."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from broker.protocol import limits
from broker.protocol.messages import ToolParameter
from tests.broker.worker.harness import GuestPlane, Result, WorkerProcess, tool

SEARCH = tool(
    "search",
    ToolParameter(name="query", kind="positional_or_keyword", annotation="str"),
    ToolParameter(name="limit", kind="keyword_only", default="10", annotation="int"),
    doc="Search the web.\n\nReturns titles.",
    returns="list[str]",
)


def failure(result: Result) -> tuple[str, str]:
    assert result.outcome == "raised", result
    assert result.error is not None
    return result.error["type"], result.message


def failing(**error: Any) -> Any:
    state = error.pop("state", "failed")
    return lambda request: {"call_id": "c", "state": state, "value": None, "error": error or None}


def test_wrapper_is_a_plain_function_with_the_tools_name_signature_and_docstring(worker: WorkerProcess) -> None:
    result = worker.execute(
        "import inspect\nhelp(search)\ninspect.isfunction(search), str(inspect.signature(search))", tools=[SEARCH]
    )
    assert result.value == [True, "(query: str, *, limit: int = 10) -> list[str]"]
    assert "search(query: str, *, limit: int = 10) -> list[str]\n    Search the web.\n" in result.output
    names = worker.execute("search.__name__, search.__qualname__, search.__doc__, repr(search)[:16]").value
    assert names == ["search", "search", "Search the web.\n\nReturns titles.", "<function search"]


def test_arguments_go_as_they_were_given_and_defaults_are_left_to_the_host(
    worker: WorkerProcess, plane: GuestPlane
) -> None:
    plane.tools["search"] = lambda *args, **kwargs: [list(args), kwargs]
    assert worker.execute("search('cats')", tools=[SEARCH]).value == [["cats"], {}]
    assert worker.execute("search(query='cats', limit=(1, 2))").value == [[], {"query": "cats", "limit": [1, 2]}]
    assert plane.requests[0]["execution_id"] == "x1"
    assert plane.requests[0]["wait_s"] == limits.MAX_WAIT_S
    assert plane.requests[0]["key"] != plane.requests[1]["key"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("search()", "search() missing 1 required positional argument: 'query'"),
        ("search('a', 'b')", "search() takes 1 positional argument but 2 were given"),
        ("search('a', x=1)", "search() got an unexpected keyword argument 'x'"),
        ("search('a', query='b')", "search() got multiple values for argument 'query'"),
    ],
)
def test_wrong_arguments_are_refused_in_pythons_words_before_anything_is_sent(
    worker: WorkerProcess, plane: GuestPlane, call: str, says: str
) -> None:
    kind, message = failure(worker.execute(call, tools=[SEARCH]))
    assert (kind, message) == ("TypeError", says)
    assert plane.requests == []


@pytest.mark.parametrize(
    ("call", "path"),
    [
        ("search([1, 2, 3, object()])", "search() argument 'query'[3]: "),
        ("search('x', limit={'a': object()})", "search() argument 'limit'['a']: "),
        ("rest(1, 2, object())", "rest() argument 3: "),
        ("anything(key=object())", "anything() argument 'key': "),
    ],
)
def test_argument_that_cannot_be_sent_is_named_by_its_path(
    worker: WorkerProcess, plane: GuestPlane, call: str, path: str
) -> None:
    rest = tool("rest", "first", ToolParameter(name="others", kind="var_positional"))
    anything = {"name": "anything", "parameters": None, "doc": "", "returns": None}
    kind, message = failure(worker.execute(call, tools=[SEARCH, rest, anything]))
    assert kind == "TypeError"
    assert message.startswith(path + "a value of type builtins.object")
    assert plane.requests == []


def test_arguments_too_large_to_send_are_a_type_error(worker: WorkerProcess, plane: GuestPlane) -> None:
    kind, message = failure(worker.execute(f"search('x' * {limits.MAX_TOOL_CALL_BYTES})", tools=[SEARCH]))
    assert kind == "TypeError"
    assert "can be sent" in message
    assert plane.requests == []


def test_parameters_may_have_any_name(worker: WorkerProcess, plane: GuestPlane) -> None:
    names = [
        "self",
        "args",
        "call",
        "name",
        "names",
        "check",
        "call_id",
        "signature",
        "inputs",
        "tool",
        "__debug__",
    ]
    plane.tools["odd"] = lambda *args, **kwargs: kwargs
    odd = tool("odd", *names, ToolParameter(name="kwargs", kind="var_keyword"))
    given = {name: i for i, name in enumerate(names)}
    assert worker.execute("odd(**given, kwargs=1, function=2)", {"given": given}, tools=[odd]).value == {
        **given,
        "kwargs": 1,
        "function": 2,
    }
    kind, message = failure(worker.execute("odd(1)"))
    assert kind == "TypeError"
    assert message.startswith("odd() ")


def test_parameter_whose_name_python_would_normalise_keeps_it(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.tools["odd"] = lambda **kwargs: kwargs
    name = "\N{LATIN SMALL LIGATURE FI}x"
    assert worker.execute("odd(**given)", {"given": {name: 1}}, tools=[tool("odd", name)]).value == {name: 1}


def test_dunder_named_tool_works(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.tools["__dspy_call__"] = lambda **kwargs: kwargs
    tools = [{"name": "__dspy_call__", "parameters": None, "doc": "", "returns": None}]
    assert worker.execute("globals()['__dspy_call__'](signature='q -> a', inputs={})", tools=tools).value == {
        "signature": "q -> a",
        "inputs": {},
    }


def test_unchanged_tools_keep_their_functions_and_removed_ones_go(worker: WorkerProcess) -> None:
    worker.execute("kept, mine = search, 5", tools=[SEARCH, tool("other")])
    assert worker.execute("kept is search").value is True
    assert worker.execute("kept is search, 'other' in globals()", tools=[SEARCH]).value == [True, False]
    changed = {**SEARCH, "doc": "New."}
    assert worker.execute("kept is search, search.__doc__", tools=[changed]).value == [False, "New."]


def test_rebound_wrapper_is_there_again_in_the_next_execution(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.tools["search"] = lambda query: "real"
    worker.execute("search = lambda query: 'fake'", tools=[SEARCH])
    assert worker.execute("search('x')").value == "real"


def test_values_of_all_kinds_come_back(worker: WorkerProcess, plane: GuestPlane) -> None:
    import datetime

    plane.tools["odd"] = lambda: [b"\x00", (1, 2), {3}, float("inf"), 10**30, datetime.date(2024, 1, 2), None]
    result = worker.execute("repr(odd())", tools=[tool("odd")])
    assert result.value == f"[b'\\x00', (1, 2), {{3}}, inf, {10**30}, datetime.date(2024, 1, 2), None]"


def test_large_strings_travel_as_blobs_both_ways(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.tools["upper"] = lambda text: text.upper()
    assert worker.execute("upper('é' * 1_000_000) == 'É' * 1_000_000", tools=[tool("upper", "text")]).value is True
    assert "$blob" in str(plane.requests[0]["args"])[:20]


@pytest.mark.skipif(importlib.util.find_spec("numpy") is None, reason="numpy is not installed here")
def test_arrays_from_tools_are_arrays(worker: WorkerProcess, plane: GuestPlane) -> None:
    import numpy

    plane.tools["grid"] = lambda: numpy.arange(6.0).reshape(2, 3)
    assert worker.execute("g = grid(); type(g).__name__, g.shape, g.sum().item()", tools=[tool("grid")]).value == [
        "ndarray",
        [2, 3],
        15.0,
    ]


@pytest.mark.parametrize(
    ("kind", "raised", "base"),
    [
        ("ValueError", "ValueError", "ValueError"),
        ("FileNotFoundError", "FileNotFoundError", "OSError"),
        ("KeyError", "KeyError", "LookupError"),
        ("TimeoutError", "TimeoutError", "OSError"),
        ("UnicodeDecodeError", "UnicodeError", "ValueError"),
        ("Exception", "Exception", "Exception"),
        ("SyntaxError", "SyntaxError", "SyntaxError"),
        ("StopIteration", "StopIteration", "Exception"),
    ],
)
def test_builtin_exception_keeps_its_type_and_its_text(
    worker: WorkerProcess, plane: GuestPlane, kind: str, raised: str, base: str
) -> None:
    text = "it's [dspy bridge lm-error #3]\nwith 'quotes' and \"more\""
    plane.answers["fail"] = failing(type=kind, message=text, traceback="", lineno=None)
    code = f"try:\n    fail()\nexcept {base} as e:\n    error = e\n(type(error).__name__, str(error))"
    assert worker.execute(code, tools=[tool("fail")]).value == [raised, text]
    result = worker.execute("raise error")
    assert (result.outcome, failure(result)) == ("raised", (raised, text))


@pytest.mark.parametrize(
    "kind", ["RateLimitError", "SystemExit", "KeyboardInterrupt", "GeneratorExit", "print", "int", "__import__", ""]
)
def test_other_exceptions_are_tool_errors_that_name_the_type(
    worker: WorkerProcess, plane: GuestPlane, kind: str
) -> None:
    plane.answers["fail"] = failing(type=kind, message="too fast", traceback="", lineno=None)
    code = "try:\n    fail()\nexcept RuntimeError as e:\n    error = e\n(type(error).__name__, str(error), error.type)"
    assert worker.execute(code, tools=[tool("fail")]).value == ["ToolError", f"{kind}: too fast", kind]


def test_exceptions_of_tools_can_be_pickled(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.answers["fail"] = lambda r: failing(type=r["args"][0], message="m 'q'", traceback="", lineno=None)(r)
    code = """
import pickle
texts = []
for kind in ("KeyError", "RateLimitError"):
    try:
        fail(kind)
    except Exception as e:
        copy = pickle.loads(pickle.dumps(e))
        texts.append([type(copy).__name__, str(copy)])
texts
"""
    assert worker.execute(code, tools=[tool("fail", "kind")]).value == [
        ["KeyError", "m 'q'"],
        ["ToolError", "RateLimitError: m 'q'"],
    ]


def test_unknown_outcome_has_an_exception_of_its_own(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.answers["fail"] = failing(
        state="unknown", type="ToolOutcomeUnknown", message="the host went away", traceback="", lineno=None
    )
    result = worker.execute("fail()", tools=[tool("fail")])
    assert failure(result) == ("ToolOutcomeUnknown", "the host went away")
    assert (
        worker.execute("try:\n    fail()\nexcept RuntimeError as e:\n    x = type(e).__mro__[1].__name__\nx").value
        == "ToolError"
    )


@pytest.mark.parametrize("state", ["cancelled", "expired", "failed", "unknown"])
def test_call_that_ended_without_words_is_an_error_all_the_same(
    worker: WorkerProcess, plane: GuestPlane, state: str
) -> None:
    plane.answers["fail"] = failing(state=state)
    kind, message = failure(worker.execute("fail()", tools=[tool("fail")]))
    assert kind in ("ToolError", "ToolOutcomeUnknown")
    assert "fail()" in message


def test_traceback_of_a_failed_tool_shows_the_call_and_no_worker(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.answers["fail"] = failing(type="ValueError", message="no", traceback="", lineno=None)
    error = worker.execute("x = 1\nfail()", tools=[tool("fail")]).error
    assert error is not None
    assert error["lineno"] == 2
    assert "broker" not in error["traceback"]


def test_refusal_of_the_broker_is_an_error_with_its_words(worker: WorkerProcess, plane: GuestPlane) -> None:
    refusal = {"error": {"code": "execution_ended", "message": "this execution has ended"}, "http_status": 409}
    plane.answers["fail"] = lambda request: dict(refusal)
    assert failure(worker.execute("fail()", tools=[tool("fail")])) == ("RuntimeError", "this execution has ended")


def test_pending_call_is_asked_for_again_until_it_ends(worker: WorkerProcess, plane: GuestPlane) -> None:
    states = ["leased", "started", "done"]

    def next_state(request: dict[str, Any]) -> dict[str, Any]:
        assert request["path"] == "/v1/tool-calls/c-7?wait_s=25"
        return {"call_id": "c-7", "state": states.pop(0), "value": "at last", "error": None}

    plane.answers["slow"] = lambda request: {"call_id": "c-7", "state": "queued", "value": None, "error": None}
    plane.later["c-7"] = next_state
    assert worker.execute("slow()", tools=[tool("slow")]).value == "at last"
    assert states == []


def test_calls_share_one_kept_connection(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.tools["add"] = lambda a, b: a + b
    assert worker.execute("[add(i, 1) for i in range(50)]", tools=[tool("add", "a", "b")]).value == list(range(1, 51))
    assert plane.connections == 3  # on the first two, frames were asked for, with files and without, and refused


def test_calls_are_framed_on_one_kept_connection_where_the_broker_agrees(
    worker: WorkerProcess, plane: GuestPlane
) -> None:
    plane.speaks_frames = True
    plane.tools["add"] = lambda a, b: a + b
    assert worker.execute("[add(i, 1) for i in range(50)]", tools=[tool("add", "a", "b")]).value == list(range(1, 51))
    assert plane.connections == 2  # on the first, files were asked for and refused
    assert {line for _, line in plane.lines} == {"POST /v1/tool-calls"}


def test_large_arguments_are_posted_over_http_and_large_results_come_in_frames(
    worker: WorkerProcess, plane: GuestPlane
) -> None:
    plane.speaks_frames = True
    plane.tools["twice"] = lambda text: text * 2
    code = "[len(twice('x' * n)) for n in (10, 20_000, 200_000, 10)]"
    assert worker.execute(code, tools=[tool("twice", "text")]).value == [20, 40_000, 400_000, 20]
    assert [line.endswith("HTTP/1.1") for _, line in plane.lines] == [False, False, True, False]


def test_broken_framed_connection_is_tried_again_with_the_same_key(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.speaks_frames = True
    plane.tools["add"] = lambda a, b: a + b
    plane.break_after_reading = 2
    assert worker.execute("add(1, 2)", tools=[tool("add", "a", "b")]).value == 3
    assert len({request["key"] for request in plane.requests}) == 1


def test_pending_framed_call_is_asked_for_again_until_it_ends(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.speaks_frames = True
    plane.answers["slow"] = lambda request: {"call_id": "c1", "state": "started"}
    plane.later["c1"] = lambda request: {"call_id": "c1", "state": "done", "value": "at last"}
    assert worker.execute("slow()", tools=[tool("slow")]).value == "at last"


def test_a_burst_of_framed_calls_keeps_few_connections(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.speaks_frames = True
    plane.tools["add"] = lambda a, b: a + b
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(100) as pool: total = sum(pool.map(lambda i: add(i, 1), range(300)))\ntotal"
    )
    assert worker.execute(code, tools=[tool("add", "a", "b")]).value == sum(range(1, 301))
    assert worker.execute("import os; len(os.listdir('/proc/self/fd')) < 40").value is True


def test_broken_connection_is_tried_again_with_the_same_key(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.tools["add"] = lambda a, b: a + b
    plane.break_after_reading = 2
    assert worker.execute("add(1, 2)", tools=[tool("add", "a", "b")]).value == 3
    assert len(plane.requests) == 3
    assert len({request["key"] for request in plane.requests}) == 1


def test_connections_that_break_again_and_again_are_an_error(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.break_after_reading = 1000
    kind, message = failure(worker.execute("add(1, 2)", tools=[tool("add", "a", "b")]))
    assert kind == "BrokerGone"
    assert "does not answer" in message
    assert len(plane.requests) == 3


def test_broker_that_is_gone_is_a_runtime_error(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.tools["add"] = lambda a, b: a + b
    worker.execute("add(1, 2)", tools=[tool("add", "a", "b")])
    plane.close()
    result = worker.execute("try:\n    add(1, 2)\nexcept RuntimeError as e:\n    text = str(e)\ntext")
    assert "the sandbox's broker is gone" in result.value


def test_1000_threads_call_at_once_and_few_connections_stay(worker: WorkerProcess, plane: GuestPlane) -> None:
    import threading

    everyone = threading.Barrier(1000)

    def meet(n: int) -> int:
        everyone.wait(25)  # passes only when 1,000 calls are here at the same time
        return n * 2

    plane.tools["meet"] = meet
    code = """
import threading
results = [None] * 1000
def ask(i): results[i] = meet(i)
threads = [threading.Thread(target=ask, args=(i,)) for i in range(1000)]
for t in threads: t.start()
for t in threads: t.join()
results == [i * 2 for i in range(1000)]
"""
    assert worker.execute(code, tools=[tool("meet", "n")]).value is True
    assert worker.execute("import os; len(os.listdir('/proc/self/fd'))").value < 30


def test_calls_beyond_the_descriptor_limit_wait_instead_of_failing(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.tools["echo"] = lambda n: n
    code = """
import resource, threading
resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
results = [None] * 100
def ask(i): results[i] = echo(i)
threads = [threading.Thread(target=ask, args=(i,)) for i in range(100)]
for t in threads: t.start()
for t in threads: t.join()
results == list(range(100))
"""
    assert worker.execute(code, tools=[tool("echo", "n")]).value is True


def test_forked_children_call_over_connections_of_their_own(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.tools["double"] = lambda n: n * 2
    code = """
import multiprocessing
def work(n): return double(n)
first = double(1)
with multiprocessing.get_context("fork").Pool(3) as pool:
    rest = pool.map(work, range(30))
first, rest, double(5)
"""
    assert worker.execute(code, tools=[tool("double", "n")]).value == [2, [n * 2 for n in range(30)], 10]
    assert {request["execution_id"] for request in plane.requests} == {"x1"}


def test_child_of_an_ended_execution_says_so_by_its_id(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.tools["probe"] = lambda: 1
    code = (
        "import os\n"
        "r, w = os.pipe()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    os.close(w); os.read(r, 1); probe(); os._exit(0)"
    )
    running = worker.begin(code, tools=[tool("probe")])
    header, _ = worker.receive()
    assert header["outcome"] == "ok"
    worker.execute("os.close(w); os.close(r); os.waitpid(pid, 0)")
    assert [request["execution_id"] for request in plane.requests] == ["x1"]
    import os

    os.close(running._pipe)


def test_tool_call_inside_a_tool_callback_from_asyncio_works(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.tools["add"] = lambda a, b: a + b
    code = "import asyncio\nawait asyncio.gather(*[asyncio.to_thread(add, i, 1) for i in range(10)])"
    assert worker.execute(code, tools=[tool("add", "a", "b")]).value == list(range(1, 11))
    assert worker.execute("asyncio.run(asyncio.to_thread(add, 1, 2))").value == 3


def test_reply_that_is_no_status_is_an_error_not_a_hang(worker: WorkerProcess, plane: GuestPlane) -> None:
    plane.answers["odd"] = lambda request: {"nonsense": True}
    kind, message = failure(worker.execute("odd()", tools=[tool("odd")]))
    assert kind == "BrokerGone"
    assert "no tool call status" in message
