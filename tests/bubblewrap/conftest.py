from __future__ import annotations

from tests.bubblewrap.sandboxes import provider, ready, runtime

__all__ = ["provider", "ready", "runtime"]
