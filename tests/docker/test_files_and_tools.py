"""Claims about files, artefacts and tools of the sandbox where the boundary is real."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_client import BadSetting, FileRefused, SandboxInterpreter, tool
from host_client.files import CHUNK_BYTES
from host_client.providers.docker import DockerProvider
from host_client.settings import SandboxSettings
from tests.docker.sandboxes import engine, image, provider, runtime, settings

__all__ = ["engine", "image", "provider", "runtime", "settings"]

pytestmark = pytest.mark.docker


@tool(where="sandbox", requirements=["numpy", "pandas"])
def total(values: list[float]) -> list[float]:
    """Return the sum, and the uid that made it."""
    import os

    import numpy as np

    return [float(np.sum(values)), float(os.getuid())]


@pytest.fixture
def interpreter(provider: DockerProvider, settings: SandboxSettings, tmp_path: Path) -> Iterator[SandboxInterpreter]:
    with SandboxInterpreter(
        tools=[total], provider=provider, settings=settings, artifacts_to=tmp_path / "artifacts"
    ) as made:
        yield made


def test_files_tools_and_artefacts_of_a_container(interpreter: SandboxInterpreter, tmp_path: Path) -> None:
    content = os.urandom(2 * CHUNK_BYTES + 1)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "big").write_bytes(content)
    interpreter.files.put(tmp_path / "data")
    interpreter.execute("import hashlib, os\ndigest = hashlib.sha256(open('data/big', 'rb').read()).hexdigest()")
    interpreter.execute("open('/tmp/out.txt', 'w').write(digest)")
    interpreter.files.get("data", tmp_path / "back")
    assert (tmp_path / "back" / "big").read_bytes() == content
    interpreter.files.get("/tmp/out.txt", tmp_path / "out.txt")
    assert len((tmp_path / "out.txt").read_text()) == 64

    number, uid = interpreter.execute("total([1, 2, 3.5])")
    assert (number, interpreter.execute("os.getuid()")) == (6.5, int(uid))
    assert int(uid) != os.getuid()

    interpreter.execute("import pandas as pd\npd.DataFrame({'a': [1]})")
    assert (tmp_path / "artifacts" / "table-1.csv").read_text() == ",a\n0,1\n"


def test_the_helper_has_the_sessions_rights_and_a_full_disk_has_a_name(
    interpreter: SandboxInterpreter, tmp_path: Path
) -> None:
    interpreter.execute("import os\nos.mkdir('closed', 0o500); os.environ['HOME_BEFORE'] = os.environ['HOME']")
    (tmp_path / "in").write_text("x")
    with pytest.raises(FileRefused, match="Permission denied"):
        interpreter.files.put(tmp_path / "in", "closed/in")
    for home in ("/etc", "/root", "/opt/rlm-sandbox", "/run/rlm-sandbox/host"):
        interpreter.execute(f"os.environ['HOME'] = {home!r}")
        with pytest.raises(FileRefused):
            interpreter.files.put(tmp_path / "in", "in")
    interpreter.execute("os.environ['HOME'] = '/run/rlm-sandbox'")
    with pytest.raises(FileRefused):
        interpreter.files.list("host")
    interpreter.execute("os.environ['HOME'] = os.environ['HOME_BEFORE']")
    interpreter.execute("with open('fill', 'wb') as file:\n    for _ in range(255): file.write(bytes(1 << 20))")
    (tmp_path / "big").write_bytes(bytes(2 << 20))
    with pytest.raises(FileRefused, match="No space left"):
        interpreter.files.put(tmp_path / "big", "big")
    interpreter.execute("os.remove('fill')")
    interpreter.files.put(tmp_path / "big", "big")
    assert sorted(entry.path for entry in interpreter.files.list()) == ["big", "closed"]


def test_a_package_that_the_image_lacks_is_named(provider: DockerProvider, settings: SandboxSettings) -> None:
    wanting = tool(requirements=["matplotlib"], where="sandbox", name="plot")(_plot)
    with (
        SandboxInterpreter(tools=[wanting], provider=provider, settings=settings) as interpreter,
        pytest.raises(BadSetting, match=r"'plot' needs 'matplotlib', and the sandbox's image does not have it"),
    ):
        interpreter.execute("1")


def _plot() -> None:
    """Plot."""
