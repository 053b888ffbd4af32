"""Privileged facilities of the kernel, asked for in earnest: with arguments that work where nobody forbids it.

``tests/docker/test_seccomp.py`` goes through the whole list of calls.
"""

from __future__ import annotations

from tests.adversarial.attack import Attack, denied

_FAMILY = "privileged calls"
_BUFFER = "buffer = ctypes.create_string_buffer(256)"
_PAIR = "import itertools\na, b = os.pipe(); c, d = os.pipe(); os.write(b, b'x')"

ATTACKS = [
    denied(
        "a user namespace",
        _FAMILY,
        "child()",
        falls=True,
        setup="""
def child():
    'In a child: who enters it, stays in it.'
    status = in_child(lambda: call(272, 97, 0x10000000))
    if status: raise OSError(errno.EPERM, '')
""",
    ),
    denied(
        "a mount in a namespace of one's own",
        _FAMILY,
        "child()",
        setup="""
def mount():
    call(272, 97, 0x10020000)
    call(165, 40, b'tmpfs', b'/tmp', b'tmpfs', 0, 0)
def child():
    status = in_child(mount)
    if status: raise OSError(errno.EPERM, '')
""",
    ),
    denied("a mount", _FAMILY, "call(165, 40, b'tmpfs', b'/tmp', b'tmpfs', 0, 0)"),
    denied("remounting the root", _FAMILY, "call(165, 40, b'none', b'/', b'none', 0x1020, 0)"),
    denied("unmounting /proc's covers", _FAMILY, "call(166, 39, b'/proc/keys', 2)"),
    denied("another root", _FAMILY, "os.chroot('/tmp')"),
    denied("the namespaces of PID 1", _FAMILY, "call(308, 268, os.open('/proc/1/ns/mnt', 0), 0)"),
    denied("root", _FAMILY, "os.setresuid(0, 0, 0)"),
    denied("groups", _FAMILY, "os.setgroups([0])"),
    denied(
        "capabilities",
        _FAMILY,
        "call(126, 91, header, wanted)",
        setup="""
header = (ctypes.c_uint * 2)(0x20080522, 0)
wanted = (ctypes.c_uint * 6)(*[0xffffffff] * 6)
""",
    ),
    denied("higher priority", _FAMILY, "os.setpriority(os.PRIO_PROCESS, 0, -20)"),
    denied("real time", _FAMILY, "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"),
    denied(
        "more processes",
        _FAMILY,
        "lift()",
        setup="""
import resource
def lift():
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if hard == resource.RLIM_INFINITY: return
    try: resource.setrlimit(resource.RLIMIT_NPROC, (hard + 1, hard + 1))
    except ValueError: raise OSError(errno.EPERM, '')
""",
    ),
    denied(
        "ptrace of oneself by a child",
        _FAMILY,
        "child()",
        setup="""
def child():
    if in_child(lambda: call(101, 117, 0, 0, 0, 0)): raise OSError(errno.EPERM, '')
""",
        falls=True,
    ),
    denied("faults handled by the user", _FAMILY, "call(323, 282, 1)", falls=True),
    denied("a key in the kernel's ring", _FAMILY, "call(248, 217, b'user', b'canary', b'x', 1, -3)", falls=True),
    denied("reading the kernel's ring of keys", _FAMILY, "call(250, 219, 0, -3, 1)", falls=True),
    denied("comparing processes", _FAMILY, "call(312, 272, os.getpid(), os.getpid(), 0, 0, 0)", falls=True),
    denied("eBPF", _FAMILY, "call(321, 280, 0, buffer, 72)", setup=_BUFFER),
    denied("performance events", _FAMILY, "call(298, 241, buffer, 0, -1, -1, 0)", setup=_BUFFER),
    denied("io_uring", _FAMILY, "call(425, 425, 8, buffer)", setup=_BUFFER, falls=True),
    denied("memory that the kernel cannot see", _FAMILY, "call(447, 447, 0)"),
    denied("splice", _FAMILY, "call(275, 76, a, 0, d, 0, 1, 0)", setup=_PAIR, falls=True),
    denied("tee", _FAMILY, "call(276, 77, a, d, 1, 0)", setup=_PAIR, falls=True),
    denied("shared memory of System V", _FAMILY, "call(29, 194, 0, 4096, 0o1600)", falls=True),
    denied("a queue of messages", _FAMILY, "call(68, 186, 0, 0o1600)", falls=True),
    denied("semaphores", _FAMILY, "call(64, 190, 0, 1, 0o1600)", falls=True),
    denied("the kernel's log", _FAMILY, "call(103, 116, 3, buffer, 100)", setup=_BUFFER),
    denied("no randomness of addresses", _FAMILY, "call(135, 92, 0x0040000)", falls=True),
    denied("the clock", _FAMILY, "time.clock_settime(time.CLOCK_REALTIME, time.time())"),
    denied("the host's name", _FAMILY, "socket.sethostname('canary')"),
    denied("a reboot", _FAMILY, "call(169, 142, 0xfee1dead, 672274793, 0, 0)"),
    denied("clone3", _FAMILY, "call(435, 435, (ctypes.c_ulong * 8)(0x10000000), 64)"),
    Attack(
        name="a filter of one's own takes no protection away",
        family=_FAMILY,
        code="_libc.prctl(38, 0, 0, 0, 0)\nfields = dict(l.split(':', 1) for l in open('/proc/self/status'))\n"
        "[fields[n].strip() for n in ('NoNewPrivs', 'Seccomp', 'CapEff', 'CapBnd')]",
        expects="VALUE ALIVE",
        value=["1", "2", "0" * 16, "0" * 16],
    ),
]
