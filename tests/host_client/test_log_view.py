"""Log lines for a person, whatever the sandbox wrote."""

from __future__ import annotations

import json

import pytest

from host_client.log_view import lines_of, readable
from host_client.status_table import ago, size


def test_lines_are_put_together_from_any_pieces() -> None:
    assert list(lines_of([b"a", b"b\nc", b"\n", b"\nd"])) == ["ab", "c", "", "d"]


def test_a_line_without_end_does_not_grow_without_end() -> None:
    pieces = list(lines_of([b"x" * 50_000] * 4))
    assert "".join(pieces) == "x" * 200_000
    assert max(map(len, pieces)) <= 100_000


@pytest.mark.parametrize("line", ["[1, 2]", "7", '{"no": "event"}', "[" * 100_000, '{"event": ', ""])
def test_what_is_no_event_is_shown_as_it_is(line: str) -> None:
    assert readable(line) == line


@pytest.mark.parametrize("at", ["soon", None, 1e300, float("nan"), -1e18])
def test_a_strange_time_is_no_error(at: object) -> None:
    assert "started" in readable(json.dumps({"at": at, "event": "started"}))


def test_a_level_is_shown_where_there_is_one() -> None:
    assert "warning  odd" in readable(json.dumps({"event": "odd", "level": "warning", "from": "supervisor"}))


def test_sizes_and_spans_are_written_like_people_do() -> None:
    assert [size(n) for n in (1 << 30, 3 << 29, 512 << 20, 100)] == ["1 GiB", "1.5 GiB", "512 MiB", "100 B"]
    assert [ago(s) for s in (-1, 5, 65, 7200, 200_000)] == ["0 s", "5 s", "1 min", "2 h", "2 d"]
