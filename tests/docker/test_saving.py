"""Claims about saved sessions where the boundary is real: another container, hostile content, limits."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from host_client import RestoreFailed, SandboxInterpreter, SaveFailed, SessionLost
from host_client.providers.docker import DockerProvider
from host_client.settings import SandboxSettings
from tests.docker.sandboxes import engine, image, provider, runtime, settings
from tests.tools.saved_files import rewrite

__all__ = ["engine", "image", "provider", "runtime", "settings"]

pytestmark = pytest.mark.docker

#: What code would do that gets out: the host's files, its user, its network, its broker.
_ESCAPES = (
    "open('/canary', 'w').write('x')",
    "open('/etc/passwd', 'a').write('x')",
    "os.listdir('/run/rlm-sandbox/host')",
    "os.setuid(0)",
    "socket.create_connection(('1.1.1.1', 53), timeout=1)",
)


class Runs:
    """Runs code where it is unpickled."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (self.code,)


def test_a_session_goes_on_in_another_container(
    provider: DockerProvider, settings: SandboxSettings, tmp_path: Path
) -> None:
    file = tmp_path / "session.saved"
    with SandboxInterpreter(provider=provider, settings=settings) as first:
        first.execute("""
import numpy as np, pandas as pd, dataclasses, os
@dataclasses.dataclass
class Point:
    x: int
    def moved(self): return Point(self.x + step)
step = 1
points = [Point(1), Point(2)]
same = points
frame = pd.DataFrame({"p": [p.x for p in points], "t": ["a", "b"]})
array = np.arange(1_000_000)
big = "naïve " * 2_000_000
home = os.getcwd()
pipe = os.popen("true")
""")
        saved = first.save(file)
        handle = first.sandbox_handle
        assert handle is not None
    assert list(saved.not_saved) == ["pipe"]
    assert saved.python.startswith("3.13.")
    assert {"numpy", "pandas"} <= set(saved.packages)
    with SandboxInterpreter(provider=provider, settings=settings) as second:
        assert second.sandbox_handle is not None
        assert second.sandbox_handle.sandbox_id != handle.sandbox_id
        restored = second.restore(file)
        assert (restored.restored, restored.not_restored) == (saved.saved, {})
        assert restored.not_saved == saved.not_saved
        assert second.execute("""
step = 10
points.append(points[0].moved())
[same[-1].x, isinstance(points[2], Point), frame["p"].tolist(), int(array.sum()), len(big), home != os.getcwd()]
""") == [11, True, [1, 2], 499999500000, 12_000_000, True]
        # What was restored can be saved again, and says the same.
        assert second.save(file, overwrite=True).saved == saved.saved


@pytest.mark.parametrize("way", ["namespace", "file"])
def test_hostile_content_runs_in_the_sandbox_with_the_sessions_rights_or_not_at_all(
    provider: DockerProvider, settings: SandboxSettings, tmp_path: Path, way: str
) -> None:
    file, canary = tmp_path / "session.saved", tmp_path / "canary"
    canary.write_text("unchanged")
    tries = "import os, socket\ndid, uid = [], os.getuid()\n" + "".join(
        f"try:\n    {escape}\n    did.append({escape!r})\nexcept OSError: pass\n"
        for escape in (*_ESCAPES, f"open({str(canary)!r}, 'w').write('x')")
    )
    landed = f"exec({tries!r}, found := {{}}); import builtins; builtins.landed = found"
    with SandboxInterpreter(provider=provider, settings=settings) as interpreter:
        interpreter.execute("value = 1")
        if way == "file":
            interpreter.save(file)
            rewrite(file, lambda header: None, payload=pickle.dumps(Runs(landed)))
            with pytest.raises(RestoreFailed):
                interpreter.restore(file)
            assert interpreter.execute("value") == 1
        else:
            interpreter.execute(f"class Runs:\n    def __reduce__(self): return exec, ({landed!r},)\nruns = Runs()")
            interpreter.save(file)
            assert interpreter.execute("import builtins; hasattr(builtins, 'landed')") is False
            interpreter.restore(file)
        did, uid = interpreter.execute("import builtins; [builtins.landed['did'], builtins.landed['uid']]")
        assert (did, uid) == ([], interpreter.execute("__import__('os').getuid()"))
        assert uid != os.getuid()
    assert canary.read_text() == "unchanged"


def test_a_session_too_large_for_the_sandbox_keeps_its_variables_or_says_that_they_are_gone(
    provider: DockerProvider, settings: SandboxSettings, tmp_path: Path
) -> None:
    import dataclasses

    small = dataclasses.replace(settings, memory=256 << 20)
    with SandboxInterpreter(provider=provider, settings=small) as interpreter:
        interpreter.execute("big = bytearray(150 << 20)")
        with pytest.raises((SaveFailed, SessionLost)) as caught:
            interpreter.save(tmp_path / "session.saved")
        assert "memory" in str(caught.value) or "oom" in str(caught.value)
        if isinstance(caught.value, SaveFailed):
            assert interpreter.execute("len(big)") == 150 << 20
        else:
            with pytest.raises(SessionLost):
                interpreter.execute("big")
    assert os.listdir(tmp_path) == []
