"""Results on the wire: twice, late, in another order, and of somebody else's call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from broker.testing import InProcessBroker
from tests.broker.conftest import Client

CODE = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool:
    answers = list(pool.map(search, range(8)))
answers
"""


@pytest.fixture(scope="module")
def box() -> Iterator[InProcessBroker]:
    with InProcessBroker() as broker:
        yield broker


@pytest.fixture
def client(box: InProcessBroker) -> Iterator[Client]:
    made = Client.open(box)
    yield made
    made.close()


def claims_of(client: Client, code: str, count: int) -> tuple[str, list[dict[str, Any]]]:
    """Run code; return the execution's id and so many claims."""
    progress = client.run(code)
    claims = [claim.to_json() for claim in progress.claims]
    while len(claims) < count:
        claims += client.claims(execution_id=progress.execution_id, wait_s=20)[1]["claims"]
    assert progress.execution_id is not None
    return progress.execution_id, claims


def result_of(client: Client, execution_id: str) -> dict[str, Any]:
    result: dict[str, Any] = client.box.host.request("GET", f"/v1/executions/{execution_id}?wait_s=20")[1]["result"]
    return result


def test_answers_in_reverse_order_reach_the_calls_that_they_belong_to(client: Client) -> None:
    execution_id, claims = claims_of(client, CODE, 8)
    for claim in reversed(claims):
        assert client.answer(claim["call_id"], claim["args"][0] * 10) == 200
    assert result_of(client, execution_id)["value"] == [0, 10, 20, 30, 40, 50, 60, 70]


def test_of_two_answers_to_one_attempt_the_first_stands(client: Client) -> None:
    execution_id, [claim] = claims_of(client, "search(1)", 1)
    assert [client.answer(claim["call_id"], value) for value in ("first", "second")] == [200, 200]
    assert result_of(client, execution_id)["value"] == "first"


def test_an_answer_after_the_end_of_its_execution_changes_nothing(client: Client) -> None:
    execution_id, [claim] = claims_of(client, "x = 'before'; x = search(1)", 1)
    client.box.host.request("POST", f"/v1/executions/{execution_id}/interrupt", {})
    assert result_of(client, execution_id)["outcome"] == "interrupted"
    assert client.answer(claim["call_id"], "late") == 410
    assert client.run("x").result.value == "before"  # type: ignore[union-attr]


def test_an_answer_to_a_later_attempt_or_a_call_of_nobody_is_refused(client: Client) -> None:
    execution_id, [claim] = claims_of(client, "search(1)", 1)
    assert client.answer(claim["call_id"], "of the future", attempt=2) == 409
    assert client.answer("nobody's", "x") == 404
    assert client.answer(claim["call_id"], "right") == 200
    assert result_of(client, execution_id)["value"] == "right"


def test_an_execution_posted_twice_runs_once_and_gives_the_stored_reply(client: Client) -> None:
    client.run("runs = 0")
    body = {"execution_id": f"{client.session_id}-twice", "code": "runs += 1; runs"}
    path = f"/v1/sessions/{client.session_id}/executions?wait_s=20"
    first, again = (client.box.host.request("POST", path, body)[1]["result"] for _ in range(2))
    assert (first["value"], again) == (1, first)
    assert client.run("runs").result.value == 1  # type: ignore[union-attr]
