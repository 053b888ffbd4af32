"""The seccomp profile at work: what generated code needs goes through, what is denied is denied by the filter.

Each denial is shown twice: the same call under a profile that lets everything through does not end in EPERM, unless
the kernel itself asks for a capability first (``_NEEDS_A_CAPABILITY``).
"""

from __future__ import annotations

import platform
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from host_client import SandboxInterpreter, SandboxSettings
from host_client.providers.docker import DockerProvider
from host_client.providers.isolation import Isolation
from tests.docker.sandboxes import image

pytestmark = pytest.mark.docker

__all__ = ["image"]

#: Number on x86_64, on arm64 (None: there is none), and arguments that do nothing where the call is let through.
DENIED: dict[str, tuple[int, int | None, list[int]]] = {
    "io_uring_setup": (425, 425, [0, 0]),
    "io_uring_enter": (426, 426, [-1, 0, 0, 0]),
    "io_uring_register": (427, 427, [-1, 0, 0, 0]),
    "ptrace": (101, 117, [-1, -1, 0, 0]),
    "process_vm_readv": (310, 270, [-1, 0, 0, 0, 0, 1]),
    "process_vm_writev": (311, 271, [-1, 0, 0, 0, 0, 1]),
    "process_madvise": (440, 440, [-1, 0, 0, 0, 1]),
    "pidfd_getfd": (438, 438, [-1, -1, 0]),
    "kcmp": (312, 272, [-1, -1, 0, 0, 0]),
    "splice": (275, 76, [-1, 0, -1, 0, 1, 0]),
    "vmsplice": (278, 75, [-1, 0, 0, 0]),
    "tee": (276, 77, [-1, -1, 1, 0]),
    "mknod": (133, None, [0, 0, 0]),
    "mknodat": (259, 33, [-1, 0, 0, 0]),
    "userfaultfd": (323, 282, [-1]),
    "bpf": (321, 280, [-1, 0, 0]),
    "perf_event_open": (298, 241, [0, -1, -1, -1, 0]),
    "keyctl": (250, 219, [-1, 0, 0, 0, 0]),
    "add_key": (248, 217, [0, 0, 0, 0, 0]),
    "request_key": (249, 218, [0, 0, 0, 0]),
    "mount": (165, 40, [0, 0, 0, 0, 0]),
    "umount2": (166, 39, [0, -1]),
    "move_mount": (429, 429, [-1, 0, -1, 0, 0]),
    "fsopen": (430, 430, [0, -1]),
    "fsconfig": (431, 431, [-1, -1, 0, 0, 0]),
    "fsmount": (432, 432, [-1, -1, 0]),
    "fspick": (433, 433, [-1, 0, -1]),
    "open_tree": (428, 428, [-1, 0, -1]),
    "mount_setattr": (442, 442, [-1, 0, 0, 0, 0]),
    "pivot_root": (155, 41, [0, 0]),
    "chroot": (161, 51, [0]),
    "unshare": (272, 97, [0]),
    "setns": (308, 268, [-1, 0]),
    "reboot": (169, 142, [0, 0, 0, 0]),
    "kexec_load": (246, 104, [0, 0, 0, -1]),
    "kexec_file_load": (320, 294, [-1, -1, 0, 0, -1]),
    "init_module": (175, 105, [0, 0, 0]),
    "finit_module": (313, 273, [-1, 0, -1]),
    "delete_module": (176, 106, [0, 0]),
    "name_to_handle_at": (303, 264, [-1, 0, 0, 0, -1]),
    "open_by_handle_at": (304, 265, [-1, 0, 0]),
    "quotactl": (179, 60, [-1, 0, 0, 0]),
    "quotactl_fd": (443, 443, [-1, -1, 0, 0]),
    "acct": (163, 89, [-1]),
    "swapon": (167, 224, [0, 0]),
    "swapoff": (168, 225, [0]),
    "settimeofday": (164, 170, [-1, -1]),
    "clock_settime": (227, 112, [0, 0]),
    "adjtimex": (159, 171, [0]),
    "clock_adjtime": (305, 266, [0, 0]),
    "lookup_dcookie": (212, 18, [0, 0, 0]),
    "seccomp": (317, 277, [-1, 0, 0]),
    "shmget": (29, 194, [0, 0, 0]),
    "semget": (64, 190, [0, 0, 0]),
    "msgget": (68, 186, [-1, 0]),
    "mq_open": (240, 180, [0, 0, 0, 0]),
    "io_setup": (206, 0, [0, 0]),
    "fanotify_init": (300, 262, [-1, -1]),
    "syslog": (103, 116, [-1, 0, 0]),
    "sync": (162, 81, []),
    "modify_ldt": (154, None, [-1, 0, 0]),
    "iopl": (172, None, [-1]),
    "sethostname": (170, 161, [0, 0]),
    "vhangup": (153, 58, []),
    "migrate_pages": (256, 238, [-1, 0, 0, 0]),
    "memfd_secret": (447, 447, [-1]),
    "clone3": (435, 435, [0, 0]),
}

