"""Starting, finding and stopping sandboxes: nothing is left behind, whatever fails."""

from __future__ import annotations

import gc
import json
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from host_client.errors import (
    BadSetting,
    DiskFull,
    EngineUnavailable,
    ImageMissing,
    ProtocolMismatch,
    ProviderError,
    SandboxError,
    UnknownSandbox,
)
from host_client.providers.base import SandboxHandle
from host_client.providers.docker import DockerProvider
from host_client.providers.fake_engine import FakeContainer, FakeEngine, healthy
from host_client.providers.launch import NameTaken
from host_client.runtime_dir import RuntimeDir
from host_client.settings import SandboxSettings
from tests.host_client.provider_fixtures import SETTINGS, engine, left_over, make_provider, provider, runtime

__all__ = ["engine", "provider", "runtime"]


def test_a_started_sandbox_answers_and_a_stopped_one_leaves_nothing(
    provider: DockerProvider, engine: FakeEngine, runtime: RuntimeDir
) -> None:
    handle = provider.start(SETTINGS)
    assert handle.owned
    assert handle.socket_path.is_socket()
    assert provider.why_dead(handle) is None
    provider.stop(handle)
    assert provider.why_dead(handle) == "removed"
    assert engine.containers == {}
    assert not engine.connected
    assert left_over(runtime) == []


def test_a_provider_whose_sandboxes_are_gone_is_held_by_nothing(engine: FakeEngine, runtime: RuntimeDir) -> None:
    made = make_provider(engine)
    gone = weakref.ref(made)
    handle = made.start(SETTINGS)
    del made
    gc.collect()
    provider = gone()
    assert provider is not None, "the exit of the process has a sandbox to stop"
    provider.stop(handle)
    del provider
    gc.collect()
    assert gone() is None


def test_stopping_twice_or_from_many_threads_is_fine(
    provider: DockerProvider, engine: FakeEngine, runtime: RuntimeDir
) -> None:
    handle = provider.start(SETTINGS)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(provider.stop, [handle] * 8))
    provider.stop(handle)
    assert engine.containers == {}
    assert left_over(runtime) == []


def test_eight_sandboxes_started_at_once_are_eight(
    provider: DockerProvider, engine: FakeEngine, runtime: RuntimeDir
) -> None:
    with ThreadPoolExecutor(8) as pool:
        handles = list(pool.map(lambda _: provider.start(SETTINGS), range(8)))
    assert len({handle.sandbox_id for handle in handles}) == 8
    bases = {json.loads(c.keywords["command"][0])["guest_uid_base"] for c in engine.containers.values()}
    assert len(bases) == 8
    provider.stop_all_owned()
    assert engine.containers == {}
    assert not engine.connected
    assert left_over(runtime) == []


def dies_at_once(container: FakeContainer) -> None:
    container.log = "line one\nImportError: no module named flask\n"
    container.end(1)


def never_answers(container: FakeContainer) -> None:
    container.log = "still loading\n"


def speaks_another_version(container: FakeContainer) -> None:
    container.answer_health({"protocol": 99})


def test_a_sandbox_that_dies_while_it_starts_is_an_error_with_its_last_words(
    provider: DockerProvider, engine: FakeEngine, runtime: RuntimeDir
) -> None:
    engine.program = dies_at_once
    with pytest.raises(ProviderError, match=r"exited\(1\)(.|\n)*ImportError: no module named flask"):
        provider.start(SETTINGS)
    assert engine.containers == {}
    assert left_over(runtime) == []


def test_a_sandbox_that_never_answers_is_given_up_in_time(
    provider: DockerProvider, engine: FakeEngine, runtime: RuntimeDir
) -> None:
    engine.program = never_answers
    with pytest.raises(ProviderError, match=r"did not answer within 0\.05 s(.|\n)*still loading"):
        provider.start(SandboxSettings(image="fake:1", start_timeout_s=0.05))
    assert engine.containers == {}
    assert left_over(runtime) == []


