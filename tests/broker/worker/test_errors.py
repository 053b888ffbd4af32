"""Errors of generated code: what the model reads."""

from __future__ import annotations

import sys

import pytest

from broker.worker.cells import MAX_TOKENS
from broker.worker.tracebacks import MAX_MESSAGE_CHARS, MAX_TRACEBACK_CHARS
from tests.broker.worker.harness import Result, WorkerProcess


def error_type(result: Result) -> str:
    assert result.error is not None, result
    return str(result.error["type"])


def traceback_of(result: Result) -> str:
    assert result.error is not None, result
    return str(result.error["traceback"])


def test_traceback_shows_lines_of_generated_code_and_nothing_of_the_worker(worker: WorkerProcess) -> None:
    worker.execute("def helper(x):\n    return 1 / x")
    result = worker.execute("# first line\nhelper(0)")
    assert (result.outcome, error_type(result), result.message) == ("raised", "ZeroDivisionError", "division by zero")
    text = traceback_of(result)
    assert 'File "<execution 1>", line 2, in helper\n    return 1 / x' in text
    assert 'File "<execution 2>", line 2, in <module>\n    helper(0)' in text
    assert "broker" not in text
    assert result.error is not None
    assert result.error["lineno"] == 2


def test_traceback_shows_frames_of_libraries_below(worker: WorkerProcess) -> None:
    result = worker.execute("import json\njson.loads('{')")
    assert error_type(result) == "JSONDecodeError"
    assert "json/decoder.py" in traceback_of(result)
    assert result.error is not None
    assert result.error["lineno"] == 2


def test_lines_end_where_python_ends_them(worker: WorkerProcess) -> None:
    result = worker.execute("a = 'x\u2028y\x0cz'\r\nb = 1\r\nraise ValueError(b)")
    assert result.error is not None
    assert result.error["lineno"] == 3
    assert "raise ValueError(b)" in traceback_of(result)


def test_chained_exceptions_are_shown(worker: WorkerProcess) -> None:
    result = worker.execute("try:\n    1/0\nexcept Exception as e:\n    raise ValueError('outer') from e")
    text = traceback_of(result)
    assert "ZeroDivisionError: division by zero" in text
    assert "direct cause" in text
    assert text.rstrip().endswith("ValueError: outer")
    assert "broker" not in text


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with Python 3.11")
def test_exception_groups_are_shown(worker: WorkerProcess) -> None:
    result = worker.execute("raise ExceptionGroup('two', [ValueError('first one'), KeyError('second one')])")
    assert "first one" in traceback_of(result)
    assert "second one" in traceback_of(result)


def test_endless_recursion_is_survived_and_its_traceback_bounded(worker: WorkerProcess) -> None:
    worker.execute("kept = 'yes'\ndef f(n):\n    return f(n + 1)")
    result = worker.execute("f(0)")
    assert error_type(result) == "RecursionError"
    assert len(traceback_of(result)) < 5_000
    assert worker.execute("kept").value == "yes"


def test_giant_message_is_bounded(worker: WorkerProcess) -> None:
    result = worker.execute("raise ValueError('m' * 10_000_000)")
    assert len(result.message) < MAX_MESSAGE_CHARS + 200
    assert len(traceback_of(result)) < MAX_TRACEBACK_CHARS + 200


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("class E(Exception):\n    def __str__(self): raise RuntimeError\nraise E", "E"),
        ("class E(Exception):\n    def __str__(self): return 5\nraise E", "E"),
        ("class E(Exception):\n    def __str__(self): raise SystemExit\nraise E", "E"),
        ("class M(type):\n    __name__ = property(lambda s: 1/0)\nclass E(Exception, metaclass=M): pass\nraise E", "E"),
        ("class E(Exception):\n    __class__ = property(lambda s: KeyboardInterrupt)\nraise E('x')", "E"),
        ("class E(Exception):\n    __cause__ = property(lambda s: 1/0)\nraise E('x')", "E"),
        ("class E(Exception):\n    __traceback__ = property(lambda s: 1/0)\nraise E('x')", "E"),
        (
            "class S(str): __len__ = lambda s: 1/0\nclass E(Exception):\n    def __str__(self): return S('t')\nraise E",
            "E",
        ),
        ("class E(Exception):\n    __notes__ = 5\nraise E('x')", "E"),
        ("e = ValueError('loop'); e.__cause__ = e\nraise e", "ValueError"),
        ("class SyntaxError(Exception): pass\nraise SyntaxError('mine')", "SyntaxError"),
        ("raise type('N' * 1000, (Exception,), {})", "N" * 200),
        ("raise GeneratorExit", "GeneratorExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise BaseException('plain')", "BaseException"),
    ],
)
def test_hostile_exception_is_reported_and_the_session_lives(worker: WorkerProcess, body: str, kind: str) -> None:
    worker.execute("kept = 1")
    result = worker.execute(body)
    assert (result.outcome, error_type(result)) == ("raised", kind)
    assert worker.execute("kept").value == 1


