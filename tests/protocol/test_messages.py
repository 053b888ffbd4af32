"""Claims about the messages: they survive the wire, and a wrong field is named."""

from __future__ import annotations

from typing import Any

import pytest

from broker.protocol.messages import (
    CallState,
    Claim,
    ClaimRequest,
    ErrorInfo,
    ExecuteRequest,
    ExecutionResult,
    Outcome,
    OutputField,
    Progress,
    ToolCallRequest,
    ToolCallStatus,
    ToolDefinition,
    ToolParameter,
    ToolResult,
)
from broker.protocol.reading import BadRequest

ERROR = ErrorInfo(type="ValueError", message="bad", traceback="line 1", lineno=1)
CLAIM = Claim(
    call_id="c1", attempt=1, tool="add", args=[1], kwargs={"b": 2}, execution_id="e1", lease_s=60.0, blob_range=(0, 2)
)
RESULT = ExecutionResult(outcome=Outcome.RAISED, output="x", error=ERROR, session_lost="oom", duration_s=0.5)
TOOL = ToolDefinition(
    name="add",
    parameters=(ToolParameter(name="self", kind="keyword_only", default="3", annotation="int"),),
    doc="Adds.",
    returns="int",
)
MESSAGES = [
    ERROR,
    CLAIM,
    RESULT,
    TOOL,
    ToolDefinition(name="any", parameters=None),
    ToolDefinition(name="inside", parameters=(), source="def f(): return 1\n__tool__ = f\n"),
    OutputField(name="answer", type="str"),
    ExecuteRequest(execution_id="e1", code="1", variables={"x": 1}, tools=(TOOL,), output_fields=(), drop=("v1",)),
    ExecuteRequest(execution_id="e2", code="", timeout_s=5.0, timeout_includes_tools=False),
    ClaimRequest(limit=3, wait_s=1.5, renew=(("c1", 2),), start=False, execution_id="e1"),
    Progress(execution_id="e1", running=True, claims=(CLAIM,), lost=("c9",)),
    Progress(execution_id="e1", running=False, result=RESULT),
    ToolResult(attempt=1, value=[1]),
    ToolResult(attempt=2, error=ERROR),
    ToolCallRequest(key="k", execution_id="e1", tool="add", args=[1], kwargs={"self": 2}),
    ToolCallStatus(call_id="c1", state=CallState.DONE, value=3),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_survives_the_wire(message: Any) -> None:
    assert type(message).from_json(message.to_json()) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("junk", [None, 5, "text", [], {}, {"call_id": 5, "name": [], "outcome": {}, "key": None}])
def test_junk_is_refused_or_read_as_defaults_but_never_crashes(message: Any, junk: Any) -> None:
    try:
        read = type(message).from_json(junk)
    except BadRequest:
        return
    assert isinstance(read, type(message))


@pytest.mark.parametrize(
    ("kind", "data", "names"),
    [
        (ExecuteRequest, {"execution_id": "e", "code": 5}, "'code' must be a string"),
        (ExecuteRequest, {"code": ""}, "'execution_id' is missing"),
        (ExecuteRequest, {"execution_id": "e", "code": "", "timeout_s": -1}, "'timeout_s' must be between"),
        (ExecuteRequest, {"execution_id": "x" * 65, "code": ""}, "longer than 64"),
        (ClaimRequest, {"limit": True}, "'limit' must be an integer"),
        (ClaimRequest, {"renew": [["c"]]}, "'renew'"),
        (ToolDefinition, {"name": "not valid"}, "not a Python identifier"),
        (ToolDefinition, {"name": "class"}, "not a Python identifier"),
        (ToolParameter, {"name": "a", "kind": "strange"}, "unknown kind"),
        (ExecutionResult, {"outcome": "great"}, "'outcome' has the unknown value"),
        (Claim, {**CLAIM.to_json(), "blob_range": [1]}, "blob_range"),
    ],
)
def test_a_wrong_field_is_named(kind: Any, data: Any, names: str) -> None:
    with pytest.raises(BadRequest, match=names):
        kind.from_json(data)
