"""What a container is given: the whole policy, read back from the keywords."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from broker.supervisor.config import SupervisorConfig
from host_client.errors import BadSetting
from host_client.providers.container_spec import ContainerSpec
from host_client.providers.isolation import Isolation
from host_client.settings import SandboxSettings


def spec(*, owned: bool = True, **settings: Any) -> ContainerSpec:
    return ContainerSpec(
        settings=SandboxSettings(**settings),
        isolation=Isolation.of(SandboxSettings(**settings)),
        image="rlm-sandbox:abc",
        name="default",
        owned=owned,
        owner="boot:1:2:3",
        directory=Path("/run/x"),
        guest_uid_base=20_128,
        broker_uid=1000,
        created="2026-01-01T00:00:00+00:00",
    )


def test_the_supervisor_reads_its_configuration() -> None:
    [text] = spec(environment={"LANG": "C"}, max_sessions=64).keywords()["command"]
    config = SupervisorConfig.from_json(text)
    assert (config.broker_uid, config.guest_uid_base, config.max_sessions) == (1000, 20_128, 64)
    assert config.environment == {"LANG": "C"}
    assert config.sweeper_uid(63) < 20_128 + 128, "the uids reserved suffice for the most sessions"


def test_an_owned_sandbox_ends_itself_and_a_named_one_does_not() -> None:
    assert spec().supervisor_config()["linger_s"] == 60
    assert spec(owned=False).supervisor_config()["linger_s"] is None


def test_no_network_no_capabilities_but_four_no_new_privileges_read_only_root() -> None:
    keywords = spec().keywords()
    assert keywords["network_mode"] == "none"
    assert keywords["cap_drop"] == ["ALL"]
    assert keywords["cap_add"] == ["SETUID", "SETGID", "KILL", "SETPCAP"]
    assert "no-new-privileges:true" in keywords["security_opt"]
    assert keywords["read_only"] is True
    assert keywords["ipc_mode"] == "private"
    assert keywords["host_config"]["CgroupnsMode"] == "private"


def test_the_only_mount_is_the_sockets_directory() -> None:
    keywords = spec().keywords()
    assert [(m["Source"], m["Target"]) for m in keywords["mounts"]] == [("/run/x", "/run/rlm-sandbox/host")]
    assert not {"volumes", "binds", "devices", "volumes_from"} & set(keywords)


def test_nothing_of_the_hosts_environment_goes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    keywords = spec().keywords()
    assert "environment" not in keywords
    assert "sk-canary" not in json.dumps(keywords)


def test_memory_has_no_swap_beside_it_and_tmpfs_is_bounded_in_size_and_inodes() -> None:
    keywords = spec(memory="512m", tmpfs="64m").keywords()
    assert keywords["mem_limit"] == keywords["memswap_limit"] == 512 << 20
    assert "size=67108864,nr_inodes=16384" in keywords["tmpfs"]["/tmp"]
    assert keywords["tmpfs"]["/run/rlm-sandbox/guest"].endswith("mode=0711,uid=1000,gid=1000")


def test_more_cores_than_there_are_is_no_error() -> None:
    assert spec(cpus=1024).keywords()["nano_cpus"] == (os.cpu_count() or 0) * 10**9


def test_sessions_cannot_take_the_last_processes_from_the_broker() -> None:
    assert spec(pids=256).supervisor_config()["nproc"] < 256


def test_named_containers_of_two_users_do_not_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    mine = spec(owned=False).container_name
    monkeypatch.setattr(os, "geteuid", lambda: 1001)
    assert spec(owned=False).container_name != mine


def test_preloads_reach_the_supervisor_and_must_be_names_of_modules() -> None:
    [text] = spec(preload=("numpy", "os.path")).keywords()["command"]
    assert SupervisorConfig.from_json(text).preload == ("numpy", "os.path")
    assert SandboxSettings.from_environment({"RLM_SANDBOX_PRELOAD": "numpy, pandas"}).preload == ("numpy", "pandas")
    for wrong in (("numpy; import os",), ("",), "numpy", ("a-b",)):
        with pytest.raises(BadSetting, match="preload"):
            SandboxSettings(preload=wrong)  # type: ignore[arg-type]
