"""The history: what runs did, iteration by iteration, in one SQLite file that ``rlm-sandbox history`` shows.

    from host_client.history import History

    history = History()
    run = history.find(history.runs(limit=1)[0].id)
    for call in history.prompts(run.id):
        print(call.prompt, call.answer)

Recorded by ``observer`` (what DSPy tells) and ``watch`` (what an interpreter tells), written in the background by
``writer``, kept apart from the journal: nothing that runs waits for it, and it may be deleted at any time. What is
kept, for how long, and how to turn it off: ``docs/history.md``.
"""

from __future__ import annotations

from host_client.history.records import CallRow, ExecutionRow, IterationRow, RunRow, WholeRun
from host_client.history.store import History, default_path

__all__ = ["CallRow", "ExecutionRow", "History", "IterationRow", "RunRow", "WholeRun", "default_path"]
