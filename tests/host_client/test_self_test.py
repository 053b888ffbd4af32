"""What the host makes of a sandbox's self-test."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from broker.protocol.self_test import Check, Limits, SelfTest
from host_client import doctor
from host_client.errors import MalformedReply, SandboxTooWeak
from host_client.providers import self_test as judging
from host_client.providers.fake_engine import FakeContainer, FakeEngine
from host_client.providers.isolation import Isolation
from host_client.providers.self_test import engine_limits, judged, require
from host_client.runtime_dir import RuntimeDir
from host_client.settings import SandboxSettings
from tests.host_client.provider_fixtures import SETTINGS, engine, make_provider, runtime

__all__ = ["engine", "runtime"]

HELD = Check(name="user", wanted="20000", found="20000", held=True)
OPEN = Check(name="internet sockets", wanted="refused", found="possible", held=False)
FULL = Limits(memory_bytes=1 << 30, swap_bytes=0, pids=2048, cpus=1.0)


ROOT = Path(__file__).parents[2]


def test_the_tests_that_the_document_names_exist() -> None:
    named = set(re.findall(r"`(tests/[^`]+)`", (ROOT / "docs" / "security.md").read_text()))
    assert len(named) >= 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def report(*checks: Check, limits: Limits = FULL) -> Any:
    return SelfTest(checks=checks, limits=limits).to_json()


def failed(reply: Any, settings: SandboxSettings | None = None) -> list[str]:
    settings = settings or SandboxSettings(cpus=1)
    return [check.name for check in judged(reply, settings, Isolation.of(settings)) if not check.held]


def test_a_sandbox_as_strong_as_asked_for_passes() -> None:
    assert failed(report(HELD)) == []


def test_what_the_sandbox_finds_weak_is_weak() -> None:
    assert failed(report(HELD, OPEN)) == ["internet sockets"]


def test_a_report_without_a_check_proves_nothing() -> None:
    assert failed(report()) == ["self-test"]


@pytest.mark.parametrize(
    ("limits", "weak"),
    [
        (Limits(memory_bytes=2 << 30, swap_bytes=0, pids=2048, cpus=1.0), ["memory"]),
        (Limits(memory_bytes=1 << 30, swap_bytes=1 << 30, pids=2048, cpus=1.0), ["swap"]),
        (Limits(memory_bytes=1 << 30, swap_bytes=0, pids=4096, cpus=1.0), ["processes and threads"]),
        (Limits(memory_bytes=1 << 30, swap_bytes=0, pids=2048, cpus=2.0), ["cores"]),
        (Limits(swap_bytes=0), ["memory", "processes and threads", "cores"]),
    ],
)
def test_limits_are_compared_with_the_settings(limits: Limits, weak: list[str]) -> None:
    assert failed(report(HELD, limits=limits)) == weak


@pytest.mark.parametrize(("swap_of_machine", "weak"), [(0, []), (1 << 30, ["swap"])])
def test_swap_that_is_not_limited_is_harmless_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, swap_of_machine: int, weak: list[str]
) -> None:
    monkeypatch.setattr(judging, "_swap_of_machine", lambda: swap_of_machine)
    assert failed(report(HELD, limits=Limits(memory_bytes=1 << 30, pids=2048, cpus=1.0))) == weak
    assert [check.name for check in engine_limits({"SwapLimit": False}) if not check.held] == [
        f"limit of {name}" for name in weak
    ]


def test_the_network_opens_what_it_must_and_nothing_else() -> None:
    io_uring = Check(name="io_uring", wanted="refused", found="possible", held=False)
    assert failed(report(HELD, OPEN, io_uring), SandboxSettings(network=True, cpus=1)) == ["io_uring"]


def test_gvisor_has_a_kernel_of_its_own_but_users_must_hold() -> None:
    settings = SandboxSettings(runtime="runsc", cpus=1)
    user = Check(name="user", wanted="20000", found="0", held=False)
    assert failed(report(HELD, OPEN, limits=Limits()), settings) == []
    assert failed(report(user, OPEN, limits=Limits()), settings) == ["user"]
    other = SandboxSettings(runtime="crun", cpus=1)
    assert "internet sockets" in failed(report(HELD, OPEN), other)


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"checks": {}, "limits": {}},
        {"checks": [{"name": "x"}], "limits": {}},
        {"checks": [{**HELD.to_json(), "held": "yes"}], "limits": {}},
        {"checks": [HELD.to_json()] * 101, "limits": {}},
        {"checks": [{**HELD.to_json(), "found": "x" * 1001}], "limits": {}},
        {"checks": [], "limits": {"memory_bytes": -1}},
        {"checks": [], "limits": {"cpus": "2"}},
    ],
)
def test_nonsense_is_no_self_test(reply: Any) -> None:
    with pytest.raises(MalformedReply):
        judged(reply, SandboxSettings(), Isolation())


def test_the_error_names_every_failed_check_and_carries_all() -> None:
    user = Check(name="user", wanted="20000", found="0", held=False)
    with pytest.raises(
        SandboxTooWeak, match=r"(?s)internet sockets: wanted refused, found possible.*user: wanted"
    ) as e:
        require([HELD, OPEN, user], enforced=True)
    assert e.value.checks == (HELD, OPEN, user)
    assert e.value.code == "sandbox_too_weak"


def test_insecure_uses_it_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        require([HELD, OPEN], enforced=False)
    assert [record.getMessage() for record in caplog.records] == [
        "insecure: internet sockets: wanted refused, found possible"
    ]


def weak(container: FakeContainer) -> None:
    """Run like a sandbox whose filter is missing."""
    container.answer_health({"protocol": 1, **container.self_test("io_uring").to_json()})


def test_a_weak_sandbox_is_refused_and_nothing_is_left(engine: FakeEngine, runtime: RuntimeDir) -> None:
    engine.program = weak
    with pytest.raises(SandboxTooWeak, match="io_uring"):
        make_provider(engine).start(SETTINGS)
    assert engine.containers == {}
    assert [path.name for path in runtime.path.iterdir() if path.name not in ("lock", "uids")] == []


def test_an_engine_that_ignores_a_limit_is_refused_before_anything_is_made(
    engine: FakeEngine, runtime: RuntimeDir
) -> None:
    engine.weaknesses = {"PidsLimit": False}
    engine.failures = {"create_container": [AssertionError("it was made")]}
    with pytest.raises(SandboxTooWeak, match="limit of processes and threads: wanted enforced, found ignored"):
        make_provider(engine).start(SETTINGS)


def lines_of_doctor(engine: FakeEngine, runtime: RuntimeDir) -> tuple[int, str]:
    lines: list[str] = []
    provider = make_provider(engine)
    status = doctor.run(SETTINGS, say=lines.append, connect=engine.connect, provider=provider)
    assert engine.containers == {}, "the sandbox is thrown away"
    return status, "\n".join(lines)


def test_the_doctor_is_content_with_a_strong_sandbox(engine: FakeEngine, runtime: RuntimeDir) -> None:
    status, text = lines_of_doctor(engine, runtime)
    assert status == 0
    assert "WEAK" not in text
    assert "RLM_SANDBOX_RUNTIME=runsc" in text, "what the machine lacks is named"


def test_the_doctor_names_what_is_weak_and_fails(
    engine: FakeEngine, runtime: RuntimeDir, caplog: pytest.LogCaptureFixture
) -> None:
    engine.program = weak
    engine.weaknesses = {"MemoryLimit": False}
    status, text = lines_of_doctor(engine, runtime)
    assert status == 1
    assert "checks do not hold: io_uring, limit of memory." in text
    assert caplog.records == []


@pytest.mark.parametrize(
    ("info", "name", "found"),
    [
        (
            {"SecurityOptions": ["name=seccomp,profile=default", "name=rootless"]},
            "rootless or userns-remap",
            "rootless",
        ),
        ({"SecurityOptions": ["name=userns"]}, "rootless or userns-remap", "userns-remap"),
        ({"SecurityOptions": ["name=apparmor"]}, "AppArmor or SELinux", "apparmor"),
        ({"Runtimes": {"runc": {}, "runsc": {}}}, "gVisor", "as runtime runsc"),
        ({"CgroupVersion": "2"}, "control groups", "version 2"),
    ],
)
def test_what_the_machine_has_costs_nothing(info: dict[str, Any], name: str, found: str) -> None:
    [layer] = [layer for layer in doctor.layers(info, []) if layer.name == name]
    assert (layer.found, layer.costs) == (found, None)
    [without] = [layer for layer in doctor.layers({}, []) if layer.name == name]
    assert without.costs
