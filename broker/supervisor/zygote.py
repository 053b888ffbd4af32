"""The zygote: the process that workers are forked from. It has their modules, and the preloads, imported already.

A child of PID 1, so that no package of the image runs in there. It has PID 1's capabilities but KILL, reads nothing
that generated code sends, and ends with PID 1; its workers end with it. See ``docs/decisions/014-zygote.md``.

The messages, as in ``link``::

    PID 1 → zygote   {"id": 7, "op": "spawn",  "slot": 3}
                     {"id": 8, "op": "signal", "slot": 3}
    zygote → PID 1   {"loading": "pandas"}       what is being imported
                     {"self_test": {...}}        once, when everything is loaded
                     {"re": 7, "pid": 41} with the worker's channel attached, or {"re": 7, "error": "..."}
                     {"re": 8}
                     {"exited": 3, "pid": 41, "status": 9}
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
from typing import Any, NoReturn

from broker.protocol.self_test import SelfTest
from broker.supervisor import confinement, link, prctl
from broker.supervisor.config import SupervisorConfig
from broker.supervisor.landlock import Ruleset
from broker.supervisor.preloading import PreloadError, preload
from broker.supervisor.self_test import run_self_test
from broker.supervisor.worker_child import close_descriptors, own_environment, run_worker


def run_zygote(
    config: SupervisorConfig, supervisor: socket.socket, broker_pid: int | None, *, self_test: bool
) -> NoReturn:
    """Turn this process, forked from PID 1, into the zygote; never returns.

    Args:
        config: The supervisor's.
        supervisor: Leads to PID 1; every other descriptor is closed.
        broker_pid: For the self-test, or None where the broker is in another pid namespace.
        self_test: Whether to look at the boundary first.
    """
    status = 1
    try:
        # Nobody's garbage yet: looking for it would only unshare pages.
        gc.disable()
        _prepare(config, supervisor)
        zygote = Zygote(config, supervisor)
        zygote.load(broker_pid, self_test=self_test)
        zygote.serve()
        status = 0
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(2, f"zygote: {type(error).__name__}: {error}\n".encode("utf-8", "replace"))
    finally:
        os._exit(status)


def _prepare(config: SupervisorConfig, supervisor: socket.socket) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # PID 1 says when it is over
    close_descriptors({supervisor.fileno()})
    os.setsid()
    os.umask(0o077)
    importlib.import_module("broker.worker.main")  # the workers inherit it
    if config.separate_users:
        prctl.keep_capabilities({prctl.CAP_SETGID, prctl.CAP_SETUID, prctl.CAP_SETPCAP})
    prctl.set_no_new_privileges()
    prctl.set_parent_death_signal(signal.SIGKILL)


class Zygote:
    """Forks, interrupts and reaps workers.

    Args:
        config: The supervisor's.
        supervisor: Leads to PID 1.
    """

    def __init__(self, config: SupervisorConfig, supervisor: socket.socket) -> None:
        self._config, self._supervisor = config, supervisor
        self._supervisor_pid = os.getppid()
        self._ruleset: Ruleset | None = confinement.for_workers(config)
        self._workers: dict[int, int] = {}  # slot -> pid, until it is reaped
        self._failure: str | None = None
        self._woken, self._waker = socket.socketpair()

    def load(self, broker_pid: int | None, *, self_test: bool) -> None:
        """Look at the boundary, then import the preloads, and tell PID 1 what came of both.

        Args:
            broker_pid: For the self-test, or None where the broker is in another pid namespace.
            self_test: Whether to look at all.
        """
        found = SelfTest()
        if self_test:
            found = run_self_test(self._config, broker_pid, self._ruleset)
        own_environment(self._config, home="/")
        if self._config.guest_site is not None:
            sys.path.append(self._config.guest_site)
        try:
            preload(self._config.preload, lambda name: self._tell({"loading": name}))
        except PreloadError as error:
            self._failure = f"the preload {error}"
        gc.collect()
        gc.freeze()  # what is loaded now stays shared with the workers
        self._tell({"self_test": dataclasses.replace(found, preload_error=self._failure).to_json()})

    def serve(self) -> None:
        """Serve until PID 1 is gone."""
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            selector.register(self._supervisor, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if self._woken in ready:
                    self._reap()
                if self._supervisor in ready and not self._message():
                    return

    def _message(self) -> bool:
        received = link.receive(self._supervisor)
        if received is None:
            return False
        message, _ = received
        operation = {"spawn": self._spawn, "signal": self._signal}[message["op"]]
        operation(message["id"], message["slot"])
        return True

    def _spawn(self, message_id: int, slot: int) -> None:
        if self._failure is not None:
            self._tell({"re": message_id, "error": self._failure})
            return
        ours, theirs = socket.socketpair()
        with ours, theirs:
            own_pid = os.getpid()
            try:
                pid = os.fork()
            except OSError as error:
                self._tell({"re": message_id, "error": f"fork: {error.strerror}"})
                return
            if pid == 0:
                run_worker(
                    self._config,
                    slot,
                    theirs.fileno(),
                    self._ruleset,
                    parent_pid=own_pid,
                    supervisor_pid=self._supervisor_pid,
                )
            self._workers[slot] = pid
            self._tell({"re": message_id, "pid": pid}, fd=ours.fileno())

    def _signal(self, message_id: int, slot: int) -> None:
        pid = self._workers.get(slot)  # not reaped yet, so the pid is still its own
        if pid is not None:
            # As the session, not as root: it needs no capability, and can hit nobody else.
            uid = self._config.guest_uid(slot) if self._config.separate_users else os.geteuid()
            with contextlib.suppress(ProcessLookupError, PermissionError), prctl.acting_as(uid):
                os.kill(pid, signal.SIGINT)
        self._tell({"re": message_id})

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
                self._ended(*ended)

    def _ended(self, pid: int, status: int) -> None:
        for slot, worker in list(self._workers.items()):
            if worker == pid:
                del self._workers[slot]
                self._tell({"exited": slot, "pid": pid, "status": status})

    def _tell(self, message: dict[str, Any], fd: int | None = None) -> None:
        with contextlib.suppress(OSError):  # PID 1 is gone: the next message says so
            link.send(self._supervisor, message, fd)
