"""The messages of both planes and of the worker's channel, as frozen dataclasses with strict readers.

``to_json`` gives the JSON object; ``from_json`` reads one and raises ``BadRequest`` that names the
field. Fields called ``value``, ``args``, ``kwargs`` and ``variables`` hold encoded values
(``broker.protocol.values``): the broker passes them on without looking inside.
"""

from __future__ import annotations

from broker.protocol.attaching import Attached, StartedCall, Verdict
from broker.protocol.executions import (
    ErrorInfo,
    ExecuteRequest,
    ExecutionResult,
    Outcome,
)
from broker.protocol.holding import HeldBy
from broker.protocol.opening import OpenRequest
from broker.protocol.reading import JsonObject
from broker.protocol.tool_calls import (
    CallState,
    Claim,
    ClaimRequest,
    Progress,
    ToolCallRequest,
    ToolCallStatus,
    ToolResult,
    lane_call_id,
)
from broker.protocol.tools import (
    OutputField,
    ToolDefinition,
    ToolParameter,
)

__all__ = [
    "Attached",
    "CallState",
    "Claim",
    "ClaimRequest",
    "ErrorInfo",
    "ExecuteRequest",
    "ExecutionResult",
    "HeldBy",
    "JsonObject",
    "OpenRequest",
    "Outcome",
    "OutputField",
    "Progress",
    "StartedCall",
    "ToolCallRequest",
    "ToolCallStatus",
    "ToolDefinition",
    "ToolParameter",
    "ToolResult",
    "Verdict",
    "lane_call_id",
]
