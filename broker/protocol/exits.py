"""How a sandbox's first process tells by its exit status what became of the broker."""

from __future__ import annotations

#: The kernel killed the broker for lack of memory. Otherwise the status is the broker's own, or 128 and its signal.
EXIT_OUT_OF_MEMORY = 111