def test_another_protocol_names_both_versions_and_the_command(
    provider: DockerProvider, engine: FakeEngine, runtime: RuntimeDir
) -> None:
    engine.program = speaks_another_version
    with pytest.raises(ProtocolMismatch, match=r"99(.|\n)*1(.|\n)*rlm-sandbox image"):
        provider.start(SETTINGS)
    assert engine.containers == {}
    assert left_over(runtime) == []


@pytest.mark.parametrize("method", ["create_container", "created", "start", "inspect"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), ProviderError("it broke"), DiskFull("full")])
def test_whatever_strikes_during_a_start_leaves_nothing(
    provider: DockerProvider, engine: FakeEngine, runtime: RuntimeDir, method: str, error: BaseException
) -> None:
    engine.failures[method] = [error]
    with pytest.raises(type(error)):
        provider.start(SETTINGS)
    assert engine.containers == {}
    assert not engine.connected
    assert left_over(runtime) == []


def test_a_missing_image_names_the_command(provider: DockerProvider, runtime: RuntimeDir) -> None:
    with pytest.raises(ImageMissing, match="rlm-sandbox image"):
        provider.start(SandboxSettings(image="other:1"))
    assert left_over(runtime) == []


@pytest.mark.parametrize(
    ("refusal", "expected", "words"),
    [
        ("unknown or invalid runtime name: runsc", BadSetting, "does not know this runtime"),
        ("Unknown runtime specified runsc", BadSetting, "RLM_SANDBOX_RUNTIME"),
        ("Range of CPUs is from 0.01 to 2.00", BadSetting, "refuses a limit"),
        ("Minimum memory limit allowed is 6MB", BadSetting, "RLM_SANDBOX_MEMORY"),
        ("something else", ProviderError, "something else"),
    ],
)
def test_what_the_engine_refuses_is_explained(
    provider: DockerProvider, engine: FakeEngine, runtime: RuntimeDir, refusal: str, expected: type, words: str
) -> None:
    engine.failures["create_container"] = [ProviderError(refusal)]
    with pytest.raises(expected, match=words):
        provider.start(SETTINGS)
    assert left_over(runtime) == []


def test_a_named_sandbox_is_found_by_another_provider_and_outlives_its_own(
    provider: DockerProvider, engine: FakeEngine, runtime: RuntimeDir
) -> None:
    started = provider.start(SETTINGS, name="default")
    provider.stop_all_owned()
    other = make_provider(engine)
    assert other.find("default") == started
    other.stop(started)
    assert engine.containers == {}
    assert left_over(runtime) == []
    with pytest.raises(UnknownSandbox, match="rlm-sandbox up default"):
        provider.find("default")


def test_a_name_is_taken_while_its_sandbox_runs_and_free_once_it_ended(
    provider: DockerProvider, engine: FakeEngine, runtime: RuntimeDir
) -> None:
    first = provider.start(SETTINGS, name="default")
    with pytest.raises(NameTaken, match="already running"):
        provider.start(SETTINGS, name="default")
    assert provider.find("default") == first
    engine.containers[first.sandbox_id].end(137)
    with pytest.raises(UnknownSandbox, match="has stopped"):
        provider.find("default")
    second = provider.start(SETTINGS, name="default")
    assert list(engine.containers) == [second.sandbox_id]
    provider.stop(second)
    assert left_over(runtime) == []


def test_ctrl_c_while_a_name_is_refused_does_not_remove_the_one_that_has_it(
    provider: DockerProvider, engine: FakeEngine, runtime: RuntimeDir
) -> None:
    first = provider.start(SETTINGS, name="default")
    engine.failures["create_container"] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        provider.start(SETTINGS, name="default")
    assert provider.find("default") == first


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "x" * 64, "ü"])
def test_impossible_names_are_refused_before_anything_runs(
    provider: DockerProvider, engine: FakeEngine, name: str
) -> None:
    with pytest.raises(BadSetting, match="cannot be the name"):
        provider.start(SETTINGS, name=name)
    assert engine.containers == {}