#: The rest of what is denied depends on an argument.
DENIED_WITH: dict[str, str] = {
    "AF_INET": "socket.socket(socket.AF_INET)",
    "AF_INET datagrams": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "AF_INET6": "socket.socket(socket.AF_INET6)",
    "AF_NETLINK": "socket.socket(16, socket.SOCK_RAW, 0)",
    "AF_PACKET": "socket.socket(17, socket.SOCK_RAW, 0)",
    "AF_ALG": "socket.socket(38, socket.SOCK_SEQPACKET)",
    "AF_VSOCK": "socket.socket(40)",
    "AF_XDP": "socket.socket(44, socket.SOCK_RAW)",
    "AF_BLUETOOTH": "socket.socket(31, socket.SOCK_RAW)",
    "AF_UNIX with more bits": "call({'x86_64': 41, 'aarch64': 198}[machine], 1 + (1 << 32), 1, 0)",
    "mknod of a device": "os.mknod('/tmp/device', 0o020600, os.makedev(1, 1))",
    "mknod of a socket": "os.mknod('/tmp/socket', 0o140600)",
    "a new user namespace": "clone(0x10000000)",
    "a new network namespace": "clone(0x40000000)",
    "a new mount namespace": "clone(0x00020000)",
    "TIOCSTI": "ioctl(pty, 0x5412)",
    "TIOCSTI with more bits": "ioctl(pty, 0x5412 + (1 << 32))",
    "TIOCLINUX": "ioctl(pty, 0x541C)",
    "TIOCSETD": "ioctl(pty, 0x5423)",
    "personality READ_IMPLIES_EXEC": "call({'x86_64': 135, 'aarch64': 92}[machine], 0x0400000)",
    "personality ADDR_NO_RANDOMIZE": "call({'x86_64': 135, 'aarch64': 92}[machine], 0x0040000)",
}

#: Without any filter these end in EPERM too: the kernel asks for a capability before it looks at the arguments.
# fmt: off
_NEEDS_A_CAPABILITY = {
    "reboot", "kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module", "acct",
    "swapon", "swapoff", "pivot_root", "fsopen", "fsmount", "move_mount", "fspick", "bpf", "syslog",
    "lookup_dcookie", "vhangup", "iopl", "sethostname", "fanotify_init", "perf_event_open", "AF_PACKET",
    "AF_XDP", "mknod of a device", "a new network namespace", "a new mount namespace", "TIOCSTI",
    "TIOCSTI with more bits",
}
# fmt: on

PRELUDE = """
import ctypes, errno, os, platform, socket
machine = platform.machine()
_libc = ctypes.CDLL(None, use_errno=True)
pty = os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY)
def call(number, *arguments):
    ctypes.set_errno(0)
    result = _libc.syscall(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), 'refused')
    return result
def ioctl(fd, request):
    return call({'x86_64': 16, 'aarch64': 29}[machine], fd, request, 0)
def clone(flags):
    pid = call({'x86_64': 56, 'aarch64': 220}[machine], flags | 17, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
def outcome(statement):
    try:
        eval(statement)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))
    return 'it worked'
"""


def _interpreter(image: str, isolation: Isolation | None) -> SandboxInterpreter:
    settings = SandboxSettings(image=image)
    provider = DockerProvider() if isolation is None else DockerProvider(isolation_of=lambda _: isolation)
    return SandboxInterpreter(settings=settings, provider=provider)


@pytest.fixture(scope="module")
def sandbox(image: str) -> Iterator[SandboxInterpreter]:
    with _interpreter(image, None) as interpreter:
        interpreter.execute(PRELUDE)
        yield interpreter


