"""Taking all there is."""

from __future__ import annotations

from tests.adversarial.attack import Attack

_FAMILY = "resources"
_LOST = ("oom", "killed", "deadline", "output_limit")


def _bomb(name: str, code: str, *, deadline_s: float = 3.0, expects: str = "ALIVE|DEAD HOST") -> Attack:
    """Something that may cost the session, but nobody else anything."""
    return Attack(name=name, family=_FAMILY, code=code, deadline_s=deadline_s, expects=expects, reasons=_LOST)


def _bounded(name: str, code: str, value: object = True) -> Attack:
    return Attack(name=name, family=_FAMILY, code=code, expects="VALUE ALIVE HOST", value=value, deadline_s=20.0)


_FLOOD = "{}\nfor _ in range(100_000): {}"

ATTACKS = [
    _bomb("bomb: forks", "while True:\n try: os.fork()\n except OSError: pass", deadline_s=2.0),
    _bomb("bomb: forks that ignore every signal", """
import signal
for n in range(1, 65):
    with contextlib.suppress(OSError, ValueError): signal.signal(n, signal.SIG_IGN)
while True:
    try:
        os.fork(); os.setsid()
    except OSError: pass""", deadline_s=2.0),
    _bomb("bomb: memory", "held = []\nwhile True: held.append(b'x' * 10_000_000)", deadline_s=8.0, expects="DEAD HOST"),
    _bomb("bomb: memory of many small processes", """
for _ in range(150):
    with contextlib.suppress(OSError):
        if os.fork() == 0:
            held = b'x' * 4_000_000
            threading.Event().wait(30)
threading.Event().wait(1)""", deadline_s=8.0),
    _bomb("bomb: memory of processes that were executed anew", """
children = []
with contextlib.suppress(OSError):
    for _ in range(40):
        children.append(subprocess.Popen([sys.executable, '-ISc', 'import time\\ntry: open("/proc/self/oom_score_adj", "w").write("0")\\nexcept OSError: pass\\nx = b"x" * 12_000_000; time.sleep(30)']))
threading.Event().wait(3)
for child in children: child.kill()""", deadline_s=12.0),
    _bomb("bomb: memory without a name", "fd = os.memfd_create('x')\nwhile True: os.write(fd, b'x' * 1_000_000)", deadline_s=8.0),
    _bomb("bomb: threads", "held = []\ntry:\n while True: held.append(threading.Thread(target=threading.Event().wait, args=(2,))); held[-1].start()\nexcept RuntimeError: pass\n", deadline_s=8.0),
    _bomb("flood: print", "while True: print('x' * 100_000)", deadline_s=20.0, expects="ALIVE|DEAD HOST"),
    _bomb("flood: stderr", "while True: sys.stderr.write('x' * 100_000)", deadline_s=20.0),
    _bomb("flood: descriptor 1 of a child", "subprocess.run(['cat', '/dev/zero'])", deadline_s=20.0),
    _bomb("flood: a daemon's output", "subprocess.Popen(['cat', '/dev/zero'], start_new_session=True)\n1", deadline_s=20.0),
    _bomb("flood: an error of 50 MB", "raise ValueError('x' * 50_000_000)"),
    _bomb("flood: an error's name of 10 MB", "raise type('E' * 10_000_000, (Exception,), {})('x')"),
    _bomb("flood: a display of 50 MB", "class R:\n def __repr__(self): return 'x' * 50_000_000\nR()"),
    _bomb("flood: a trace of 100,000 lines", "exec('\\n' * 100_000 + 'raise ValueError')"),
    _bounded("full: /tmp", """
written = 0
try:
    with open('/tmp/full', 'wb', 0) as file:
        while True: written += file.write(b'x' * 1_000_000)
except OSError as error: reason = errno.errorcode[error.errno]
os.unlink('/tmp/full')
reason == 'ENOSPC' and written <= 32 << 20"""),
    _bounded("full: shared memory", """
written = 0
try:
    with open('/dev/shm/full', 'wb', 0) as file:
        while written < 200 << 20: written += file.write(b'x' * 1_000_000)
except OSError as error: reason = errno.errorcode[error.errno]
os.unlink('/dev/shm/full')
reason == 'ENOSPC' and written <= 64 << 20"""),
    _bounded("full: inodes", """
os.mkdir('/tmp/many'); made = 0
try:
    while made < 100_000: os.close(os.open(f'/tmp/many/{made}', os.O_CREAT)); made += 1
except OSError as error: reason = errno.errorcode[error.errno]
for n in range(made): os.unlink(f'/tmp/many/{n}')
os.rmdir('/tmp/many')
reason == 'ENOSPC' and made < 20_000"""),
    _bounded("full: descriptors", """
held = []
try:
    while True: held.append(os.open('/dev/null', os.O_RDONLY))
except OSError as error: reason = errno.errorcode[error.errno]
for fd in held: os.close(fd)
reason == 'EMFILE' and len(held) <= 4096"""),
    _bounded("full: pipes", """
held, refused = [], None
import fcntl
try:
    for _ in range(1500):
        held += os.pipe()
        fcntl.fcntl(held[-1], 1031, 1 << 20)
except OSError as error: refused = errno.errorcode[error.errno]
for fd in held: os.close(fd)
refused in ('EPERM', 'EMFILE', 'ENFILE')"""),
    _bounded("full: watches", """
watcher, made = _libc.inotify_init1(0), 0
while made < 200_000 and _libc.inotify_add_watch(watcher, f'/proc/{os.getpid()}/task'.encode(), 1 << made % 12) >= 0: made += 1
os.close(watcher)
'ended'""", "ended"),
    _bounded("full: a file of a terabyte", """
with open('/tmp/sparse', 'w') as file: got = attempt(lambda: file.truncate(1 << 40))
os.unlink('/tmp/sparse')
got in ('worked', 'EFBIG', 'ENOSPC', 'EINVAL')"""),
    _bounded("full: folders without end", """
home = os.getcwd()
try:
    for _ in range(3000): os.mkdir('deeper'); os.chdir('deeper')
finally: os.chdir(home)
True"""),
]  # fmt: skip