@pytest.mark.parametrize(
    ("exit_code", "oom", "reason"),
    [
        (137, True, "oom"),
        (137, False, "killed"),
        (143, False, "killed"),
        (139, False, "crashed(SIGSEGV)"),
        (134, False, "crashed(SIGABRT)"),
        (0, False, "exited(0)"),
        (1, True, "exited(1)"),
        (255, False, "exited(255)"),
    ],
)
def test_the_reason_of_a_death_is_told(
    provider: DockerProvider, engine: FakeEngine, exit_code: int, oom: bool, reason: str
) -> None:
    handle = provider.start(SETTINGS)
    engine.containers[handle.sandbox_id].end(exit_code, oom=oom)
    assert provider.why_dead(handle) == reason


def test_an_engine_that_is_gone_is_a_reason_too(provider: DockerProvider, engine: FakeEngine) -> None:
    handle = provider.start(SETTINGS)
    engine.failures["connect"] = [EngineUnavailable("no engine")]
    assert provider.why_dead(handle) == "engine_gone"
    engine.failures["inspect"] = [EngineUnavailable("stopped answering")]
    assert provider.why_dead(handle) == "engine_gone"


def test_what_cannot_be_removed_now_is_kept_for_later(
    provider: DockerProvider, engine: FakeEngine, runtime: RuntimeDir
) -> None:
    handle = provider.start(SETTINGS)
    engine.failures["remove"] = [EngineUnavailable("stopped answering")]
    provider.stop(handle)
    assert handle.socket_path.parent.exists(), "its uids must not be given to another while it may still run"
    provider.stop_all_owned()
    assert engine.containers == {}
    assert left_over(runtime) == []


def test_a_forked_child_leaves_its_parents_sandboxes_alone(
    provider: DockerProvider, engine: FakeEngine, runtime: RuntimeDir
) -> None:
    handle = provider.start(SETTINGS)
    pid = os.fork()
    if pid == 0:
        try:
            provider.stop_all_owned()
            provider.stop(handle)
            os._exit(0 if handle.sandbox_id in engine.containers and handle.socket_path.parent.exists() else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert handle.socket_path.is_socket()


def test_a_forked_child_connects_to_the_engine_anew(provider: DockerProvider, engine: FakeEngine) -> None:
    provider.start(SETTINGS)
    pid = os.fork()
    if pid == 0:
        try:
            before = engine.times_connected
            own = provider.start(SETTINGS)
            connected_anew = engine.times_connected == before + 1
            provider.stop_all_owned()
            os._exit(0 if connected_anew and own.sandbox_id not in engine.containers else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_no_thread_or_descriptor_is_left(provider: DockerProvider, engine: FakeEngine) -> None:
    provider.stop(provider.start(SETTINGS))
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        provider.stop(provider.start(SETTINGS))
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_handle_that_names_a_foreign_directory_removes_nothing(
    provider: DockerProvider, runtime: RuntimeDir, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    provider.stop(SandboxHandle(sandbox_id="x", name="x", socket_path=tmp_path / "mine" / "host.sock", owned=True))
    assert (tmp_path / "mine").exists()


def test_other_systems_are_told_what_works(provider: DockerProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(SandboxError, match="needs Linux"):
        provider.start(SETTINGS)


def test_a_slow_program_is_noticed_when_its_socket_appears(provider: DockerProvider, engine: FakeEngine) -> None:
    created = threading.Event()

    def later(container: FakeContainer) -> None:
        threading.Thread(target=lambda: (created.wait(5), healthy(container))).start()

    engine.program = later
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(provider.start, SETTINGS)
        assert not starting.done()
        created.set()
        assert starting.result(timeout=5).owned
