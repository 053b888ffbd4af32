"""A run as plain JSON, for programs."""

from __future__ import annotations

import dataclasses
import datetime
import json
from typing import Any

from host_client.history.records import Row, RunRow, WholeRun

_JSON = ("inputs", "outputs", "prompt", "answer")


def as_dict(whole: WholeRun) -> dict[str, Any]:
    """Return a run with its iterations, executions and calls; what is kept as JSON is read."""
    return {
        **run_as_dict(whole.run),
        "iteration_list": [_row(row) for row in whole.iterations],
        "execution_list": [_row(row) for row in whole.executions],
        "call_list": [_row(row) for row in whole.calls],
        "nested": [run.id for run in whole.nested],
    }


def run_as_dict(run: RunRow) -> dict[str, Any]:
    """Return a run alone."""
    moment = datetime.datetime.fromtimestamp(run.started_at, datetime.timezone.utc).astimezone()
    return {"time": moment.isoformat(timespec="milliseconds"), **_row(run)}


def _row(row: Row) -> dict[str, Any]:
    values = dataclasses.asdict(row)
    return {name: _read(value) if name in _JSON else value for name, value in values.items() if name != "run_id"}


def _read(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
