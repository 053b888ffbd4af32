"""Pools of real containers: fresh for everybody, kept for their session, and gone when the process is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import dspy
import pytest

from host_client import SandboxInterpreter, SandboxPool, SandboxSettings, wait_for_endings
from host_client.providers import container_spec
from host_client.providers.docker import DockerProvider
from host_client.providers.docker_engine import DockerEngine
from host_client.runtime_dir import RuntimeDir
from tests.conformance.dspy_versions import HAS_FACTORY, rlm, writes
from tests.docker.sandboxes import ROOT, engine, image, leaks, provider, runtime, settings

pytestmark = pytest.mark.docker

__all__ = ["engine", "image", "provider", "runtime", "settings"]

Made = dict[str, Any]


@pytest.fixture
def made(
    provider: DockerProvider, settings: SandboxSettings, engine: DockerEngine, runtime: RuntimeDir
) -> Iterator[Made]:
    """What pools of a test are made with; nothing of them is left when they are closed."""
    yield {"provider": provider, "settings": settings}
    assert leaks(engine, runtime) == []


def sandbox_of(interpreter: SandboxInterpreter) -> str:
    assert interpreter.sandbox_handle is not None
    return interpreter.sandbox_handle.sandbox_id


def test_sessions_find_their_variables_and_nobody_else_does(made: Made) -> None:
    with SandboxPool(name="real", min_size=1, max_size=2, affinity="strict_queue", **made) as pool:
        with pool.interpreter(session="a") as one:
            one.execute("x = 41")
        with pool.interpreter() as other:
            assert other.execute("'x' in globals()") is False
        with pool.interpreter(session="a", tools={"add_one": lambda n: n + 1}) as again:
            assert again.execute("add_one(x)") == 42


def test_a_warm_session_has_rehearsed_and_is_as_new_as_one_that_has_not(made: Made) -> None:
    names = "sorted(name for name in globals() if not name.startswith('__'))"
    told = []
    with SandboxPool(name="real", min_size=1, max_size=2, **made) as pool:
        assert pool.prewarm(wait=True)
        for interpreter in (pool.interpreter(), SandboxInterpreter(**made)):
            with interpreter:
                session = interpreter._session
                assert session is not None
                [info] = session.client.sessions()
                lane = session.client._lanes._lane is not None  # type: ignore[attr-defined]
                seen = interpreter.execute(names)
                with pytest.raises(Exception, match="ZeroDivision") as failed:
                    interpreter.execute("1 / 0")
                where = [word for word in str(failed.value).splitlines() if "<execution" in word]
                told.append((lane, info.executions, seen, where))
    (lane, *warm), (no_lane, *cold) = told
    assert (lane, no_lane) == (True, False)
    assert warm == cold
    executions, _, where = warm
    assert executions == 0, "nothing that counts has run"
    assert where, "the traceback names the execution"


def test_a_warm_container_that_was_killed_is_not_handed_out(made: Made, engine: DockerEngine) -> None:
    with SandboxPool(name="real", min_size=2, max_size=2, **made) as pool:
        assert pool.prewarm(wait=True)
        [dead] = [place.sandbox for place in pool._core()._book.places[:1]]
        engine.kill(dead._connected.handle.sandbox_id)  # type: ignore[union-attr]
        with pool.interpreter() as interpreter:
            assert interpreter.execute("1 + 1") == 2
        assert pool.status().counts["ended: died"] == 1


def test_a_warm_container_outlasts_the_time_after_which_orphans_end(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container_spec, "LINGER_S", 0.2)
    settings = SandboxSettings(image=made["settings"].image, secrets={"POOL_TOKEN": "for its session only"})
    with SandboxPool(name="real", min_size=1, settings=settings, provider=made["provider"]) as pool:
        assert pool.prewarm(wait=True)
        [place] = pool._core()._book.places
        handle = place.sandbox._connected.handle  # type: ignore[union-attr]
        # Others come and go meanwhile, for longer than an orphan would have.
        made["provider"].stop(made["provider"].start(settings))
        assert made["provider"].why_dead(handle) is None
        with pool.interpreter() as interpreter:
            assert sandbox_of(interpreter) == handle.sandbox_id
            assert interpreter.execute("import os; os.environ['POOL_TOKEN']") == "[secret POOL_TOKEN]"


def test_a_nested_rlm_gets_a_place_of_its_own_in_a_full_pool(made: Made) -> None:
    with SandboxPool(name="real", min_size=0, max_size=1, wait_timeout_s=60, **made) as pool:
        inner = rlm("q -> answer", pool.factory())

        def ask(question: str) -> str:
            with dspy.context(lm=writes("SUBMIT(q.upper())")):
                return str(inner(q=question).answer)

        outer = rlm("q -> answer", pool.factory(), tools=[ask])
        with dspy.context(lm=writes("SUBMIT(ask(q))")):
            assert outer(q="why").answer == "WHY"
        assert pool.status().counts["overflowed"] == 1
        for program in () if HAS_FACTORY else (inner, outer):
            program._interpreter.shutdown()


#: Ends in various ways with a warm container, or with one that is just being started.
HOST = """
import os, signal, sys
from host_client import SandboxInterpreter, SandboxSettings
factory = SandboxInterpreter.factory(settings=SandboxSettings(image=sys.argv[1], journal=":memory:"))
"""
ENDINGS = {
    "unused": ("pass", 0),
    "called": ("factory()", 0),
    "warm": ("factory.prewarm(wait=True)", 0),
    "used": ("factory().execute('1')", 0),
    "shut down": ("i = factory(); i.execute('1'); i.shutdown()", 0),
    "exception": ("factory.prewarm(wait=True); raise ValueError('boom')", 1),
    "Ctrl-C": ("factory.prewarm(wait=True); signal.raise_signal(signal.SIGINT)", -2),
    "forked child": (
        "factory.prewarm(wait=True)\n"
        "pid = os.fork()\n"
        "if pid == 0: sys.exit(factory().execute('3'))\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3\n"
        "sys.exit(factory().execute('4'))",
        4,
    ),
}


@pytest.mark.parametrize("ending", list(ENDINGS))
def test_what_is_warm_ends_with_the_process(ending: str, image: str, engine: DockerEngine, runtime: RuntimeDir) -> None:
    code, expected = ENDINGS[ending]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    host = subprocess.run(
        [sys.executable, "-c", HOST + code, image], env=environment, capture_output=True, text=True, timeout=120
    )
    assert host.returncode == expected, host.stderr
    assert leaks(engine, runtime) == []


def test_what_a_killed_process_had_warm_is_gone_after_the_next_start(
    made: Made, image: str, engine: DockerEngine, runtime: RuntimeDir
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = HOST + "factory.prewarm(wait=True); os.kill(os.getpid(), signal.SIGKILL)"
    host = subprocess.run([sys.executable, "-c", killed, image], env=environment, capture_output=True, timeout=120)
    assert host.returncode == -9, host.stderr
    assert len(leaks(engine, runtime)) == 3, "container, directory and reservation"
    with SandboxInterpreter(**made) as interpreter:
        [left] = [leak for leak in leaks(engine, runtime) if leak == sandbox_of(interpreter)]
        assert interpreter.execute("1 + 1") == 2
    interpreter.shutdown(wait=True)
    assert left not in leaks(engine, runtime)
    assert wait_for_endings(60)