@pytest.fixture(scope="module")
def unfiltered(image: str) -> Iterator[SandboxInterpreter]:
    """The evidence: the same sandbox with a profile that lets everything through."""
    weak = Isolation(seccomp={"defaultAction": "SCMP_ACT_ALLOW"}, landlock=False, enforced=False)
    with _interpreter(image, weak) as interpreter:
        interpreter.execute(PRELUDE)
        yield interpreter


def _statement(name: str) -> str:
    if name in DENIED_WITH:
        return DENIED_WITH[name]
    x86_64, arm64, arguments = DENIED[name]
    number = x86_64 if platform.machine() == "x86_64" else arm64
    if number is None:
        pytest.skip(f"{name} is a system call of x86_64 alone")
    return f"call({', '.join(map(str, [number, *arguments]))})"


def _outcome(sandbox: SandboxInterpreter, name: str) -> Any:
    return sandbox.execute(f"outcome({_statement(name)!r})")


@pytest.mark.parametrize("name", [*DENIED, *DENIED_WITH])
def test_denied(sandbox: SandboxInterpreter, name: str) -> None:
    assert _outcome(sandbox, name) == ("ENOSYS" if name in ("clone3", "memfd_secret") else "EPERM")


@pytest.mark.parametrize("name", [name for name in (*DENIED, *DENIED_WITH) if name not in _NEEDS_A_CAPABILITY])
def test_the_filter_is_what_denies_it(unfiltered: SandboxInterpreter, name: str) -> None:
    assert _outcome(unfiltered, name) != "EPERM"


def test_system_calls_of_other_architectures_end_the_caller(sandbox: SandboxInterpreter) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("there is no second table of system calls that an arm64 process could reach")
    run = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', {code!r}], capture_output=True).returncode"
    i386 = (
        "import ctypes, mmap\n"
        "page = mmap.mmap(-1, 4096, prot=7)\n"
        "page.write(bytes.fromhex('b814000000cd80c3'))\n"  # mov eax, 20 (getpid of i386); int 0x80; ret
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()\n"
    )
    assert sandbox.execute(run.format(code=i386)) == -signal.SIGSYS
    x32 = "import ctypes, sys; sys.exit(ctypes.CDLL(None).syscall(0x40000000 + 39) == -1)"
    assert sandbox.execute(run.format(code=x32)) in (-signal.SIGSYS, 1)


