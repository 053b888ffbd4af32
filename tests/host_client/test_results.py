"""Claims about what ``execute`` returns and raises."""

from __future__ import annotations

from typing import Any

import pytest

from broker.protocol.messages import ErrorInfo, Outcome
from host_client.dspy_compat import contract
from host_client.errors import SessionLost
from host_client.results import ExecutionRecord, deliver

DSPY = contract()


def _code(**fields: Any) -> Any:
    return deliver(ExecutionRecord(outcome=fields.pop("outcome", Outcome.OK), **fields), DSPY, for_model=False)


def _model(**fields: Any) -> Any:
    return deliver(ExecutionRecord(outcome=fields.pop("outcome", Outcome.OK), **fields), DSPY, for_model=True)


def _failure(kind: type[BaseException], **fields: Any) -> str:
    with pytest.raises(kind) as caught:
        _model(**fields)
    return str(caught.value)


class TestForCode:
    def test_the_value_wins_as_it_is(self) -> None:
        assert _code(value="a\n", display="a\n", output="printed\n") == "a\n"
        assert _code(value=0, display="0") == 0
        assert _code(value=[], display="[]") == []

    def test_without_a_value_it_is_the_text_without_trailing_newlines(self) -> None:
        assert _code(output="a\nb\n\n") == "a\nb"

    def test_with_neither_it_is_none(self) -> None:
        assert _code() is None
        assert _code(output="\n") is None

    def test_a_value_that_json_lacks_is_its_text(self) -> None:
        assert _code(display="<function f>") == "<function f>"


class TestForTheModel:
    def test_a_value_alone_comes_as_it_is(self) -> None:
        assert _model(value="text", display="text") == "text"
        assert _model(value=[1, 2], display="[1, 2]") == [1, 2]
        assert _model(value={"a": 1}, display="{'a': 1}") == {"a": 1}
        assert _model(value=3, display="3") == 3

    @pytest.mark.parametrize(("value", "display"), [(0, "0"), (False, "False"), ([], "[]"), ({}, "{}"), ("", "''")])
    def test_a_falsy_value_comes_as_its_text(self, value: Any, display: str) -> None:
        assert _model(value=value, display=display) == display

    def test_a_value_that_is_shown_otherwise_comes_as_it_is_shown(self) -> None:
        assert _model(value=[1, 2], display="(1, 2)") == "(1, 2)"
        assert _model(value=[{"a": 1}], display="   a\n0  1") == "   a\n0  1"

    def test_text_and_value_come_together(self) -> None:
        assert _model(output="printed\n", value=42, display="42") == "printed\n42"
        assert _model(output="printed\n", value="it's", display="it's") == "printed\nit's"
        assert _model(output="printed\n", value=0, display="0") == "printed\n0"

    def test_text_alone_and_nothing(self) -> None:
        assert _model(output="printed\n") == "printed"
        assert _model() is None

    def test_thrown_away_output_is_noted(self) -> None:
        text = _model(output="begin", discarded_output_bytes=12_345)
        assert text == "begin\n[12,345 more bytes were printed and thrown away]"


def test_submitted_values_come_in_dspys_own_class() -> None:
    assert _model(outcome=Outcome.SUBMITTED, value={"answer": 1}) == DSPY.final_output({"answer": 1})


def test_an_error_carries_the_traceback_and_what_was_printed_before_it() -> None:
    error = ErrorInfo(type="ValueError", message="bad", traceback="Traceback:\n  line 1\nValueError: bad\n", lineno=1)
    text = _failure(DSPY.code_error, outcome=Outcome.RAISED, error=error, output="step 1\n")
    assert text == "Traceback:\n  line 1\nValueError: bad\n\nOutput before the error:\nstep 1"


def test_an_error_without_frames_names_its_class() -> None:
    error = ErrorInfo(type="ToolError", message="[dspy bridge lm-error #3] no")
    assert _failure(DSPY.code_error, outcome=Outcome.RAISED, error=error) == "ToolError: [dspy bridge lm-error #3] no"


@pytest.mark.parametrize("kind", [SyntaxError, IndentationError, TabError])
def test_invalid_source_is_a_syntax_error(kind: type[SyntaxError]) -> None:
    error = ErrorInfo(type=kind.__name__, message="invalid syntax (line 2)", lineno=2)
    with pytest.raises(SyntaxError) as caught:
        _model(outcome=Outcome.SYNTAX_ERROR, error=error)
    assert type(caught.value) is kind
    assert "line 2" in str(caught.value)


@pytest.mark.parametrize("outcome", [Outcome.TIMED_OUT, Outcome.INTERRUPTED, Outcome.OUTPUT_LIMIT])
def test_a_stopped_execution_whose_namespace_lives_is_an_error_that_the_model_can_repair(outcome: Outcome) -> None:
    text = _failure(DSPY.code_error, outcome=outcome, error=ErrorInfo(type="Stopped", message="why"), output="so far")
    assert "why" in text
    assert "variables set so far were kept" in text
    assert text.endswith("so far")


@pytest.mark.parametrize("outcome", [Outcome.TIMED_OUT, Outcome.WORKER_DIED])
def test_a_lost_namespace_ends_the_forward_with_its_reason(outcome: Outcome) -> None:
    with pytest.raises(SessionLost) as caught:
        _model(outcome=outcome, session_lost="oom", output="so far")
    assert caught.value.reason == "oom"
    assert "so far" in str(caught.value)
    if DSPY.terminal_base is None:
        assert not isinstance(caught.value, DSPY.code_error)
    else:
        assert isinstance(caught.value, DSPY.terminal_base)
        assert not isinstance(caught.value, DSPY.code_error)
