"""As many sessions as one sandbox holds, with the settings that everybody has."""

from __future__ import annotations

import dataclasses

import pytest

from broker.testing import PlaneClient
from host_client.providers.docker import DockerProvider
from host_client.runtime_dir import RuntimeDir
from host_client.settings import SandboxSettings
from tests.docker.sandboxes import engine, image, provider, runtime, settings

pytestmark = pytest.mark.docker

__all__ = ["engine", "image", "provider", "runtime", "settings"]

#: What a session may hold for itself while it does nothing, above what all share.
IDLE_BYTES = 15 << 20

LOOK = """
import re, sys
rollup = open("/proc/self/smaps_rollup").read()
["pandas" in sys.modules, 1024 * sum(int(size) for size in re.findall(r"Private_\\w+: +(\\d+) kB", rollup))]
"""


def test_sixty_four_sessions_run_in_one_sandbox_and_share_what_was_preloaded(
    settings: SandboxSettings, runtime: RuntimeDir, provider: DockerProvider
) -> None:
    handle = provider.start(dataclasses.replace(settings, preload=("numpy", "pandas")), name="many")
    host = PlaneClient(handle.socket_path)
    try:
        sessions = [host.request("POST", "/v1/sessions")[1]["session_id"] for _ in range(64)]
        assert host.request("POST", "/v1/sessions")[1]["error"]["code"] == "too_many_sessions"
        for session in sessions:
            payload = {"execution_id": f"look-{session}", "code": LOOK}
            _, reply, _ = host.request("POST", f"/v1/sessions/{session}/executions?wait_s=20", payload)
            loaded, own_bytes = reply["result"]["value"]
            assert loaded is True
            assert own_bytes < IDLE_BYTES
    finally:
        host.close()
        provider.stop(handle)