#: Programs as generated code writes them; each ends in an expression that is True.
CAPABILITIES: dict[str, str] = {
    "threads": """
import threading
found = []
threads = [threading.Thread(target=lambda: found.append(threading.get_native_id())) for _ in range(50)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
len(found) == 50
""",
    "a pool of threads": """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool:
    squares = list(pool.map(lambda n: n * n, range(100)))
squares[-1] == 9801
""",
    "multiprocessing, fork": """
import multiprocessing
context = multiprocessing.get_context('fork')
with context.Pool(2) as pool:
    roots = pool.map(abs, [-1, -2])
roots == [1, 2]
""",
    "multiprocessing, spawn": """
context = multiprocessing.get_context('spawn')
with context.Pool(2) as pool:
    roots = pool.map(abs, [-1, -2])
roots == [1, 2]
""",
    "multiprocessing, forkserver": """
context = multiprocessing.get_context('forkserver')
with context.Pool(2) as pool:
    roots = pool.map(abs, [-1, -2])
roots == [1, 2]
""",
    "queues, locks, semaphores, values between processes": """
context = multiprocessing.get_context('fork')
def add(queue, lock, semaphore, value):
    with lock, semaphore:
        value.value += 1
        queue.put(value.value)
queue, lock, semaphore, value = context.Queue(), context.Lock(), context.BoundedSemaphore(2), context.Value('i', 0)
children = [context.Process(target=add, args=(queue, lock, semaphore, value)) for _ in range(4)]
[child.start() for child in children]
numbers = sorted(queue.get(timeout=20) for _ in children)
[child.join() for child in children]
numbers == [1, 2, 3, 4] and [child.exitcode for child in children] == [0] * 4
""",
    "a manager and a pipe": """
with context.Manager() as manager:
    shared = manager.dict()
    child = context.Process(target=lambda: shared.update(a=1))
    child.start(); child.join()
    kept = dict(shared)
kept == {'a': 1}
""",
    "shared memory": """
from multiprocessing import shared_memory
block = shared_memory.SharedMemory(create=True, size=1 << 20)
block.buf[:5] = b'hello'
other = shared_memory.SharedMemory(name=block.name)
text = bytes(other.buf[:5])
other.close(); block.close(); block.unlink()
text == b'hello'
""",
    "a process pool executor": """
from concurrent.futures import ProcessPoolExecutor
with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context('fork')) as pool:
    total = sum(pool.map(abs, range(-10, 0)))
total == 55
""",
    "asyncio: tasks, subprocesses, threads, pipes, Unix sockets": """
import asyncio, os, sys, tempfile
async def serve():
    path = os.path.join(tempfile.mkdtemp(), 's')
    async def answer(reader, writer):
        writer.write((await reader.readline()).upper()); await writer.drain(); writer.close()
    async with await asyncio.start_unix_server(answer, path):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b'hello\\n'); await writer.drain()
        line = await reader.readline(); writer.close()
    process = await asyncio.create_subprocess_exec(sys.executable, '-c', 'print(6 * 7)', stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    shell = await asyncio.create_subprocess_shell('exit 3')
    return line, out, await shell.wait(), await asyncio.to_thread(lambda: 5)
outcome_ = []
import threading
thread = threading.Thread(target=lambda: outcome_.append(asyncio.run(serve())))
thread.start(); thread.join()
outcome_ == [(b'HELLO\\n', b'42\\n', 3, 5)]
""",
    "subprocess: vfork, shell, pipes, time-outs, sessions": """
import subprocess, sys
quick = subprocess.run('echo a | tr a b', shell=True, capture_output=True, text=True).stdout
apart = subprocess.run([sys.executable, '-c', 'import os; print(os.getsid(0) == os.getpid())'], start_new_session=True,
                       close_fds=True, cwd='/tmp', capture_output=True, text=True).stdout
try:
    subprocess.run(['sleep', '30'], timeout=0.2)
except subprocess.TimeoutExpired:
    late = True
(quick, apart, late) == ('b\\n', 'True\\n', True)
""",
    "posix_spawn, system, popen": """
import os
pid = os.posix_spawn('/bin/sh', ['sh', '-c', 'exit 4'], {})
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
(status, os.system('exit 5'), os.popen('echo x').read()) == (4, 5 << 8, 'x\\n')
""",
    "pidfd, eventfd, timerfd, memfd, signalfd, epoll, inotify": """
import ctypes, os, select, signal
child = os.fork()
if child == 0:
    os._exit(0)
pidfd = os.pidfd_open(child)
ready = select.select([pidfd], [], [], 20)[0]; os.waitpid(child, 0)
counter = os.eventfd(3); number = os.eventfd_read(counter)
timer = os.timerfd_create(1); os.timerfd_settime(timer, initial=0.001); fired = os.read(timer, 8)
memory = os.memfd_create('m'); os.write(memory, b'x')
poll = select.epoll(); poll.register(counter, select.EPOLLOUT); found = poll.poll(5)
watch = ctypes.CDLL(None).inotify_init1(0)
[os.close(fd) for fd in (pidfd, counter, timer, memory, watch)]
bool(ready) and number == 3 and bool(fired) and bool(found) and watch >= 0
""",
    "temporary files, locks, links, big files, copies": """
import fcntl, mmap, os, shutil, sqlite3, tempfile
with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile() as named, tempfile.TemporaryFile() as file:
    file.write(b'x' * 100_000); file.flush(); fcntl.flock(file, fcntl.LOCK_EX)
    view = mmap.mmap(file.fileno(), 0); first = view[:1]; view.close()
    path = os.path.join(folder, 'a'); open(path, 'w').write('hello')
    shutil.copy2(path, path + '2'); os.symlink(path, path + '3')
    os.link(path, path + '4'); os.rename(path + '4', path + '5')
    os.mkfifo(path + 'f'); shutil.copytree(folder, folder + '/t', ignore=shutil.ignore_patterns('af')); os.utime(path)
    base = sqlite3.connect(path + 'db'); base.execute('create table t(x)')
    base.execute('insert into t values (1)'); base.commit()
    row = base.execute('select * from t').fetchone(); base.close()
    names = sorted(os.listdir(folder))
names == ['a', 'a2', 'a3', 'a5', 'adb', 'af', 't'] and first == b'x' and row == (1,)
""",
    "numpy and pandas": """
import numpy, pandas
a = numpy.random.default_rng(1).random((300, 300))
inverse = numpy.allclose(numpy.linalg.inv(a) @ a, numpy.eye(300))
mapped = numpy.memmap(os.path.join(os.environ['TMPDIR'], 'mm'), dtype='int64', mode='w+', shape=(1000,)); mapped[:] = 1
frame = pandas.DataFrame({'a': [1, 2, 2], 'b': [1.0, 2.0, 3.0]})
inverse and int(mapped.sum()) == 1000 and frame.groupby('a').b.sum().tolist() == [1.0, 5.0]
""",
    "signals, timers, limits, priorities, affinity": """
import os, resource, signal, time
os.sched_getaffinity(0); os.sched_setaffinity(0, os.sched_getaffinity(0)); os.nice(1)
os.getpriority(os.PRIO_PROCESS, 0)
os.sched_yield(); resource.getrusage(resource.RUSAGE_CHILDREN); resource.prlimit(0, resource.RLIMIT_NOFILE)
fired = []
before = signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.001)
signal.sigtimedwait([signal.SIGUSR1], 0.05) if not fired else None
signal.signal(signal.SIGALRM, before)
fired == [1]
""",
    "terminals": """
import os, pty, termios
parent, child = pty.openpty()
termios.tcgetattr(child); os.get_terminal_size(child)
before = termios.tcgetattr(child); termios.tcsetattr(child, termios.TCSANOW, before)
pid, fd = pty.fork()
if pid == 0:
    os.execv('/bin/sh', ['sh', '-c', 'test -t 0 && echo yes'])
said = os.read(fd, 100); os.waitpid(pid, 0); [os.close(fd) for fd in (fd, parent, child)]
said == b'yes\\r\\n'
""",
    "passing descriptors, peers, socket pairs, non-blocking sockets": """
import os, socket, struct
a, b = socket.socketpair(); read, write = os.pipe()
socket.send_fds(a, [b'x'], [write]); _, [copy], _, _ = socket.recv_fds(b, 1, 1)
os.write(copy, b'through'); a.setblocking(False)
try:
    a.recv(1)
except BlockingIOError:
    waits = True
pid, uid, gid = struct.unpack('3i', a.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
os.read(read, 7) == b'through' and waits and uid == os.getuid()
""",
    "ctypes, generated machine code, memory protection": """
import ctypes, mmap
libc = ctypes.CDLL(None)
compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
numbers = (ctypes.c_int * 3)(3, 1, 2)
libc.qsort(numbers, 3, 4, compare(lambda x, y: x[0] - y[0]))
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC); page.close()
list(numbers) == [1, 2, 3]
""",
    "waiting for many tool calls from threads": """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(16) as pool:
    answers = list(pool.map(double, range(64)))
answers == [2 * n for n in range(64)]
""",
}


