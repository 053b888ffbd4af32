"""Speaking as somebody else: the host, the broker, another execution."""

from __future__ import annotations

from tests.adversarial.attack import Attack, denied

_FAMILY = "forgery"

#: What of another process would give away its secrets or lend its hands.
_OF_A_PROCESS = {
    "environment": "open(f'/proc/{pid}/environ', 'rb').read()",
    "memory": "open(f'/proc/{pid}/mem', 'rb')",
    "maps": "open(f'/proc/{pid}/maps').read()",
    "descriptors": "os.listdir(f'/proc/{pid}/fd')",
    "working folder": "os.listdir(f'/proc/{pid}/cwd')",
    "root": "os.listdir(f'/proc/{pid}/root')",
}

# The broker cannot be dumped, so that even its own uid sees nothing of it.
_PROCESSES = [
    denied(f"{whose}: {what}", _FAMILY, action, setup=f"pid = {pid}", falls=whose == "supervisor")
    for whose, pid in (("supervisor", "1"), ("broker", "broker()"))
    for what, action in _OF_A_PROCESS.items()
]

_SIGNALS = [
    denied("broker: a signal", _FAMILY, "os.kill(broker(), 18)", falls=True),
    denied("supervisor: a signal", _FAMILY, "os.kill(1, 18)", falls=True),
    denied(
        "broker: a signal by pidfd",
        _FAMILY,
        "__import__('signal').pidfd_send_signal(fd, 18)",
        falls=True,
        setup="fd = os.pidfd_open(broker())",
    ),
    denied("broker: its priority", _FAMILY, "os.setpriority(os.PRIO_PROCESS, broker(), 19)", falls=True),
    denied("broker: its limits", _FAMILY, "__import__('resource').prlimit(broker(), 7)", falls=True),
    denied("broker: its user", _FAMILY, "os.setuid(os.stat(GUEST_SOCKET).st_uid)", falls=True),
    denied("broker: ptrace", _FAMILY, "call(101, 117, 16, broker(), 0, 0)"),
    denied(
        "broker: process_vm_readv",
        _FAMILY,
        "call(310, 270, broker(), vector, 1, vector, 1, 0)",
        setup="vector = (ctypes.c_ulong * 2)(ctypes.addressof(ctypes.create_string_buffer(8)), 8)",
    ),
    denied("broker: a descriptor by pidfd_getfd", _FAMILY, "call(438, 438, os.pidfd_open(broker()), 3, 0)"),
]

_SOCKETS = [
    denied("host.sock: connect", _FAMILY, "connect(HOST_SOCKET)", falls=True),
    denied("host.sock: list its folder", _FAMILY, "os.listdir('/run/rlm-sandbox/host')", falls=True),
    denied(
        "host.sock: another one beside it", _FAMILY, "os.symlink('/tmp', '/run/rlm-sandbox/host/evil.sock')", falls=True
    ),
    denied(
        "host.sock: put a link in its place",
        _FAMILY,
        "os.rename('/tmp/link', HOST_SOCKET)",
        setup="os.path.lexists('/tmp/link') or os.symlink(GUEST_SOCKET, '/tmp/link')",
    ),
    denied("guest.sock: another one beside it", _FAMILY, "os.mkdir('/run/rlm-sandbox/guest/evil')", falls=True),
    denied(
        "guest.sock: another one in its place",
        _FAMILY,
        "os.rename('/run/rlm-sandbox/guest/guest.sock', GUEST_SOCKET)",
        falls=True,
    ),
    denied("guest.sock: its mode", _FAMILY, "os.chmod(GUEST_SOCKET, 0o666)", falls=True),
    Attack(
        name="the host's plane through the host's socket",
        family=_FAMILY,
        code="attempt(lambda: http(HOST_SOCKET, 'POST', '/v1/sessions', {}))",
        expects="DENY ALIVE",
        falls="DENY",
    ),
    Attack(
        name="an answer to one's own call, in the host's name",
        family=_FAMILY,
        code="""
def answer():
    status, call = forged_call('hang', wait_s=0)
    http(HOST_SOCKET, 'POST', f"/v1/tool-calls/{call['call_id']}/result", {'attempt': 1, 'value': 'forged'})
attempt(answer)""",
        expects="DENY ALIVE",
        falls="DENY",
    ),
]


def _status(name: str, code: str, wanted: int, *, runs: int = 0) -> Attack:
    return Attack(
        name=name, family=_FAMILY, code=code, expects=f"VALUE ALIVE COUNT={runs}", value=wanted
    )  # fmt: skip


_ROUTES = [
    _status(f"guest.sock: {method} {target}", f"guest({method!r}, {target!r}, {{}})[0]", 404)
    for method, target in (
        ("GET", "/v1/health"),
        ("POST", "/v1/sessions"),
        ("GET", "/v1/sessions"),
        ("POST", "/v1/tool-calls/1/result"),
        ("POST", "/v1/../v1/sessions"),
        ("POST", "//v1/sessions"),
        ("POST", "/v1/executions/e/interrupt"),
    )
]

