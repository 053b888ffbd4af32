"""Files and devices of the container, of the image, and of the host behind them."""

from __future__ import annotations

from tests.adversarial.attack import Attack, denied

_FAMILY = "files and devices"

#: Written to, not made anew.
_WRITTEN = {
    "the broker's own code": "/opt/rlm-sandbox/broker/session.py",
    "the users": "/etc/passwd",
    "the resolver": "/etc/resolv.conf",
    "the name of the host": "/etc/hostname",
    "where cores go": "/proc/sys/kernel/core_pattern",
    "the loader of modules": "/proc/sys/kernel/modprobe",
    "a limit of memory, cgroup v1": "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    "a limit of processes, cgroup v1": "/sys/fs/cgroup/pids/pids.max",
    "the memory of PID 1": "/proc/1/mem",
    "the chance of PID 1 to be killed": "/proc/1/oom_score_adj",
    "the host's block devices": "/dev/vda",
}

_NEW = ("/canary", "/etc/canary", "/usr/lib/python3/canary", "/opt/rlm-sandbox/guest-site/canary.py", "/run/canary",
        "/dev/canary", "/proc/canary", "/sys/canary", "/root/canary", "/var/tmp/canary", "/dev/mqueue/canary")  # fmt: skip


def _write(path: str) -> str:
    # Where there is no such file on this machine, there is nothing to be denied.
    return f"os.open({path!r}, os.O_WRONLY) if os.path.exists({path!r}) else os.open('/etc/passwd', os.O_WRONLY)"


ATTACKS = [
    *(
        denied(f"writing: {name}", _FAMILY, _write(path), falls=path.startswith("/proc/1/"))
        for name, path in _WRITTEN.items()
    ),
    Attack(
        name="making files where none belong",
        family=_FAMILY,
        code=f"""
denied = []
for path in {_NEW!r}:
    if os.path.isdir(os.path.dirname(path)):
        got = attempt(lambda: os.close(os.open(path, os.O_CREAT | os.O_WRONLY)))
        denied.append('EACCES' if got == 'ENOENT' and path.startswith(('/proc', '/sys')) else got)
denied""",
        expects="DENY ALIVE",
    ),
    denied("reading: shadow", _FAMILY, "open('/etc/shadow').read()"),
    denied("a device: the null device", _FAMILY, "os.mknod('/tmp/null', 0o020666, os.makedev(1, 3))"),
    denied("a device: the host's disk", _FAMILY, "os.mknod('/tmp/disk', 0o060666, os.makedev(8, 0))"),
    denied("a device: memory", _FAMILY, "os.mknod('/tmp/mem', 0o020666, os.makedev(1, 1))"),
    denied(
        "a file with capabilities",
        _FAMILY,
        "os.setxattr('/tmp/program', 'security.capability', bytes.fromhex('0100000202000000000000000000000000000000'))",
        setup="open('/tmp/program', 'w').close()",
    ),
    denied("giving a file away", _FAMILY, "os.chown('/tmp/given', 0, 0)", setup="open('/tmp/given', 'w').close()"),
    denied(
        "more chance of survival than PID 1",
        _FAMILY,
        "os.write(os.open('/proc/self/oom_score_adj', os.O_WRONLY), b'-1000')",
    ),
    denied(
        "as much chance of survival as PID 1",
        _FAMILY,
        "spare()",
        setup="""
def spare():
    'After an exec the file is ours again.'
    code = "open('/proc/self/oom_score_adj', 'w').write('0')"
    status = subprocess.run([sys.executable, '-c', f'try:\\n {code}\\nexcept OSError as e: raise SystemExit(e.errno)']).returncode
    if status: raise OSError(status, '')
""",
        falls=True,
    ),
    denied("the root of another name space", _FAMILY, "os.listdir('/proc/1/root/')", falls=True),
    denied("a file by its handle", _FAMILY, "call(304, 265, -100, ctypes.create_string_buffer(16), 0)"),
    Attack(
        name="a program with the suid bit gives nothing",
        family=_FAMILY,
        code="""
import shutil
shutil.copy('/bin/sh', '/tmp/sh'); os.chmod('/tmp/sh', 0o6755)
suid = [line for line in subprocess.run(['find', '/', '-xdev', '-perm', '-4000', '-type', 'f'], capture_output=True, text=True).stdout.split() if not line.startswith('/tmp')]
shown = subprocess.run(['/tmp/sh', '-p', '-c', 'id -u'], capture_output=True, text=True).stdout.strip()
[shown == str(os.getuid()), [subprocess.run([p, '--help'], capture_output=True) and open('/proc/self/status').read().split('NoNewPrivs:')[1].split()[0] for p in suid] in ([], ['1'] * len(suid))]""",
        expects="VALUE ALIVE",
        value=[True, True],
    ),
    Attack(
        name="paths of the host in what is mounted",
        family=_FAMILY,
        code="[line.split()[1] for line in open('/proc/self/mounts') if line.startswith('/dev/') and line.split()[1].startswith(('/home', '/root', '/mnt', '/work'))]",
        expects="VALUE HOST ALIVE",
        value=[],
    ),
    Attack(
        name="a link out of the session's folder",
        family=_FAMILY,
        code="os.symlink('/etc', os.environ['HOME'] + '/etc')\nattempt(lambda: open(os.environ['HOME'] + '/etc/canary', 'w'))",
        expects="DENY ALIVE",
    ),
    Attack(
        name="a core file",
        family=_FAMILY,
        code="""
import resource
pid = os.fork()
if pid == 0: ctypes.string_at(0)
status = os.waitpid(pid, 0)[1]
[os.WCOREDUMP(status), resource.getrlimit(resource.RLIMIT_CORE), [n for n in os.listdir('.') if n.startswith('core')]]""",
        expects="VALUE ALIVE",
        value=[False, [0, 0], []],
    ),
]