@pytest.fixture(scope="module")
def capable(image: str) -> Iterator[SandboxInterpreter]:
    provider = DockerProvider()
    tools = {"double": lambda n: 2 * n}
    with SandboxInterpreter(tools=tools, settings=SandboxSettings(image=image), provider=provider) as interpreter:
        interpreter.execute("import multiprocessing, os")
        yield interpreter


@pytest.mark.parametrize("name", CAPABILITIES)
def test_what_ordinary_programs_need_works(capable: SandboxInterpreter, name: str) -> None:
    assert capable.execute(CAPABILITIES[name]) is True


def test_with_the_network_on_internet_sockets_work_and_the_others_stay_closed(image: str) -> None:
    with SandboxInterpreter(settings=SandboxSettings(image=image, network=True)) as interpreter:
        interpreter.execute(PRELUDE)
        assert interpreter.execute(
            "server = socket.create_server(('127.0.0.1', 0))\n"
            "client = socket.create_connection(server.getsockname())\n"
            "client.sendall(b'x'); server.accept()[0].recv(1) == b'x'"
        )
        assert interpreter.execute("bool(socket.if_nameindex())")
        for name in ("AF_ALG", "AF_PACKET", "AF_VSOCK", "a new user namespace"):
            assert interpreter.execute(f"outcome({DENIED_WITH[name]!r})") == "EPERM"
