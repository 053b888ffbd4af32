"""The scripted server speaks OpenAI's shape, also to DSPy's real client."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from host_client.demo.scripted_lm import Message, ScriptedServer, serve


def shout(messages: Sequence[Message]) -> str:
    if "fail" in messages[-1].text:
        raise ValueError("told to fail")
    return messages[-1].text.upper()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with serve(shout) as running:
        yield running


def call(url: str, body: bytes | None = None) -> tuple[int, Any]:
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def chat(server: ScriptedServer, **fields: Any) -> tuple[int, Any]:
    body = {"model": "scripted", "messages": [{"role": "user", "content": "hello"}], **fields}
    return call(f"{server.base_url}/chat/completions", json.dumps(body).encode())


def test_models_are_listed(server: ScriptedServer) -> None:
    status, reply = call(f"{server.base_url}/models")
    assert (status, reply["object"], reply["data"][0]["id"]) == (200, "list", "scripted")


def test_chat_completion_has_the_fields_that_clients_read(server: ScriptedServer) -> None:
    status, reply = chat(server)
    assert status == 200
    assert reply["object"] == "chat.completion"
    assert reply["choices"] == [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "HELLO"}}
    ]
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0


def test_n_asks_the_model_n_times(server: ScriptedServer) -> None:
    assert [choice["index"] for choice in chat(server, n=3)[1]["choices"]] == [0, 1, 2]
    assert len(server.requests) == 3


def test_parts_of_a_content_are_joined(server: ScriptedServer) -> None:
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(server, messages=[{"role": "user", "content": content}])[1]["choices"][0]["message"]["content"] == "AB"


@pytest.mark.parametrize(
    "fields",
    [{"messages": []}, {"messages": "hi"}, {"messages": ["hi"]}, {"stream": True}, {"n": 1000}, {"n": "2"}],
)
def test_bad_requests_get_openai_errors_and_never_reach_the_model(
    server: ScriptedServer, fields: dict[str, Any]
) -> None:
    status, reply = chat(server, **fields)
    assert (status, reply["error"]["type"]) == (400, "invalid_request_error")
    assert server.requests == []


def test_body_that_is_not_json_is_refused(server: ScriptedServer) -> None:
    status, reply = call(f"{server.base_url}/chat/completions", b"{nonsense")
    assert status == 400
    assert "not JSON" in reply["error"]["message"]


def test_unknown_path_is_not_found(server: ScriptedServer) -> None:
    assert call(f"{server.base_url}/embeddings", b"{}")[0] == 404
    assert call(f"{server.base_url}/embeddings")[0] == 404


def test_failing_model_is_a_server_error_with_its_text(server: ScriptedServer) -> None:
    status, reply = chat(server, messages=[{"role": "user", "content": "fail"}])
    assert status == 500
    assert "told to fail" in reply["error"]["message"]


def test_dspy_lm_round_trip(server: ScriptedServer) -> None:
    import dspy

    lm = dspy.LM("openai/scripted", api_base=server.base_url, api_key="not-a-key", cache=False)
    assert lm("hello there") == ["HELLO THERE"]
    assert [message.text for message in server.requests[0].messages] == ["hello there"]
    assert server.requests[0].reply == "HELLO THERE"


def test_loopback_is_not_sent_to_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    import dspy

    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    with serve(shout) as server:
        lm = dspy.LM("openai/scripted", api_base=server.base_url, api_key="k", cache=False, num_retries=0)
        assert lm("direct") == ["DIRECT"]


def test_requests_are_answered_at_the_same_time() -> None:
    # Breaks (and answers 500) unless all eight are inside the model at once.
    barrier = threading.Barrier(8, timeout=20)

    def meet(messages: Sequence[Message]) -> str:
        barrier.wait()
        return "met"

    with serve(meet) as server, ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: chat(server), range(8)))
    assert [status for status, _ in replies] == [200] * 8


def test_nothing_is_left_after_the_block() -> None:
    with serve(shout) as server:
        url = f"{server.base_url}/models"
        assert call(url)[0] == 200
    with pytest.raises(urllib.error.URLError):
        call(url)
    assert "scripted-lm" not in {thread.name for thread in threading.enumerate()}


def test_stop_does_not_wait_for_a_thinking_model() -> None:
    thinking = threading.Event()

    def think_long(messages: Sequence[Message]) -> float:
        thinking.set()
        return 3600.0

    with ThreadPoolExecutor(1) as pool:
        with serve(shout, think_s=think_long) as server:
            reply = pool.submit(chat, server)
            assert thinking.wait(20)
        assert reply.result(timeout=20)[0] == 200
