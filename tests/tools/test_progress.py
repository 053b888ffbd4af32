"""Claims about what tools report while they run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from host_client import ToolEvent, progress
from host_client.progress import reporting


def events(body: Callable[[], Any]) -> list[ToolEvent]:
    seen: list[ToolEvent] = []
    with reporting(seen.append, "work"):
        body()
    return seen


def test_start_progress_and_end_arrive_in_order() -> None:
    def body() -> None:
        progress(0.4)
        progress("page 2")
        progress(1, "page 5 of 5")

    seen = events(body)
    assert [event.kind for event in seen] == ["started", "progress", "progress", "progress", "ended"]
    assert [event.message for event in seen[1:4]] == ["40%", "page 2", "100% · page 5 of 5"]
    assert {event.tool for event in seen} == {"work"}
    assert seen[-1].seconds >= seen[0].seconds >= 0


def test_a_failure_is_told_by_its_class_and_raised() -> None:
    seen: list[ToolEvent] = []
    with pytest.raises(KeyError), reporting(seen.append, "work"):
        raise KeyError("secret")
    assert [(event.kind, event.text) for event in seen] == [("started", None), ("failed", "KeyError")]


def test_outside_of_a_watched_call_it_does_nothing() -> None:
    progress(0.5, "nobody listens")
    with reporting(None, "work"):
        progress(0.5)


@pytest.mark.parametrize("done", [-0.1, 1.1, float("nan"), float("inf")])
def test_what_is_no_fraction_is_refused(done: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        progress(done)


@pytest.mark.parametrize("arguments", [(True,), (None,), (0.5, 3), ("text", "text")])
def test_what_is_neither_number_nor_text_is_refused(arguments: Any) -> None:
    with pytest.raises(TypeError):
        progress(*arguments)


def test_a_listener_that_fails_does_not_disturb_the_tool(caplog: pytest.LogCaptureFixture) -> None:
    def listener(event: ToolEvent) -> None:
        raise ZeroDivisionError

    with caplog.at_level(logging.ERROR), reporting(listener, "work"):
        progress("going on")
    assert "on_tool_event failed" in caplog.text


def test_a_nested_call_without_a_listener_reports_to_the_one_around_it() -> None:
    seen: list[str] = []

    def outer(event: ToolEvent) -> None:
        seen.append(f"{event.tool} {event.kind}")

    inner: list[ToolEvent] = []
    with reporting(outer, "research"):
        with reporting(None, "search"):
            progress(0.5)
        with reporting(inner.append, "other"):
            progress(0.5)
    assert seen == ["research started", "search started", "search progress", "search ended", "research ended"]
    assert [event.kind for event in inner] == ["started", "progress", "ended"]


def test_long_texts_are_cut_and_late_reports_go_nowhere() -> None:
    import contextvars

    seen: list[ToolEvent] = []
    with reporting(seen.append, "work"):
        progress("x" * 5_000)
        late = contextvars.copy_context()
    late.run(progress, "still here")
    assert len(seen[1].text or "") == 1_000
    assert [event.kind for event in seen] == ["started", "progress", "ended"]
