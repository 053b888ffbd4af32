"""Preloads in a real sandbox: imported before the first session, in sessions that are as confined as any other."""

from __future__ import annotations

import dataclasses

import pytest

from host_client import PreloadFailed, SandboxInterpreter, SandboxSettings
from host_client.providers.docker import DockerProvider
from host_client.providers.docker_engine import DockerEngine
from host_client.runtime_dir import RuntimeDir
from tests.docker.sandboxes import engine, image, leaks, provider, runtime, settings

pytestmark = pytest.mark.docker

__all__ = ["engine", "image", "provider", "runtime", "settings"]

LOOK = """
import sys
[name for name in ("numpy", "pandas") if name in sys.modules]
"""
CONFINED = """
import os
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines() if ":" in line)
def refused(act):
    try:
        act()
    except PermissionError:
        return True
[os.getuid() >= 20000, {status[name].strip() for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16},
 refused(lambda: os.kill(os.getppid(), 0)), refused(lambda: open("/proc/self/oom_score_adj", "w").write("0")),
 refused(lambda: open(f"/proc/{os.getppid()}/mem", "rb"))]
"""


def test_sessions_find_the_preloads_and_are_confined_all_the_same(
    settings: SandboxSettings, runtime: RuntimeDir
) -> None:
    preloading = dataclasses.replace(settings, preload=("numpy", "pandas"))
    with SandboxInterpreter(settings=preloading) as interpreter:
        assert interpreter.execute(LOOK) == ["numpy", "pandas"]
        assert interpreter.execute(CONFINED) == [True] * 5
        total = "import pandas; int(pandas.DataFrame({'a': [1, 1, 2], 'b': [3, 4, 5]}).groupby('a').b.sum().iloc[0])"
        assert interpreter.execute(total) == 7


def test_a_preload_that_is_not_in_the_image_is_named_and_nothing_is_left(
    settings: SandboxSettings, runtime: RuntimeDir, engine: DockerEngine, provider: DockerProvider
) -> None:
    with pytest.raises(PreloadFailed, match="preload 'torch' cannot be imported: ModuleNotFoundError"):
        provider.start(dataclasses.replace(settings, preload=("json", "torch")))
    assert leaks(engine, runtime) == []
