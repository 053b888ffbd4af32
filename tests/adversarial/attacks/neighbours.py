"""One session of a shared sandbox against another. ``victim`` has its pid, uid, home and the id of a call of its."""

from __future__ import annotations

from tests.adversarial.attack import Attack, denied

_FAMILY = "neighbours"

#: Everything that ``victim`` is asked about its folder was made by it before.
PREPARED = """
with open(os.environ['HOME'] + '/secret', 'w') as file: file.write(mark)
with open('/dev/shm/' + mark, 'w') as file: file.write(mark)
with open('/tmp/' + mark, 'w') as file: file.write(mark)
tally(mark)
[os.getpid(), os.getuid(), os.environ['HOME'], mark]
"""


def _spared(name: str, code: str, *, falls: str | None = None) -> Attack:
    """Something that must not reach the victim; what becomes of the attacker is its own affair."""
    return Attack(
        name=name, family=_FAMILY, code=code, expects="ALIVE|DEAD HOST", falls=falls, deadline_s=3.0,
        reasons=("killed", "oom", "deadline", "exited(0)", "protocol"),
    )  # fmt: skip


ATTACKS = [
    denied("neighbour: its folder", _FAMILY, "os.listdir(victim['home'])", falls=True),
    denied("neighbour: a file in its folder", _FAMILY, "open(victim['home'] + '/secret').read()", falls=True),
    denied("neighbour: writing into its folder", _FAMILY, "open(victim['home'] + '/sitecustomize.py', 'w').close()", falls=True),
    denied("neighbour: renaming its folder", _FAMILY, "os.rename(victim['home'], victim['home'] + 'x')"),
    denied("neighbour: its shared memory", _FAMILY, "open('/dev/shm/' + victim['mark']).read()", falls=True),
    denied("neighbour: its file in /tmp", _FAMILY, "open('/tmp/' + victim['mark']).read()", falls=True),
    denied("neighbour: removing its file", _FAMILY, "os.unlink('/tmp/' + victim['mark'])"),
    denied("neighbour: a signal", _FAMILY, "os.kill(victim['pid'], 18)", falls=True),
    denied("neighbour: its memory", _FAMILY, "open(f\"/proc/{victim['pid']}/mem\", 'rb')", falls=True),
    denied("neighbour: its environment", _FAMILY, "open(f\"/proc/{victim['pid']}/environ\", 'rb').read()", falls=True),
    denied("neighbour: its descriptors", _FAMILY, "os.listdir(f\"/proc/{victim['pid']}/fd\")", falls=True),
    denied("neighbour: its working folder", _FAMILY, "os.listdir(f\"/proc/{victim['pid']}/cwd\")", falls=True),
    denied("neighbour: its threads' names", _FAMILY, "os.open(f\"/proc/{victim['pid']}/comm\", os.O_WRONLY)", falls=True),
    denied("neighbour: its chance of survival", _FAMILY, "os.open(f\"/proc/{victim['pid']}/oom_score_adj\", os.O_WRONLY)", falls=True),
    denied("neighbour: its priority", _FAMILY, "os.setpriority(os.PRIO_PROCESS, victim['pid'], 19)", falls=True),
    denied("neighbour: ptrace", _FAMILY, "call(101, 117, 16, victim['pid'], 0, 0)"),
    denied("neighbour: process_vm_writev", _FAMILY, "call(311, 271, victim['pid'], 0, 0, 0, 0, 0)", falls=True),
    denied("neighbour: its user", _FAMILY, "os.setuid(victim['uid'])"),
    _spared("neighbour: every process killed", "with contextlib.suppress(OSError): os.kill(-1, 9)", falls="HOST"),
    _spared("neighbour: its pid killed, by many", "for pid in others():\n with contextlib.suppress(OSError): os.kill(pid, 9)"),
    _spared("neighbour: forks", "while True:\n try: os.fork()\n except OSError: pass"),
    _spared("neighbour: memory", "held = []\nwhile True: held.append(b'x' * 10_000_000)"),
    _spared("neighbour: a full /tmp", "with open('/tmp/full', 'wb', 0) as file:\n with contextlib.suppress(OSError):\n  while True: file.write(b'x' * 1_000_000)"),
    _spared("neighbour: every connection that the broker takes", """
held = []
with contextlib.suppress(OSError):
    while len(held) < 4_000: held.append(connect(GUEST_SOCKET))
del held"""),
    _spared("neighbour: a loop of requests", """
deadline = time.monotonic() + 2
while time.monotonic() < deadline: guest('GET', '/v1/tool-calls/1')"""),
    Attack(
        name="neighbour: its calls", family=_FAMILY, expects="VALUE ALIVE HOST", value=[404, 409],
        code="[guest('GET', f\"/v1/tool-calls/{victim['call']}\")[0], forged_call('tally', execution=victim['execution'])[0]]",
    ),
    Attack(
        name="neighbour: links where its folder may be", family=_FAMILY, expects="ALIVE HOST",
        code="""
for slot in range(4):
    for pid in range(1, 40):
        with contextlib.suppress(OSError): os.symlink('/etc', f'/tmp/session-{slot}-{pid}')""",
    ),
    Attack(
        name="neighbour: folders that cannot be swept", family=_FAMILY, expects="ALIVE HOST",
        code="""
os.makedirs('/tmp/a' + '/b' * 200); os.mkdir('/tmp/locked'); os.mkdir('/tmp/locked/in'); os.chmod('/tmp/locked', 0)
os.symlink(victim['home'], '/tmp/way')""",
    ),
]  # fmt: skip
