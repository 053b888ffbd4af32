"""Code that does not end, ends too early, or goes on after its end."""

from __future__ import annotations

from tests.adversarial.attack import Attack

_RESOURCES, _LIFECYCLE = "resources", "lifecycle"


def _loops(name: str, code: str) -> Attack:
    """Something that does not stop: interrupted or killed in time."""
    return Attack(
        name=name, family=_RESOURCES, code=code, deadline_s=1.0, expects="ALIVE|DEAD HOST", reasons=("deadline",)
    )  # fmt: skip


def _dies(name: str, code: str, *reasons: str, deadline_s: float = 5.0) -> Attack:
    return Attack(
        name=name, family=_LIFECYCLE, code=code, deadline_s=deadline_s, expects="DEAD HOST", reasons=reasons
    )  # fmt: skip


_LOOPS = [
    _loops("loop: in Python", "while True: pass"),
    _loops("loop: in C with the lock held", "7 ** 10 ** 8"),
    _loops("loop: a long product of digits", "str(3 ** 5_000_000) if not sys.set_int_max_str_digits(0) else 0"),
    _loops("loop: a catastrophic pattern", "import re\nre.match('(a|a)*$', 'a' * 40 + 'b')"),
    _loops("loop: sum of a range without end", "import itertools\nsum(itertools.repeat(1))"),
    _loops("loop: interrupts ignored", "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"),
    _loops("loop: interrupts blocked", "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass"),
    _loops("loop: every exception caught", "while True:\n try:\n  while True: pass\n except BaseException: pass"),
    _loops("loop: in a finally", "try:\n while True: pass\nfinally:\n while True: pass"),
    _loops("loop: a process that stops itself", "os.kill(os.getpid(), 19)"),
    _loops("loop: waiting for a child that never ends", "subprocess.run(['sleep', '1000'])"),
    _loops("loop: a display that never ends", "class R:\n def __repr__(self):\n  while True: pass\nR()"),
    _loops("loop: an error's text that never ends", "class E(Exception):\n def __str__(self):\n  while True: pass\nraise E"),
    _loops("loop: a destructor that never ends", "class D:\n def __del__(self):\n  while True: pass\nD()"),
    _loops("loop: tracing that never ends", "def t(*a):\n while True: pass\nsys.settrace(t)\n(lambda: 1)()"),
]  # fmt: skip

_DEATHS = [
    _dies("death: os._exit(0)", "os._exit(0)", "exited(0)"),
    _dies("death: os._exit(77)", "os._exit(77)", "exited(77)"),
    _dies("death: a null pointer", "ctypes.string_at(0)", "crashed(SIGSEGV)"),
    _dies("death: abort", "os.abort()", "crashed(SIGABRT)"),
    _dies("death: SIGKILL by itself", "os.kill(os.getpid(), 9)", "killed"),
    _dies("death: SIGTERM by itself", "os.kill(os.getpid(), 15)", "crashed(SIGTERM)"),
    _dies("death: exec of an impostor that is silent", "os.execv('/bin/sleep', ['sleep', '30'])", "protocol", "deadline", "exited(0)", deadline_s=2.0),
    _dies("death: an impostor on the channel", """
fd = channel_fd(); os.set_inheritable(fd, True)
impostor = f'import os, time; os.write({fd}, b"HTTP/1.1 200 OK\\\\r\\\\n\\\\r\\\\n"); time.sleep(30)'
os.execv(sys.executable, [sys.executable, '-c', impostor])""", "protocol"),
    _dies("death: the channel closed", "os.close(channel_fd())\nthreading.Event().wait(3)", "protocol", "exited(1)", "exited(0)", "exited(70)"),
    _dies("death: every descriptor closed", "os.closerange(0, 4096)", "protocol", "exited(1)", "exited(0)", "exited(70)", "killed"),
    Attack(name="death: a stack without end", family=_LIFECYCLE, code="sys.setrecursionlimit(10**9)\ndef f(): return f()\nf()", expects="ALIVE|DEAD HOST", reasons=("crashed(SIGSEGV)", "oom", "deadline"), deadline_s=6.0),
    Attack(name="death: in the middle of a tool call", family=_LIFECYCLE, code="threading.Timer(0.2, os._exit, [3]).start()\nhang()", expects="DEAD COUNT=1 HOST", reasons=("exited(3)",)),
    Attack(name="death: the worker's modules taken apart", family=_LIFECYCLE, code="for m in list(sys.modules.values()):\n if getattr(m, '__name__', '').startswith('broker'): m.__dict__.clear()", expects="ALIVE|DEAD HOST", reasons=("exited(1)", "exited(70)", "protocol", "crashed(SIGSEGV)", "deadline"), deadline_s=3.0),
    Attack(name="death: builtins taken away", family=_LIFECYCLE, code="import builtins\nbuiltins.__dict__.clear()", expects="ALIVE|DEAD HOST", reasons=("exited(1)", "exited(70)", "protocol", "crashed(SIGSEGV)", "deadline"), deadline_s=3.0),
    Attack(name="death: the machine for frames replaced", family=_LIFECYCLE, code="json.JSONEncoder.encode = lambda *a: '{'\njson.JSONEncoder.iterencode = lambda *a: '{'", expects="ALIVE|DEAD HOST", reasons=("protocol", "exited(1)", "exited(70)", "deadline"), deadline_s=3.0),
]  # fmt: skip

_LEFTOVERS = [
    Attack(
        name="left over: a thread that prints and calls tools",
        family=_LIFECYCLE,
        code="""
own = execution_id()
def go_on():
    statuses.append(forged_call('tally', execution=own, wait_s=0)[0])
    with contextlib.suppress(Exception): print('late')
    with contextlib.suppress(OSError): os.write(1, b'late')
    with contextlib.suppress(Exception): tally('late')
    done.set()
statuses, done, go = [], threading.Event(), threading.Event()
threading.Thread(target=lambda: (go.wait(), go_on()), daemon=True).start()""",
        expects="ALIVE COUNT=0",
        then="go.set()\ndone.wait(5) and statuses == [409]",
    ),
    Attack(
        name="left over: a daemon that prints and calls tools",
        family=_LIFECYCLE,
        code="""
own, (waits, wakes), (reads, says) = execution_id(), os.pipe(), os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork(): os._exit(0)
    os.read(waits, 1)
    with contextlib.suppress(OSError): os.write(1, b'late')
    status = forged_call('tally', execution=own, wait_s=0)[0]
    os.write(says, str(status).encode())
    os._exit(0)""",
        expects="ALIVE COUNT=0",
        then="os.write(wakes, b'x')\nos.read(reads, 10) == b'409'",
    ),
    Attack(
        name="left over: a child that answers for its parent",
        family=_LIFECYCLE,
        code="os.fork()\nos.getpid()\n'both'",
        expects="VALUE ALIVE",
        value="both",
    ),
    Attack(
        name="left over: something that asks for the end of the interpreter",
        family=_LIFECYCLE,
        code="import atexit\natexit.register(lambda: [None for _ in iter(int, 1)])\nraise SystemExit(3)",
        expects="ERROR ALIVE",
        error="does not end the session",
    ),
]

ATTACKS = [*_LOOPS, *_DEATHS, *_LEFTOVERS]
