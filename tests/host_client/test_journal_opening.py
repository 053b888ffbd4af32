"""Claims about opening one journal from many places at once."""

from __future__ import annotations

import threading
from pathlib import Path

from host_client.journal import SqliteJournal


def test_a_new_journal_opened_by_many_at_once_opens_for_all(tmp_path: Path) -> None:
    failures: list[Exception] = []

    def open_it(path: Path, together: threading.Barrier) -> None:
        together.wait(30)
        try:
            SqliteJournal(path).close()
        except Exception as error:
            failures.append(error)

    for number in range(15):
        together = threading.Barrier(12)
        openers = [
            threading.Thread(target=open_it, args=(tmp_path / f"{number}.sqlite3", together))
            for _ in range(together.parties)
        ]
        for opener in openers:
            opener.start()
        for opener in openers:
            opener.join()
    assert failures == []
