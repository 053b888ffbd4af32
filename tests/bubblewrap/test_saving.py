"""Claims about saved sessions without an engine."""

from __future__ import annotations

from pathlib import Path

from host_client import SandboxInterpreter
from host_client.providers.bubblewrap import BubblewrapProvider
from host_client.settings import SandboxSettings

SETTINGS = SandboxSettings(memory=256 << 20, pids=256)


def test_a_session_goes_on_in_another_sandbox(provider: BubblewrapProvider, tmp_path: Path) -> None:
    code = "import numpy\nx, a, g = 1, numpy.arange(5), (n for n in [])\ndef f(): return x + int(a.sum())"
    with SandboxInterpreter(settings=SETTINGS, provider=provider) as first:
        first.execute(code)
        assert first.save(tmp_path / "session.saved").not_saved == {"g": "generator"}
    with SandboxInterpreter(settings=SETTINGS, provider=provider) as second:
        assert second.restore(tmp_path / "session.saved").restored == ("numpy", "x", "a", "f")
        assert second.execute("x = 10\nf()") == 20
