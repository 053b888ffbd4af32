"""Values, tools and HTTP on the guest plane, as hostile as they come."""

from __future__ import annotations

from tests.adversarial.attack import Attack

_FAMILY = "protocol"


def _returns(name: str, code: str, value: object, *, runs: int | None = None, then: str | None = None) -> Attack:
    words = "VALUE ALIVE HOST" + ("" if runs is None else f" COUNT={runs}")
    return Attack(name=name, family=_FAMILY, code=code, expects=words, value=value, then=then)


def _raises(name: str, code: str, error: str, *, runs: int = 0) -> Attack:
    words = f"ERROR ALIVE HOST COUNT={runs}"
    return Attack(name=name, family=_FAMILY, code=code, expects=words, error=error)


_VALUES = [
    _returns("a value that contains itself", "x = []; x.append(x); x", "[[...]]"),
    _returns("a value nested 10,000 deep", "x = []\nfor _ in range(10_000): x = [x]\nlen(x)", 1),
    _raises("an argument that contains itself", "x = []; x.append(x); tally(x)", "contains itself"),
    _raises("an argument that cannot be sent", "tally(object())", "cannot cross the sandbox"),
    _raises("an argument of 10**6 digits", "tally(10 ** 1_000_000)", "digits"),
    _raises("an argument larger than may be sent", "tally('\\0' * 3_000, ['\\0' * 4_000] * 3_000)", "arguments"),
    _returns("NaN and infinities", "[repr(echo(float(x))) for x in ('nan', 'inf', '-inf')]", ["nan", "inf", "-inf"], runs=3),
    _returns("lone surrogates to a tool and back", "echo('\\ud800') == '\\ud800'", True, runs=1),
    _returns("dunder names as keywords", "try: shape(__class__=1, self=2, __init__=3)\nexcept TypeError as e: str(e)\nshape(**{'__class__': 1, 'self': 2})", [0, ["__class__", "self"], []], runs=2),
    _returns("a name of no identifier as keyword", "shape(**{'../x': 1, 'a b': 2, '': 3})", [0, ["", "../x", "a b"], []], runs=1),
    _returns("100,000 arguments", "shape(*range(100_000))[0]", 100_000, runs=1),
    _raises("wrong arguments", "tally(1, 2, 3)", "TypeError"),
    _returns("a proxy of another class", "class D(dict):\n def __class__(self): raise BaseException\nisinstance(echo(dict(D(a=1))), dict)", True, runs=1),
    _returns("a class that lies about itself", "class L(list):\n def __iter__(self): raise ValueError('mine')\n def __len__(self): return 10**12\nx = L([1])\ntry: tally(x); out = 'sent'\nexcept (TypeError, ValueError, MemoryError, OverflowError): out = 'refused'\nout in ('sent', 'refused')", True),
]  # fmt: skip

_TOOLS = [
    Attack(
        name="a tool that hangs past the deadline", family=_FAMILY, code="hang()", deadline_s=1.0,
        expects="ERROR ALIVE COUNT=1 HOST", error="ExecutionTimedOut",
    ),
    Attack(
        name="a tool that raises SystemExit", family=_FAMILY, code="try: stop('exit')\nexcept BaseException: pass",
        expects="VALUE ALIVE COUNT=1", value="SystemExit",
    ),
    Attack(
        name="a tool that raises KeyboardInterrupt", family=_FAMILY, code="stop('keyboard')",
        expects="VALUE ALIVE COUNT=1", value="KeyboardInterrupt",
    ),
    _returns("1,000 calls at once", """
import asyncio
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(100) as pool: answers = list(pool.map(tally, range(1000)))
sorted(answers) == list(range(1, 1001))""", True, runs=1000),
    _returns("calls from asyncio", """
import asyncio
async def main(): return await asyncio.gather(*(asyncio.to_thread(tally, n) for n in range(50)))
sorted(await main()) == list(range(1, 51))""", True, runs=50),
    _returns("calls from forked children", "[in_child(lambda: tally('child')) for _ in range(5)]", [0] * 5, runs=5),
    _returns("SUBMIT from a forked child", "in_child(lambda: SUBMIT('child')) != 0", True),
    _returns("a call that is asked for and never fetched", """
for n in range(20):
    with connect(GUEST_SOCKET) as sock:
        body = json.dumps({'key': f'k{n}', 'execution_id': execution_id(), 'tool': 'tally', 'args': [n]}).encode()
        sock.sendall(b'POST /v1/tool-calls HTTP/1.1\\r\\nContent-Length: %d\\r\\n\\r\\n' % len(body) + body)
[forged_call('tally', n, key=f'k{n}')[0] for n in range(20)]""", [200] * 20, runs=20),
]  # fmt: skip

