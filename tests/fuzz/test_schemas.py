"""Both planes, fuzzed along their OpenAPI documents, with ids that exist and ids that do not."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from flask import Flask
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis import checks as schemathesis_checks
from schemathesis.specs.openapi import checks as openapi_checks

from broker.guest_api import make_guest_app
from broker.host_api import make_host_app
from broker.logs import Log
from broker.protocol.executions import ExecutionResult
from broker.sessions import Sessions
from broker.testing import FakeSpawner, InProcessBroker
from broker.testing.fake_worker import FakeExecution, ok
from tests.fuzz import unix_http
from tests.fuzz.growth import Growth

DOCUMENTS = Path(__file__).parents[2] / "docs" / "openapi"
HOST = schemathesis.openapi.from_path(DOCUMENTS / "host.json")
GUEST = schemathesis.openapi.from_path(DOCUMENTS / "guest.json")

_EXAMPLES = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
#: What every answer must keep to; that unknown fields are ignored is part of the protocol.
_CHECKS = [
    schemathesis_checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]
#: Long polls that find nothing would only take time.
_LONGEST_WAIT_S = 0.02


def _script(execution: FakeExecution) -> ExecutionResult:
    if execution.header["code"] == "call":
        execution.call_tool("tool_known", 1)
    return ok({"$float": "nan"})


class World:
    """A broker in which something is going on: a session, its execution, and an open call of it."""

    def __init__(self) -> None:
        self.broker = InProcessBroker(_script, max_sessions=4)
        self.broker.__enter__()
        self._ids: dict[str, str] = {}
        self._number = 0
        self.seen: Counter[tuple[str, int]] = Counter()
        self.turns = itertools.cycle((True, False))
        self.sessions = {
            "host": unix_http.session(self.broker.host_socket),
            "guest": unix_http.session(self.broker.guest_socket),
        }

    def ids(self) -> dict[str, str]:
        """Return ids that exist."""
        if not self._ids or not self._alive():
            self._ids = self._made()
        return self._ids

    def close(self) -> None:
        """End it."""
        for session in self.sessions.values():
            session.close()
        self.broker.__exit__(None, None, None)

    def _alive(self) -> bool:
        host, known = self.broker.host, self._ids
        _, call, _ = host.request("GET", f"/v1/tool-calls/{known['call_id']}")
        _, listed, _ = host.request("GET", "/v1/sessions")
        ours = [s for s in listed["sessions"] if s["session_id"] in (known["session_id"], known["idle_session_id"])]
        held = [(session["epoch"], session["lost"]) for session in ours]
        _, kept, _ = host.request("GET", f"/v1/sessions/{known['idle_session_id']}/snapshots")
        snapshots = [each["snapshot_id"] for each in kept.get("snapshots", ())]
        return (
            (call.get("state"), call.get("attempt")) == ("started", 1)
            and held == [(1, None)] * 2
            and known["snapshot_id"] in snapshots
        )

    def _made(self) -> dict[str, str]:
        host = self.broker.host
        _, listed, _ = host.request("GET", "/v1/sessions")
        for there in listed["sessions"]:
            host.request("DELETE", f"/v1/sessions/{there['session_id']}?epoch={there['epoch']}")
        _, idle, _ = host.request("POST", "/v1/sessions", {})
        _, snapshot, _ = host.request("POST", f"/v1/sessions/{idle['session_id']}/snapshots", {})
        _, session, _ = host.request("POST", "/v1/sessions", {})  # the newest one may call tools
        self._number += 1
        body = {"execution_id": f"known-{self._number}", "code": "call", "tools": [{"name": "tool_known"}]}
        path = f"/v1/sessions/{session['session_id']}/executions?wait_s=10"
        _, progress, _ = host.request("POST", path, body)
        [claim] = progress["claims"]
        return {
            "idle_session_id": idle["session_id"],
            "snapshot_id": snapshot["snapshot_id"],
            "session_id": session["session_id"],
            "execution_id": body["execution_id"],
            "call_id": claim["call_id"],
        }


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World()
    made.ids()
    yield made
    made.close()


def _hurry(case: Case) -> None:
    """Keep the waits short; what is no number is the point of some cases, and stays."""
    for container in (case.query, case.body):
        if isinstance(container, dict) and "wait_s" in container:
            with contextlib.suppress(TypeError, ValueError):
                if float(container["wait_s"]) > _LONGEST_WAIT_S:
                    container["wait_s"] = type(container["wait_s"])(_LONGEST_WAIT_S)
    if isinstance(case.body, dict) and case.path.endswith("/tool-calls"):
        case.body.setdefault("wait_s", _LONGEST_WAIT_S)


def _aim(case: Case, known: dict[str, str], plane: str) -> None:
    """Give a case ids that exist, and the rights to act on them."""
    for name in set(known) & set(case.path_parameters or {}):
        case.path_parameters[name] = known[name]
    if case.operation.path.endswith(("/executions", "/forks", "/rollback")) or "/snapshots" in case.operation.path:
        case.path_parameters["session_id"] = known["idle_session_id"]
    if case.query:
        case.query.pop("epoch", None)
    if isinstance(case.body, dict):
        if "attempt" in case.body:
            case.body["attempt"] = 1
        if "snapshot_id" in case.body:
            case.body["snapshot_id"] = known["snapshot_id"]
        if plane == "guest" and "execution_id" in case.body:
            case.body.update(execution_id=known["execution_id"], tool="tool_known")


def _send(case: Case, world: World, plane: str) -> None:
    if next(world.turns):  # half of the cases are about what exists
        _aim(case, world.ids(), plane)
    _hurry(case)
    answer = case.call_and_validate(base_url="http://sandbox", session=world.sessions[plane], checks=_CHECKS)
    world.seen[f"{plane} {case.method} {case.operation.path}", answer.status_code] += 1


@HOST.parametrize()
@_EXAMPLES
def test_the_host_plane_keeps_to_its_document(case: Case, world: World) -> None:
    _send(case, world, "host")


@GUEST.parametrize()
@_EXAMPLES
def test_the_guest_plane_keeps_to_its_document(case: Case, world: World) -> None:
    _send(case, world, "guest")


def test_the_cases_reached_what_is_behind_the_first_checks(world: World) -> None:
    done = {name for name, status in world.seen if status < 300}
    wanted = {f"{plane} {method} {path}" for plane in ("host", "guest") for method, path in _documented(plane)}
    assert wanted - done == {"host GET /v1/frames", "guest GET /v1/frames"}, "these two need an Upgrade"
    print(f"{sum(world.seen.values())} requests, {len(world.seen)} kinds of answers")


def test_nothing_is_held_on_to_and_the_broker_still_answers(world: World) -> None:
    growth = Growth()
    for _ in range(300):
        for plane in ("host", "guest"):
            for path in ("/v1/tool-calls/none", "/v1/none", "/v1/tool-calls"):
                answer = world.sessions[plane].post(f"http://sandbox{path}", data=b"{", timeout=10)
                assert 400 <= answer.status_code < 500
    assert growth.bounded()
    assert world.broker.host.request("GET", "/v1/health")[0] == 200
    assert "defect" not in world.broker.log_path.read_text()


def _routes(app: Flask) -> set[tuple[str, str]]:
    return {
        (method, re.sub(r"<(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD"}
    }


def _documented(name: str) -> set[tuple[str, str]]:
    paths: dict[str, Any] = json.loads((DOCUMENTS / f"{name}.json").read_text())["paths"]
    return {(method.upper(), path) for path, there in paths.items() for method in there if method != "parameters"}


def test_the_documents_have_the_routes_of_the_code(tmp_path: Path) -> None:
    sessions = Sessions(FakeSpawner(_script, tmp_path / "guest.sock"), max_sessions=1, log=Log())
    assert _documented("host") == _routes(make_host_app(sessions, Log(), name=None))
    assert _documented("guest") == _routes(make_guest_app(sessions, Log()))


def test_the_protocols_document_refers_to_them() -> None:
    text = (DOCUMENTS.parent / "protocol.md").read_text()
    assert "openapi/host.json" in text
    assert "openapi/guest.json" in text