@pytest.mark.parametrize("code", ["exit()", "quit(3)", "import sys; sys.exit('bye')", "raise SystemExit"])
def test_exit_says_what_to_do_instead_and_the_session_lives(worker: WorkerProcess, code: str) -> None:
    result = worker.execute(code)
    assert (result.outcome, error_type(result)) == ("raised", "SystemExit")
    assert "call SUBMIT(...)" in result.message
    assert worker.execute("input").outcome == "ok"


def test_syntax_error_shows_line_text_and_caret(worker: WorkerProcess) -> None:
    result = worker.execute("x = 1\nif x = 2:\n    pass")
    assert (result.outcome, error_type(result)) == ("syntax_error", "SyntaxError")
    message, text, caret = result.message.split("\n")
    assert message.endswith("(line 2)")
    assert text == "    if x = 2:"
    assert caret.index("^") == text.index("x")
    assert result.error is not None
    assert result.error["lineno"] == 2


def test_syntax_error_found_late_shows_its_line_too(worker: WorkerProcess) -> None:
    result = worker.execute("x = 1\nreturn x")
    assert result.message.startswith("'return' outside function (line 2)\n    return x\n    ^")


def test_syntax_error_in_a_long_line_shows_the_place_only(worker: WorkerProcess) -> None:
    result = worker.execute("x = '" + "a" * 100_000 + "' = 5")
    assert result.outcome == "syntax_error"
    assert len(result.message) < 2_000


def test_indentation_error_keeps_its_name(worker: WorkerProcess) -> None:
    result = worker.execute("if True:\nx = 1")
    assert (result.outcome, error_type(result)) == ("syntax_error", "IndentationError")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("x = 1\ny = '\0'", "null bytes"),
        ("x = 1\ny = '\ud800'", "lone surrogate U+D800 in the source (line 2)"),
        ("(" * 5000 + ")" * 5000, "nested"),
        ("x" + ".a" * 100_000, "nested"),
        ("-" * 200_000 + "1", "nested"),
        ("x = " + "1+" * 100_000 + "1", "nested"),
        ("x=1\n" * (MAX_TOKENS // 2), "more than 300,000 tokens"),
        ("[" + "1," * MAX_TOKENS + "]", "more than 300,000 tokens"),
    ],
    ids=["null", "surrogate", "parentheses", "attributes", "minus", "sum", "many-lines", "long-list"],
)
def test_source_that_cannot_be_compiled_is_a_syntax_error(worker: WorkerProcess, code: str, says: str) -> None:
    worker.execute("kept = 1")
    result = worker.execute(code)
    assert result.outcome == "syntax_error", result.error
    assert says in result.message
    assert worker.execute("kept").value == 1


def test_20_mb_of_literal_is_run(worker: WorkerProcess) -> None:
    assert worker.execute("text = '" + "a" * 20_000_000 + "'\nlen(text)").value == 20_000_000
    assert worker.execute("text = '''" + "some, words; and\n" * 1_200_000 + "'''\nlen(text)").value == 20_400_000
    assert worker.execute("#" * 20_000_000).outcome == "ok"


def test_future_import_works_within_its_execution(worker: WorkerProcess) -> None:
    code = "from __future__ import annotations\ndef f(x: Undefined): pass\nf.__annotations__['x']"
    assert worker.execute(code).value == "Undefined"
    lambdas = "from __future__ import annotations\n(lambda: 1)()"
    assert worker.execute(lambdas).value == 1


def test_getsource_works_for_functions_of_earlier_executions(worker: WorkerProcess) -> None:
    worker.execute("def double(n):\n    # twice\n    return 2 * n\n")
    worker.execute("import inspect")
    assert worker.execute("inspect.getsource(double)").value == "def double(n):\n    # twice\n    return 2 * n\n"


def test_old_sources_are_forgotten_but_not_those_of_living_functions(worker: WorkerProcess) -> None:
    worker.execute("import inspect, linecache\ndef double(n): return 2 * n\n")
    for _ in range(400):
        worker.execute("pass")
    names = worker.execute("sum(name.startswith('<execution') for name in linecache.cache)").value
    assert names <= 300
    assert "return 2 * n" in worker.execute("inspect.getsource(double)").value


def test_code_that_parses_during_garbage_collection_does_not_break_the_next_compilation(worker: WorkerProcess) -> None:
    hook = "gc.callbacks.append(lambda *a: ast.parse('((1+2)+3)*[1,2,f(x)(y)]'))"
    worker.execute(f"import ast, gc\n{hook}\ngc.set_threshold(1)")
    cell = "def f(a):\n    return [x+1 for x in (a, (1+2)*3, {'k': [1, 2, 3]})]\n"
    result = worker.execute(cell * 20 + "gc.isenabled()")
    assert (result.outcome, result.value) == ("ok", True), result.error