_HTTP = [
    _returns("http: 1,000 half requests held open", """
held = [connect(GUEST_SOCKET) for _ in range(1000)]
for sock in held: sock.sendall(b'POST /v1/tool-calls HTTP/1.1\\r\\nContent-Length: 100\\r\\n\\r\\n{')
answer = tally()
for sock in held: sock.close()
answer""", 1, runs=1),
    Attack(
        name="http: 10,000 connections",
        family=_FAMILY,
        code="""
def hold():
    held = []
    with contextlib.suppress(OSError):
        while len(held) < 2_600: held.append(connect(GUEST_SOCKET))
    os.write(ready, b'x')
    threading.Event().wait(20)
seen, ready = os.pipe()
children = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        hold(); os._exit(0)
    children.append(pid)
import select
open_now = 0
while open_now < 4 and select.select([seen], [], [], 10)[0]: open_now += len(os.read(seen, 4))
for pid in children: os.kill(pid, 9); os.waitpid(pid, 0)
open_now""",
        expects="VALUE ALIVE HOST",
        value=4,
        then="tally() >= 1",
        deadline_s=20.0,
    ),
    _returns("http: a body of 300 MB announced", "guest('POST', '/v1/tool-calls', None, 'Content-Length: 314572800\\r\\nX: ')[0]", 413),
    _returns("http: chunks", """
with connect(GUEST_SOCKET) as sock:
    sock.sendall(b'POST /v1/tool-calls HTTP/1.1\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n2\\r\\n{}\\r\\n0\\r\\n\\r\\n')
    status = sock.recv(65536).split()[1].decode()
status""", "411"),
    _returns("http: a header of 1 MB", """
with connect(GUEST_SOCKET) as sock:
    with contextlib.suppress(OSError): sock.sendall(b'GET / HTTP/1.1\\r\\nX: ' + b'x' * 1_000_000)
    with contextlib.suppress(OSError): sock.sendall(b'\\r\\n\\r\\n')
    try: answer = sock.recv(65536)[9:12]
    except ConnectionError: answer = b'400'
answer.decode()""", "400"),
    _returns("http: two lengths", "guest('POST', '/v1/tool-calls', {}, 'Content-Length: 0\\r\\n')[0]", 400),
    _returns("http: a request behind a request", """
one = b'GET /v1/tool-calls/1 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'
with connect(GUEST_SOCKET) as sock:
    sock.sendall(one * 50)
    got = b''
    while got.count(b'HTTP/1.1 404') < 50: got += sock.recv(65536) or b'HTTP/1.1 404' * 1000
got.count(b'HTTP/1.1 404')""", 50),
    *(_returns(f"http: body {name}", f"guest('POST', '/v1/tool-calls', {body})[0]", 400) for name, body in (
        ("deep", "b'[' * 100_000"), ("no object", "b'[]'"), ("NaN", "b'{\"key\": NaN}'"), ("empty", "b'{}'"),
        ("long integer", "b'{\"wait_s\": ' + b'9' * 10_000 + b'}'"), ("no UTF-8", "b'\\xff'"),
        ("millions of lists", "b'{\"args\": [' + b'[],' * 5_000_000 + b'1]}'"),
    )),
]  # fmt: skip

ATTACKS = [*_VALUES, *_TOOLS, *_HTTP]
