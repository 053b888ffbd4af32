"""The seccomp profile as data: what is in it, how settings change it, and which files are refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from host_client.errors import BadSetting
from host_client.providers.isolation import Isolation
from host_client.seccomp import own_profile
from host_client.settings import SandboxSettings

FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16}

# fmt: off
DENIED = [
    "io_uring_setup", "io_uring_enter", "io_uring_register", "ptrace", "process_vm_readv",
    "process_vm_writev", "pidfd_getfd", "kcmp", "splice", "vmsplice", "tee", "userfaultfd", "bpf",
    "perf_event_open", "keyctl", "add_key", "request_key", "mount", "umount2", "move_mount", "fsopen",
    "fsconfig", "fsmount", "fspick", "open_tree", "mount_setattr", "pivot_root", "chroot", "unshare", "setns",
    "reboot", "kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module",
    "name_to_handle_at", "open_by_handle_at", "quotactl", "quotactl_fd", "acct", "swapon", "swapoff",
    "settimeofday", "adjtimex", "clock_settime", "clock_adjtime", "lookup_dcookie", "shmget", "semget",
    "msgget", "mq_open",
]
# fmt: on


def sent(settings: SandboxSettings) -> dict[str, Any]:
    """The profile that the engine gets."""
    [option] = [
        option for option in Isolation.of(settings).keywords(1)["security_opt"] if option.startswith("seccomp=")
    ]
    profile: dict[str, Any] = json.loads(option.partition("=")[2])
    return profile


def rules(profile: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [rule for rule in profile["syscalls"] if name in rule["names"]]


def socket_families(profile: dict[str, Any]) -> set[int]:
    allowed = [rule for rule in rules(profile, "socket") if rule["action"] == "SCMP_ACT_ALLOW"]
    assert all(rule["args"][0]["op"] == "SCMP_CMP_EQ" and rule["args"][0]["index"] == 0 for rule in allowed)
    return {rule["args"][0]["value"] for rule in allowed}


def test_what_is_not_listed_is_refused() -> None:
    profile = own_profile()
    assert (profile["defaultAction"], profile["defaultErrnoRet"]) == ("SCMP_ACT_ERRNO", 1)


def test_no_system_call_is_both_allowed_and_denied_or_listed_twice_without_arguments() -> None:
    by_name: dict[str, list[dict[str, Any]]] = {}
    for rule in own_profile()["syscalls"]:
        for name in rule["names"]:
            by_name.setdefault(name, []).append(rule)
    for name, found in by_name.items():
        assert len({rule["action"] for rule in found}) == 1, name
        assert len(found) == 1 or all("args" in rule for rule in found), name


def test_only_native_system_calls_of_the_two_architectures() -> None:
    assert own_profile()["archMap"] == [
        {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": []},
        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": []},
    ]


@pytest.mark.parametrize("name", DENIED)
def test_the_dangerous_ones_are_denied_by_name(name: str) -> None:
    [rule] = rules(own_profile(), name)
    assert (rule["action"], rule["errnoRet"]) == ("SCMP_ACT_ERRNO", 1)
    assert rule["comment"]


def test_the_c_library_falls_back_from_clone3() -> None:
    [rule] = rules(own_profile(), "clone3")
    assert (rule["action"], rule["errnoRet"]) == ("SCMP_ACT_ERRNO", 38)


def test_unix_sockets_only_unless_the_network_is_on() -> None:
    assert socket_families(sent(SandboxSettings())) == {FAMILIES["AF_UNIX"]}
    assert socket_families(sent(SandboxSettings(network=True))) == set(FAMILIES.values())
    assert Isolation.of(SandboxSettings()).network == "none"
    assert Isolation.of(SandboxSettings(network=True)).network == "bridge"


def test_the_network_adds_sockets_and_nothing_else() -> None:
    plain, with_network = own_profile(), own_profile(network=True)
    added = Counter(json.dumps(rule) for rule in with_network["syscalls"])
    added -= Counter(json.dumps(rule) for rule in plain["syscalls"])
    assert {name for rule in added for name in json.loads(rule)["names"]} == {"socket"}
    netlink = next(rule for rule in rules(with_network, "socket") if rule["args"][0]["value"] == 16)
    assert netlink["args"][1] == {"index": 2, "value": 0, "op": "SCMP_CMP_EQ"}, "NETLINK_ROUTE only"


def test_input_cannot_be_pushed_into_a_terminal() -> None:
    commands = {rule["args"][0]["value"] for rule in rules(own_profile(), "ioctl")}
    assert commands
    assert all(rule["args"][0]["op"] == "SCMP_CMP_EQ" for rule in rules(own_profile(), "ioctl"))
    assert 0x5412 not in commands


def test_pipes_with_a_name_can_be_made_but_no_devices() -> None:
    for name, index in (("mknod", 1), ("mknodat", 2)):
        [rule] = rules(own_profile(), name)
        assert rule["action"] == "SCMP_ACT_ALLOW"
        [condition] = rule["args"]
        assert condition == {"index": index, "value": 0o170000, "valueTwo": 0o010000, "op": "SCMP_CMP_MASKED_EQ"}


def test_the_engine_gets_nothing_that_is_ours_alone() -> None:
    assert "rlmSandbox" not in sent(SandboxSettings())


def test_a_users_own_profile_replaces_ours(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
    assert sent(SandboxSettings(seccomp=str(file))) == {"defaultAction": "SCMP_ACT_ALLOW"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\udcff", "not JSON"),
        ("[]", "no seccomp profile"),
        ('{"syscalls": []}', "no seccomp profile"),
        ('{"defaultAction": "SCMP_ACT_ALLOW", "x": "' + "x" * (1 << 20) + '"}', "not JSON"),
    ],
)
def test_a_profile_that_cannot_be_used_is_named_before_anything_starts(
    tmp_path: Path, content: str | None, told: str
) -> None:
    file = tmp_path / "p.json"
    if content is not None:
        file.write_text(content, errors="surrogateescape")
    with pytest.raises(BadSetting, match=f"(?s)setting seccomp=.*{told}"):
        Isolation.of(SandboxSettings(seccomp=str(file)))


def test_a_folder_is_no_profile(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="cannot be read"):
        Isolation.of(SandboxSettings(seccomp=str(tmp_path)))
