"""Which transport ``auto`` means, and what a wrong choice by hand ends in."""

from __future__ import annotations

from typing import Any

import pytest

from host_client.errors import BadSetting, ProviderError, TransportUnusable
from host_client.providers.docker import DockerProvider
from host_client.providers.fake_engine import FakeContainer, FakeEngine
from host_client.providers.transport_choice import choose_transport
from host_client.runtime_dir import RuntimeDir
from host_client.settings import SandboxSettings
from tests.host_client.provider_fixtures import SETTINGS, engine, left_over, make_provider, provider, runtime

__all__ = ["engine", "provider", "runtime"]

HERE: dict[str, Any] = {"OperatingSystem": "Debian GNU/Linux 12", "KernelVersion": "6.1.0"}
LOCAL = "unix:///var/run/docker.sock"
UNSEEN = "invalid mount config for type bind: bind source path does not exist: /x"


@pytest.mark.parametrize(
    ("url", "info", "expected", "why"),
    [
        (LOCAL, HERE, "socket", "this machine's kernel"),
        (LOCAL, {}, "socket", "this machine's kernel"),
        ("tcp://10.0.0.5:2376", HERE, "exec", "tcp://10.0.0.5:2376"),
        ("ssh://me@far", HERE, "exec", "ssh://me@far"),
        (LOCAL, {**HERE, "OperatingSystem": "Docker Desktop"}, "exec", "virtual machine"),
        ("unix:///home/me/far.sock", {**HERE, "KernelVersion": "5.15.0"}, "exec", "another kernel"),
    ],
)
def test_auto_is_a_socket_where_both_have_one_kernel(url: str, info: dict[str, Any], expected: str, why: str) -> None:
    choice = choose_transport(SandboxSettings(), url, info, kernel="6.1.0")
    assert choice.name == expected
    assert why in choice.why


@pytest.mark.parametrize("name", ["socket", "exec"])
def test_what_was_asked_for_is_what_is_used(name: str) -> None:
    choice = choose_transport(SandboxSettings(transport=name), "tcp://10.0.0.5:2376", HERE, kernel="6.1.0")
    assert (choice.name, choice.forced) == (name, True)


@pytest.mark.parametrize("keywords", [{"transport": "tcp"}, {"transport": "exec", "provider": "bubblewrap"}])
def test_a_transport_that_cannot_be_is_refused_at_once(keywords: dict[str, Any]) -> None:
    with pytest.raises(BadSetting, match="transport"):
        SandboxSettings(**keywords)


def test_an_engine_that_does_not_see_our_files_gets_a_relay(
    provider: DockerProvider, engine: FakeEngine, runtime: RuntimeDir
) -> None:
    engine.failures["create_container"] = [ProviderError(UNSEEN)]
    with pytest.raises(TransportUnusable, match="no relay runs"):  # there are no programs in a fake engine's
        provider.start(SETTINGS)
    assert provider.choose_transport(SETTINGS).name == "exec"
    assert (engine.containers, left_over(runtime)) == ({}, [])


def test_a_socket_by_force_that_the_engine_does_not_see_says_what_helps(
    engine: FakeEngine, provider: DockerProvider, runtime: RuntimeDir
) -> None:
    engine.failures["create_container"] = [ProviderError(UNSEEN)]
    with pytest.raises(TransportUnusable, match="RLM_SANDBOX_TRANSPORT=exec"):
        provider.start(SandboxSettings(image=SETTINGS.image, transport="socket"))
    assert left_over(runtime) == []


def test_a_socket_that_does_not_appear_although_the_broker_serves_says_what_helps(runtime: RuntimeDir) -> None:
    def elsewhere(container: FakeContainer) -> None:
        container.log = '{"event": "serving"}\n'

    engine = FakeEngine(elsewhere)
    with pytest.raises(TransportUnusable, match="RLM_SANDBOX_TRANSPORT=exec"):
        make_provider(engine).start(SandboxSettings(image=engine.image, start_timeout_s=0.2))
    assert (engine.containers, left_over(runtime)) == ({}, [])


def test_a_relayed_container_has_no_mount_and_a_folder_for_the_broker_alone(
    engine: FakeEngine, provider: DockerProvider
) -> None:
    seen: list[dict[str, Any]] = []
    engine.program = lambda container: seen.append(container.keywords)
    with pytest.raises(TransportUnusable):
        provider.start(SandboxSettings(image=SETTINGS.image, transport="exec"))
    [keywords] = seen
    assert keywords["mounts"] == []
    assert "mode=0700" in keywords["tmpfs"]["/run/rlm-sandbox/host"]
