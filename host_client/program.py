"""What this program calls itself towards a broker, so that others can see who holds a session."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

from broker.protocol.holding import MAX_PROGRAM_CHARS
from broker.protocol.messages import HeldBy
from host_client.owner import Owner


def this_program() -> HeldBy:
    """Return the calling process, named after its script."""
    return _program(os.getpid())


def is_gone(held_by: HeldBy) -> bool:
    """Tell whether the program has certainly ended; False where that cannot be seen from here."""
    owner = Owner.parse(held_by.identity)
    return owner is not None and owner.is_dead()


@functools.lru_cache(maxsize=1)
def _program(pid: int) -> HeldBy:
    try:
        identity = Owner.current().label()
    except OSError:  # no /proc: nobody will be able to tell whether it still runs
        identity = ""
    return HeldBy(pid=pid, program=_name(), identity=identity)


def _name() -> str:
    """Return the script's name without its folder, which may tell more than others need to know."""
    script = Path(sys.argv[0] if sys.argv else "")
    name = f"python -m {script.parent.name}" if script.name == "__main__.py" else script.name
    shown = "".join(character if character.isprintable() else "?" for character in name)
    return "python" if shown in ("", "-c", "-") else shown[:MAX_PROGRAM_CHARS]