_CALLS = [
    _status("a call of another execution", "forged_call('tally', execution='0' * 32)[0]", 409),
    _status("a call of no tool", "forged_call('__import__', 'os')[0]", 404),
    _status("a call of a tool's attribute", "forged_call('tally.__globals__')[0]", 404),
    _status(
        "a call that a made-up user makes",
        "forged_call('tally')[0] and guest('GET', '/v1/tool-calls/1', None, "
        "'X-Forwarded-User: root\\r\\nRLM-Sandbox-Connection: 1\\r\\n')[0]",
        404,
        runs=1,
    ),
    Attack(
        name="other arguments under the same key",
        family=_FAMILY,
        code="[forged_call('tally', n, key='k')[1]['value'] for n in range(5)]",
        expects="VALUE ALIVE COUNT=1",
        value=[1] * 5,
    ),
    Attack(
        name="a call replayed from many connections at once",
        family=_FAMILY,
        code="""
answers = []
threads = [threading.Thread(target=lambda: answers.append(forged_call('tally', key='k')[1]['value'])) for _ in range(40)]
own = execution_id()
execution_id = lambda: own
for t in threads: t.start()
for t in threads: t.join()
answers""",
        expects="VALUE COUNT=1",
        value=[1] * 40,
    ),
    Attack(
        name="an answer to one's own call on the guest plane",
        family=_FAMILY,
        code="""
status, call = forged_call('tally', wait_s=0)
[guest(m, f"/v1/tool-calls/{call['call_id']}{p}", {'attempt': 1, 'value': 'forged'})[0]
 for m, p in (('POST', '/result'), ('POST', '/start'), ('POST', '/heartbeat'), ('PUT', ''))]""",
        expects="VALUE ALIVE",
        value=[404, 404, 404, 405],
    ),
    Attack(
        name="guessed ids of other calls",
        family=_FAMILY,
        code="""
call_id = forged_call('tally')[1]['call_id']
prefix, number = call_id[:12], int(call_id[12:], 16)
[*{guest('GET', f'/v1/tool-calls/{p}{number + n:x}')[0] for p in ('0' * 12, prefix) for n in range(1, 50)}]""",
        expects="VALUE ALIVE COUNT=1",
        value=[404],
    ),
    Attack(
        name="descriptors sent to the guest's socket",
        family=_FAMILY,
        code="""
import array
for _ in range(300):
    with contextlib.suppress(OSError), connect(GUEST_SOCKET) as sock:  # the kernel has a limit of its own, for each user
        sock.sendmsg([b'GET /v1/tool-calls/1 HTTP/1.1\\r\\n'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0] * 100))])
tally('still')""",
        expects="VALUE ALIVE COUNT=1 HOST",
        value=1,
    ),
    Attack(
        name="descriptors sent to the worker's channel",
        family=_FAMILY,
        code="""
import array
with socket.socket(fileno=os.dup(channel_fd())) as sock:
    for _ in range(20):
        sock.sendmsg([frame({'type': 'hello'})], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0] * 100))])""",
        expects="ALIVE|DEAD HOST",
        reasons=("protocol",),
    ),
]

_LIES = [
    Attack(
        name="rebound wrappers last for one execution",
        family=_FAMILY,
        code="tally = lambda *a: 'forged'\nSUBMIT = None\ntally()",
        expects="VALUE COUNT=0 ALIVE",
        value="forged",
        then="tally() == 1 and callable(SUBMIT)",
    ),
    Attack(
        name="an exception with the name of ours",
        family=_FAMILY,
        code="raise type('SessionLost', (Exception,), {})('the sandbox is gone')",
        expects="ERROR ALIVE",
        error="CodeExecutionError: Traceback",
    ),
    Attack(
        name="an exception whose text breaks",
        family=_FAMILY,
        code="class E(Exception):\n def __str__(self): raise BaseException('again')\nraise E",
        expects="ERROR ALIVE",
        error="text could not be",
    ),
    Attack(
        name="secrets in environment, arguments and memory of the worker",
        family=_FAMILY,
        code="""
found = [os.environ, sys.argv]
for pid in [os.getpid(), *others()]:
    with contextlib.suppress(OSError), open(f'/proc/{pid}/cmdline') as file: found.append(file.read())
    with contextlib.suppress(OSError), open(f'/proc/{pid}/environ') as file: found.append(file.read())
str(found)""",
        expects="HOST ALIVE",
    ),
    Attack(
        name="inherited descriptors",
        family=_FAMILY,
        code="""
kinds = []
for fd in os.listdir('/proc/self/fd'):
    with contextlib.suppress(OSError): kinds.append(os.readlink(f'/proc/self/fd/{fd}').split(':')[0])
sorted({kind for kind in kinds if kind not in ('/dev/null', 'anon_inode')})""",
        expects="VALUE ALIVE",
        value=["pipe", "socket"],
    ),
]

ATTACKS = [*_SOCKETS, *_PROCESSES, *_SIGNALS, *_ROUTES, *_CALLS, *_LIES]
