"""Reading the control group's limits, in both versions of its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.protocol.self_test import Limits
from broker.supervisor.control_group import read_limits
from broker.supervisor.proc_status import capability_names, has_no_capabilities

V2 = {"memory.max": "1073741824", "memory.swap.max": "0", "pids.max": "300", "cpu.max": "150000 100000"}
V1 = {
    "memory/memory.limit_in_bytes": "1073741824",
    "memory/memory.memsw.limit_in_bytes": "1073741824",
    "pids/pids.max": "300",
    "cpu/cpu.cfs_quota_us": "150000",
    "cpu/cpu.cfs_period_us": "100000",
}
LIMITED = Limits(memory_bytes=1 << 30, swap_bytes=0, pids=300, cpus=1.5)


def files(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


@pytest.mark.parametrize("contents", [V2, V1], ids=["v2", "v1"])
def test_limits_are_read(tmp_path: Path, contents: dict[str, str]) -> None:
    assert read_limits(files(tmp_path, contents)) == LIMITED


@pytest.mark.parametrize(
    "contents",
    [
        {"memory.max": "max", "memory.swap.max": "max", "pids.max": "max", "cpu.max": "max 100000"},
        {
            "memory/memory.limit_in_bytes": str((1 << 63) - 4096),
            "memory/memory.memsw.limit_in_bytes": str((1 << 63) - 4096),
            "pids/pids.max": "max",
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
        },
        {},
    ],
    ids=["v2", "v1", "nothing there"],
)
def test_no_limit_is_none(tmp_path: Path, contents: dict[str, str]) -> None:
    assert read_limits(files(tmp_path, contents)) == Limits()


def test_swap_beside_memory_is_told_apart_from_both_together(tmp_path: Path) -> None:
    more = {**V1, "memory/memory.memsw.limit_in_bytes": str(3 << 30)}
    assert read_limits(files(tmp_path, more)).swap_bytes == 2 << 30
    without_accounting = {name: text for name, text in V1.items() if "memsw" not in name}
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    assert read_limits(files(fresh, without_accounting)).swap_bytes is None


def test_capabilities_have_names_and_every_set_counts() -> None:
    assert capability_names("00000000000001e0") == ["KILL", "SETGID", "SETUID", "SETPCAP"]
    assert capability_names("2000") == ["13"]
    assert has_no_capabilities({"CapBnd": "0", "CapEff": "0"}) == (True, "none")
    assert has_no_capabilities({"CapBnd": "20", "CapAmb": "2000"}) == (False, "CapBnd KILL; CapAmb 13")
