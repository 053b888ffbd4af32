"""The supervisor's loop: single-threaded, woken by the broker's messages, by signals and by sweeps in progress."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import selectors
import signal
import socket
import sys
import time
from collections.abc import Collection
from typing import Any

from broker.protocol.exits import EXIT_OUT_OF_MEMORY
from broker.protocol.self_test import Check, SelfTest
from broker.supervisor import link, prctl
from broker.supervisor.births import Birth, Copy
from broker.supervisor.config import SupervisorConfig
from broker.supervisor.nursery import Nursery
from broker.supervisor.oom import OomCounter
from broker.supervisor.sweeping import GroupSweeper, NamespaceSweeper, Sweeper, UidSweeper

#: Between two looks at the processes that a sweep has killed. Not on the path of any call.
_SWEEP_STEP_S = 0.005

#: A process that is stuck in the kernel may outlast SIGKILL; then the slot is given up.
SWEEP_LIMIT_S = 10.0

#: How long the broker may take to end in good order.
STOP_LIMIT_S = 2.0


@dataclasses.dataclass(slots=True)
class _Sweep:
    """A sweep in progress: processes first, then (``cleaner`` is the child that does it) files."""

    message_id: int
    give_up_at: float
    cleaner: int | None = None


class Supervisor:
    """Serves one broker.

    Args:
        config: The configuration.
        broker: Our end of the socket pair.
        broker_pid: The broker's pid where it is our child, else None.
        nursery: Where workers come from; started.
    """

    def __init__(
        self,
        config: SupervisorConfig,
        broker: socket.socket,
        broker_pid: int | None,
        nursery: Nursery,
    ) -> None:
        self._config, self._broker, self._broker_pid = config, broker, broker_pid
        self._nursery = nursery
        self._self_tested = False
        self._asked: dict[int, int] = {}  # message id -> slot, of what the zygote has not answered
        self._spawning: set[int] = set()
        self._sweeper = _sweeper(config)
        self._workers: dict[int, int] = {}  # slot -> pid
        self._copies: dict[int, Copy] = {}  # by pid: what was forked from workers, until it has ended
        self._births: set[Birth] = set()
        self._ending: dict[int, int] = {}  # pid -> message id
        self._leaders: dict[int, set[int]] = {}  # slot -> pids of its workers, also of ended ones
        self._sweeps: dict[int, _Sweep] = {}
        self._oom = OomCounter()
        self._status: int | None = None
        self._stop_at: float | None = None
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()

    def run(self) -> int:
        """Serve until the broker ends or SIGTERM comes; return the exit status. Nothing is left afterwards."""
        self._prepare()
        try:
            while self._status is None:
                for key, _ in self._selector.select(self._pause_s()):
                    key.data()
                self._go_on_sweeping()
                if self._stop_at is not None and time.monotonic() >= self._stop_at:
                    self._status = 0
        finally:
            self._end_everything()
        return self._status

    def _prepare(self) -> None:
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # PID 1 gets only signals that it handles
        self._selector.register(self._woken, selectors.EVENT_READ, self._signalled)
        self._selector.register(self._broker, selectors.EVENT_READ, self._message)
        if self._nursery.sock is not None:
            self._selector.register(self._nursery.sock, selectors.EVENT_READ, self._zygote_message)
        self._reap()

    def _pause_s(self) -> float | None:
        if self._sweeps:
            return _SWEEP_STEP_S
        return None if self._stop_at is None else max(0.0, self._stop_at - time.monotonic())

    # Signals.

    def _signalled(self) -> None:
        with contextlib.suppress(BlockingIOError):
            numbers = set(self._woken.recv(4096))
            if numbers & {signal.SIGTERM, signal.SIGINT}:
                self._stop()
        self._reap()

    def _stop(self) -> None:
        if self._stop_at is not None:
            return
        self._stop_at = time.monotonic() + STOP_LIMIT_S
        if self._broker_pid is None:
            self._status = 0
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._broker_pid, signal.SIGTERM)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._ended(pid, status)

    def _ended(self, pid: int, status: int) -> None:
        if pid == self._broker_pid:
            reason = exit_reason(status, oom=_killed(status) and self._oom.rose())
            _say(f"the broker ended: {reason}")
            self._broker_pid = None
            self._status = own_exit_status(status, reason)
            return
        if pid == self._nursery.pid:
            self._nursery.pid = None
            if not (self._sweeps and self._sweeper.takes_zygote):
                _say(f"the zygote ended: {exit_reason(status, oom=False)}")
        for slot, worker in list(self._workers.items()):
            if worker == pid:  # the zygote has ended, and left it to us
                self._worker_ended(slot, pid, status)
        if pid in self._copies:  # ours, because the worker that it was forked from has ended
            self._copy_ended(self._copies[pid], status)
        for slot, sweep in list(self._sweeps.items()):
            if sweep.cleaner == pid:
                self._finish_sweep(slot, clean=True)

    def _worker_ended(self, slot: int, pid: int, status: int) -> None:
        if self._workers.get(slot) == pid:
            del self._workers[slot]
            self._tell_end(slot, pid, status)

    def _look_at(self, copy: Copy) -> None:
        if self._copies.get(copy.pid) is copy:  # not reaped a moment ago
            self._copy_ended(copy, copy.status())

    def _copy_ended(self, copy: Copy, status: int | None) -> None:
        del self._copies[copy.pid]
        self._selector.unregister(copy)
        copy.close()
        self._tell_end(copy.slot, copy.pid, signal.SIGKILL if status is None else status)

    def _tell_end(self, slot: int, pid: int, status: int) -> None:
        reason = exit_reason(status, oom=_killed(status) and self._oom.rose())
        self._tell({"exited": slot, "pid": pid, "reason": reason})
        if pid in self._ending:
            self._gone(slot, pid)

    # Messages.

    def _message(self) -> None:
        received = link.receive(self._broker)
        if received is None:
            self._selector.unregister(self._broker)
            if self._broker_pid is None:  # else its end is about to be reaped, and has a reason
                self._status = 0
            elif self._stop_at is None:
                self._stop()
            return
        message, fds = received
        if message["op"] == "adopt":
            self._adopt(message["id"], message["slot"], fds)
        elif "pid" in message:
            operation = {"signal": self._signal, "end": self._end}[message["op"]]
            operation(message["id"], message["slot"], message["pid"])
        else:
            {"spawn": self._spawn, "sweep": self._sweep}[message["op"]](message["id"], message["slot"])

    def _spawn(self, message_id: int, slot: int) -> None:
        taken = slot in self._workers or slot in self._spawning or slot in self._sweeps
        if taken or not 0 <= slot < self._config.max_sessions:
            self._tell({"re": message_id, "error": f"slot {slot} is not free"})
            return
        try:
            self._ensure_zygote()
        except OSError as error:
            self._tell({"re": message_id, "error": f"fork: {error.strerror}"})
            return
        self._spawning.add(slot)
        self._ask("spawn", message_id, slot)

    def _signal(self, message_id: int, slot: int, pid: int) -> None:
        if pid in self._copies:
            self._copies[pid].signal(signal.SIGINT)
        elif self._nursery.sock is not None and self._workers.get(slot) == pid:
            self._ask("signal", message_id, slot)
            return
        self._tell({"re": message_id})

    def _sweep(self, message_id: int, slot: int) -> None:
        self._sweeps[slot] = _Sweep(message_id, time.monotonic() + SWEEP_LIMIT_S)

    # Copies: forked from a worker by itself.

    def _adopt(self, message_id: int, slot: int, fds: list[int]) -> None:
        birth = Birth(message_id, slot, socket.socket(fileno=fds[0]))
        self._births.add(birth)
        self._selector.register(birth, selectors.EVENT_READ, lambda: self._born(birth))

    def _born(self, birth: Birth) -> None:
        self._selector.unregister(birth)
        self._births.discard(birth)
        newborn = birth.look()
        birth.close()
        if newborn is None:
            answer: dict[str, Any] = {"error": "the copy has ended before it began"}
        elif not self._belongs(newborn.uid, newborn.pid, birth.slot):
            answer = {"error": "another process answered in place of the copy"}
        else:
            answer = self._watched(newborn.pid, birth.slot)
        self._tell({"re": birth.message_id, **answer})

    def _belongs(self, uid: int, pid: int, slot: int) -> bool:
        """Tell whether a process can be a new copy in a slot, for all that the kernel says of it."""
        known = {self._nursery.pid, self._broker_pid, *self._workers.values(), *self._copies}
        return uid == self._user_of(slot) and pid > 1 and pid not in known and slot not in self._sweeps

    def _watched(self, pid: int, slot: int) -> dict[str, Any]:
        try:
            copy = Copy(pid, slot, self._user_of(slot))
        except OSError as error:
            return {"error": f"the copy cannot be watched: {error.strerror}"}
        self._copies[pid] = copy
        self._leaders.setdefault(slot, set()).add(pid)
        self._selector.register(copy, selectors.EVENT_READ, lambda: self._look_at(copy))
        return {"pid": pid}

    def _end(self, message_id: int, slot: int, pid: int) -> None:
        """Kill one worker of several in a slot, and what is left of its process group."""
        self._ending[pid] = message_id
        if pid in self._copies:
            self._copies[pid].signal(signal.SIGKILL)
        elif self._workers.get(slot) != pid:
            self._gone(slot, pid)
            return
        self._kill_group(slot, pid)

    def _gone(self, slot: int, pid: int) -> None:
        self._kill_group(slot, pid)
        self._leaders.get(slot, set()).discard(pid)
        self._tell({"re": self._ending.pop(pid)})

    def _kill_group(self, slot: int, pid: int) -> None:
        """Kill a worker's process group, in the name of its session: the kernel lets that hit no other's."""
        with contextlib.suppress(ProcessLookupError, PermissionError), prctl.acting_as(self._user_of(slot)):
            os.killpg(pid, signal.SIGKILL)

    def _user_of(self, slot: int) -> int:
        return self._config.guest_uid(slot) if self._config.separate_users else os.geteuid()

    # The zygote.

    def _ensure_zygote(self) -> None:
        if self._nursery.sock is None:
            self._selector.register(self._nursery.start(), selectors.EVENT_READ, self._zygote_message)

    def _ask(self, operation: str, message_id: int, slot: int) -> None:
        self._asked[message_id] = slot
        self._nursery.ask({"id": message_id, "op": operation, "slot": slot})

    def _zygote_message(self) -> None:
        sock = self._nursery.sock
        assert sock is not None
        self._selector.unregister(sock)
        received = self._nursery.receive()
        if received is None:
            self._zygote_ended()
            return
        self._selector.register(sock, selectors.EVENT_READ, self._zygote_message)
        message, fds = received
        if "self_test" in message:
            self._tell_self_test(message)
        elif "exited" in message:
            self._worker_ended(message["exited"], message["pid"], message["status"])
        elif "re" in message:
            slot = self._asked.pop(message["re"])
            if "pid" in message:
                self._workers[slot] = message["pid"]
                self._leaders[slot] = {message["pid"]}
            self._spawning.discard(slot)
            self._tell(message, *fds)
            for fd in fds:
                os.close(fd)

    def _zygote_ended(self) -> None:
        loading = self._nursery.loading
        found = f"the preload {loading!r} ended the process" if loading else "it ended while it was started"
        failed = Check(name="self-test", wanted="done", found=found, held=False)
        self._tell_self_test({"self_test": SelfTest(checks=(failed,), preload_error=loading and found).to_json()})
        for message_id in self._asked:
            self._tell({"re": message_id, "error": found})
        self._asked.clear()
        self._spawning.clear()

    def _tell_self_test(self, message: dict[str, Any]) -> None:
        if not self._self_tested:  # what a later zygote says is not the start's
            self._self_tested = True
            self._tell(message)

    # Sweeps.

    def _go_on_sweeping(self) -> None:
        for slot, sweep in list(self._sweeps.items()):
            if time.monotonic() >= sweep.give_up_at:
                _say(f"slot {slot} could not be swept")
                self._finish_sweep(slot, clean=False)
            elif sweep.cleaner is None:
                leaders = self._leaders.get(slot, set())
                self._sweeper.kill(slot, leaders)
                self._reap()
                self._bury_with_zygote(slot, leaders)
                living = slot in self._workers or slot in self._spawning
                living = living or any(copy.slot == slot for copy in self._copies.values())
                if not living and not self._sweeper.anything_left(slot, leaders):
                    self._start_cleaner(slot, sweep)

    def _bury_with_zygote(self, slot: int, leaders: Collection[int]) -> None:
        """Note the end of a worker whose zygote was killed after it had reaped it, and before it could tell."""
        pid = self._workers.get(slot)
        if pid is None or not self._sweeper.takes_zygote or self._nursery.pid is not None:
            return
        if not self._sweeper.anything_left(slot, leaders):
            self._worker_ended(slot, pid, signal.SIGKILL)

    def _start_cleaner(self, slot: int, sweep: _Sweep) -> None:
        with contextlib.suppress(OSError):  # no process to be had: tried again at the next step
            sweep.cleaner = os.fork()
            if sweep.cleaner == 0:
                try:
                    self._sweeper.remove_files(slot)
                finally:
                    os._exit(0)

    def _finish_sweep(self, slot: int, *, clean: bool) -> None:
        sweep = self._sweeps.pop(slot)
        for pid in self._leaders.pop(slot, set()) & self._ending.keys():
            self._tell({"re": self._ending.pop(pid)})
        if not clean and sweep.cleaner is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(sweep.cleaner, signal.SIGKILL)
        self._tell({"re": sweep.message_id, "clean": clean})
        if clean and self._sweeper.takes_zygote:
            with contextlib.suppress(OSError):  # no process to be had: tried again for the next session
                self._ensure_zygote()

    def _end_everything(self) -> None:
        """Leave no process and, outside of a container (whose end takes everything along), no file."""
        if self._broker_pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._broker_pid, signal.SIGKILL)
        self._nursery.kill()
        for slot, leaders in self._leaders.items():
            self._sweeper.kill(slot, leaders)
        if os.getpid() == 1:
            return
        self._wait_for_children(time.monotonic() + STOP_LIMIT_S)
        for slot in self._leaders:
            cleaner = os.fork()
            if cleaner == 0:
                try:
                    self._sweeper.remove_files(slot)
                finally:
                    os._exit(0)
            os.waitpid(cleaner, 0)

    def _wait_for_children(self, give_up_at: float) -> None:
        while time.monotonic() < give_up_at:
            with contextlib.suppress(BlockingIOError):
                self._woken.recv(4096)  # before the look, so that no SIGCHLD after it is missed
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    select.select([self._woken], [], [], max(0.0, give_up_at - time.monotonic()))
            except ChildProcessError:
                return

    def _tell(self, message: dict[str, Any], fd: int | None = None) -> None:
        with contextlib.suppress(OSError):  # a broker that is gone is noticed by its end
            link.send(self._broker, message, fd)


def _sweeper(config: SupervisorConfig) -> Sweeper:
    if config.separate_users:
        return UidSweeper(config)
    return NamespaceSweeper() if config.one_user and os.getpid() == 1 else GroupSweeper()


def exit_reason(status: int, *, oom: bool) -> str:
    """Return why a process ended, as the wire has it: ``oom``, ``killed``, ``crashed(SIGSEGV)`` or ``exited(3)``."""
    if not os.WIFSIGNALED(status):
        return f"exited({os.WEXITSTATUS(status)})"
    if _killed(status):
        return "oom" if oom else "killed"
    number = os.WTERMSIG(status)
    try:
        return f"crashed({signal.Signals(number).name})"
    except ValueError:
        return f"crashed({number})"


def own_exit_status(status: int, reason: str) -> int:
    """Return PID 1's exit status after the broker's end: what a shell gives, so that the engine's reader can tell why.

    The engine notes a kill for lack of memory late or not at all where PID 1 ends with it, and for ever where a session
    was killed earlier: it has a status of its own, and somebody else's SIGKILL is told as SIGTERM.
    """
    if reason == "oom":
        return EXIT_OUT_OF_MEMORY
    if not os.WIFSIGNALED(status):
        return os.WEXITSTATUS(status)
    return 128 + (signal.SIGTERM if reason == "killed" else os.WTERMSIG(status))


def _killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _say(text: str) -> None:
    sys.stderr.write(f'{{"from": "supervisor", "message": "{text}"}}\n')
    sys.stderr.flush()
