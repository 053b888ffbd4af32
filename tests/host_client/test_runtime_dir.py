"""The runtime directory: where it is, whom it trusts, what it reserves."""

from __future__ import annotations

import itertools
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_client import runtime_dir
from host_client.errors import BadSetting, DiskFull, ProviderError, SetupError
from host_client.owner import Owner
from host_client.runtime_dir import RuntimeDir, locate
from tests.host_client.provider_fixtures import dead_owner


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short one: pytest's own leaves no room for a socket's path."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@pytest.fixture
def runtime(tmp_path: Path) -> RuntimeDir:
    return RuntimeDir(tmp_path / "r")


def test_the_variable_wins_over_every_default(tmp_path: Path) -> None:
    assert locate({"RLM_SANDBOX_RUNTIME_DIR": str(tmp_path), "XDG_RUNTIME_DIR": "/nowhere"}) == tmp_path


def test_the_session_directory_is_used_when_it_is_ours(tmp_path: Path) -> None:
    assert locate({"XDG_RUNTIME_DIR": str(tmp_path)}) == tmp_path / "rlm-sandbox"


def test_a_session_directory_inherited_from_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    assert locate({"XDG_RUNTIME_DIR": str(tmp_path)}) == Path("/tmp/rlm-sandbox-4242")


def test_directories_are_private(runtime: RuntimeDir) -> None:
    made = runtime.create(Owner.current())
    for path in (runtime.path, made.path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert made.path.stat().st_uid == runtime_dir.broker_uid()


def test_a_symlink_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "r").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SetupError, match="symlink"):
        RuntimeDir(tmp_path / "r")


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r").chmod(mode)
    with pytest.raises(SetupError, match="others may write"):
        RuntimeDir(tmp_path / "r")


def test_a_squatted_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(SetupError, match="belongs to uid"):
        RuntimeDir(tmp_path / "r")


def test_a_directory_that_others_may_replace_is_refused(tmp_path: Path) -> None:
    open_parent = tmp_path / "open"
    open_parent.mkdir()
    open_parent.chmod(0o777)
    with pytest.raises(SetupError, match="others may replace it"):
        RuntimeDir(open_parent / "r")
    open_parent.chmod(0o1777)
    RuntimeDir(open_parent / "r")


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="too long"):
        RuntimeDir(tmp_path / ("x" * 100))


def test_a_path_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="cannot be made"):
        RuntimeDir(tmp_path / "file" / "r")


def test_no_two_sandboxes_share_a_uid_under_concurrency(runtime: RuntimeDir) -> None:
    made = []
    threads = [
        threading.Thread(target=lambda: made.extend(runtime.create(Owner.current()) for _ in range(10)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bases = sorted(sandbox.guest_uid_base for sandbox in made)
    assert len(bases) == 80
    assert all(later - earlier >= 128 for earlier, later in itertools.pairwise(bases))
    assert bases[0] >= 20_000
    assert bases[-1] + 128 <= 60_000


def test_no_two_processes_share_a_uid(runtime: RuntimeDir) -> None:
    script = (
        "import sys; from pathlib import Path; from host_client.owner import Owner;"
        "from host_client.runtime_dir import RuntimeDir; r = RuntimeDir(Path(sys.argv[1]));"
        "print(*[r.create(Owner.current()).guest_uid_base for _ in range(20)])"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", script, str(runtime.path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    bases = [base for child in children for base in child.communicate()[0].split()]
    assert len(bases) == len(set(bases)) == 80


def test_exhausted_uids_are_a_typed_error(runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_dir, "SLOTS", 2)
    runtime.create(Owner.current())
    runtime.create(Owner.current())
    with pytest.raises(ProviderError, match="all 2 ranges"):
        runtime.create(Owner.current())


def test_removing_gives_the_uids_back_and_is_idempotent(runtime: RuntimeDir) -> None:
    made = runtime.create(Owner.current())
    (made.path / "host.sock").touch()
    runtime.remove(made.path.name)
    runtime.remove(made.path.name)
    assert not made.path.exists()
    assert list((runtime.path / "uids").iterdir()) == []
    assert runtime.create(Owner.current()).guest_uid_base == made.guest_uid_base


def test_a_failed_creation_leaves_no_reservation(runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, mode: int = 0o777) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(DiskFull, match="no space left"):
        runtime.create(Owner.current())
    assert list((runtime.path / "uids").iterdir()) == []


def test_only_directories_of_dead_processes_are_abandoned(runtime: RuntimeDir) -> None:
    runtime.create(Owner.current())
    orphan = runtime.create(dead_owner())
    (runtime.path / "something-else").mkdir()
    assert runtime.abandoned() == [orphan.path.name]


def test_a_reservation_whose_directory_was_deleted_by_hand_is_found_too(runtime: RuntimeDir) -> None:
    orphan = runtime.create(dead_owner())
    orphan.path.rmdir()
    assert runtime.abandoned() == [orphan.path.name]
    runtime.remove(orphan.path.name)
    assert runtime.abandoned() == []


def test_removal_does_not_follow_a_symlink_left_by_the_sandbox(runtime: RuntimeDir, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    made = runtime.create(Owner.current())
    (made.path / "host.sock").symlink_to(tmp_path / "precious")
    runtime.remove(made.path.name)
    assert (tmp_path / "precious" / "file").exists()
