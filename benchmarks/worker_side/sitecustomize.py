"""Python imports this by its name when it starts, where this folder is on its path: each fork of it counts its calls.

The workers of ``broker.testing.InProcessBroker`` are such forks; ``counting.py`` asks them through generated code.
"""

from __future__ import annotations

import os

from benchmarks.counter import Counter

COUNTER = Counter("worker")
os.register_at_fork(after_in_child=COUNTER.start)
