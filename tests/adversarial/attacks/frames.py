"""The worker's own channel: it may lie about itself, but not desynchronise, blow up or stop the host."""

from __future__ import annotations

from tests.adversarial.attack import ANYTHING, Attack

_FAMILY = "protocol"
_PROTOCOL = ("protocol",)


def _breaks(name: str, code: str) -> Attack:
    """Bytes that are no frame end the session, and nothing else."""
    return Attack(name=name, family=_FAMILY, code=code, expects="DEAD HOST", reasons=_PROTOCOL)


def _harmless(name: str, code: str, then: str | None = None) -> Attack:
    return Attack(name=name, family=_FAMILY, code=code, expects="ALIVE HOST", then=then)


def _refused(name: str, encoded: str, *blobs: str) -> Attack:
    """A value that the host cannot take ends the session there, typed, and harms nobody."""
    return Attack(
        name=f"value: {name}",
        family=_FAMILY,
        code=f"send_result({', '.join((encoded, *blobs))})\nthreading.Event().wait(3)",
        expects="DEAD HOST",
        reasons=_PROTOCOL,
    )


def _taken(name: str, encoded: str, *blobs: str, value: object = ANYTHING) -> Attack:
    """A value that the host takes, at no more than its own cost."""
    return Attack(
        name=f"value: {name}",
        family=_FAMILY,
        code=f"send_result({', '.join((encoded, *blobs))})",
        expects="ALIVE HOST" if value is ANYTHING else "VALUE ALIVE HOST",
        value=value,
    )


_BROKEN = [
    _breaks("frame: a header of 4 GiB", "send_raw(b'\\xff' * 4)"),
    _breaks("frame: a header that is no JSON", "send_raw(struct.pack('>I', 4) + b'\\x80abc')"),
    _breaks("frame: a header that is a list", "send_raw(struct.pack('>I', 2) + b'[]')"),
    _breaks("frame: nested 100,000 deep", "send_raw(struct.pack('>I', 200_006) + b'{\"a\":' + b'[' * 100_000 + b']' * 100_000 + b'}')"),
    _breaks("frame: nested 400 deep", "send_raw(struct.pack('>I', 806) + b'{\"a\":' + b'[' * 400 + b']' * 400 + b'}')"),
    _breaks("frame: an integer of a million digits", "send_raw(struct.pack('>I', 1_000_006) + b'{\"a\":' + b'9' * 1_000_000 + b'}')"),
    _breaks("frame: NaN", "send_raw(struct.pack('>I', 9) + b'{\"a\":NaN}')"),
    _breaks("frame: 1e999", "send_raw(struct.pack('>I', 11) + b'{\"a\":1e999}')"),
    _breaks("frame: 2 GiB announced", "send_raw(struct.pack('>I', 22) + b'{\"blobs\":[2147483648]}')"),
    _breaks("frame: lengths below zero", "send_raw(struct.pack('>I', 14) + b'{\"blobs\":[-1]}')"),
    _breaks("frame: lengths that are no numbers", "send_raw(struct.pack('>I', 16) + b'{\"blobs\":[true]}')"),
    _breaks("frame: half of one, then the worker's own", "send_raw(struct.pack('>I', 40) + b'{')"),
    _breaks("frame: millions of empty lists", "n = 5_000_000\nsend_raw(struct.pack('>I', 3 * n + 7) + b'{\"a\":[' + b'[],' * (n - 1) + b'[]]}')"),
    _breaks("frame: 5,000 of them", "for _ in range(5_000): send_raw(frame({'type': 'x'}))\nthreading.Event().wait(3)"),
    _breaks("frame: an outcome that is the broker's to tell", "send_result(outcome='timed_out')\nthreading.Event().wait(3)"),
    _breaks("frame: an outcome that is none", "send_result(outcome='won')\nthreading.Event().wait(3)"),
    _breaks("frame: an error that is none", "send_result(outcome='raised', error=[1])\nthreading.Event().wait(3)"),
]  # fmt: skip

_DROPPED = [
    _harmless("frame: of another execution", "send_result('forged', execution='0' * 32)"),
    _harmless("frame: of an execution to come", "for n in range(20): send_result('forged', execution=f'{n:032x}')"),
    _harmless("frame: ready, again", "send_raw(frame({'type': 'ready', 'pid': 1}))"),
    _harmless("frame: the same result 20 times", "for _ in range(20): send_result('forged')"),
    _harmless("frame: keys given twice", "send_raw((lambda h: struct.pack('>I', len(h)) + h)(b'{\"type\":\"x\",\"type\":\"y\"}'))"),
    _harmless("frame: a session said to be lost", "send_result('forged', session_lost='killed')"),
    _harmless("frame: a display of 20 MB", "send_result(None, display='x' * 20_000_000)"),
    _harmless("frame: written by a forked child", "os.fork() or (send_raw(b''), os._exit(0))"),
    Attack(
        name="frame: a result before the end, and tools after it",
        family=_FAMILY,
        code="own = execution_id()\nsend_result('early')\ndeadline = time.monotonic() + 5\nstatus = 200\n"
        "while status == 200 and time.monotonic() < deadline: status = forged_call('tally', execution=own, wait_s=0)[0]\n"
        "late = status",
        expects="VALUE ALIVE",
        value="early",
        then="late == 409",
    ),
]  # fmt: skip

_HOSTILE = [
    _refused("an unknown tag", "{'$class': 'os.system'}"),
    _refused("an integer of 10**6 digits", "{'$int': '9' * 1_000_000}"),
    _refused("a decimal of 10**6 digits", "{'$decimal': '9' * 1_000_000}"),
    _refused("a kept value", "{'$ref': 'k1'}"),
    _refused("an array", "{'$ndarray': {'dtype': 'O', 'shape': [1], 'data': {'$bytes': ''}}}"),
    _refused("a table", "{'$dataframe': {'columns': [], 'index': []}}"),
    _refused("a blob that is not there", "{'$blob': [7, 'str']}"),
    _refused("a blob below zero", "{'$blob': [-1, 'str']}", "b'x'"),
    _refused("a blob that is no text", "{'$blob': [0, 'str']}", "b'\\xff\\xfe'"),
    _refused("a set of lists", "{'$set': [[1]]}"),
    _refused("a date out of range", "{'$datetime': '99999-01-01'}"),
    _refused("a span out of range", "{'$timedelta': [10**18, 0, 0]}"),
    _refused("nested 300 deep", "__import__('functools').reduce(lambda inner, _: [inner], range(300), {'$float': 'nan'})"),
    _refused("100,000 integers of one hash", "{'$set': [n * (2**61 - 1) % 10**18 if n < 1 else {'$int': str(n * (2**61 - 1))} for n in range(100_000)]}"),
    _refused("100,000 keys of one hash", "{'$map': [[{'$int': str(n * (2**61 - 1))}, 0] for n in range(100_000)]}"),
    _refused("SUBMIT of a list", "[1], outcome='submitted'"),
    _taken("one blob, a thousand times", "[{'$blob': [0, 'str']}] * 1000", "b'x' * 4_000_000"),
    _taken("one blob as bytes, a thousand times", "[{'$blob': [0, 'bytes']}] * 1000", "b'x' * 4_000_000"),
    _taken("lone surrogates", "'\\ud800' * 10", value="\ud800" * 10),
    _taken("keys that look like paths", "{'../../etc/passwd': 1, '__class__': 2, '$x$': 3, '': 4}",
           value={"../../etc/passwd": 1, "__class__": 2, "$x$": 3, "": 4}),
    _taken("escapes for a terminal", "'\\x1b]0;owned\\x07\\x1b[2J'", value="\x1b]0;owned\x07\x1b[2J"),
    _taken("a million numbers", "list(range(1_000_000))"),
]  # fmt: skip

ATTACKS = [*_BROKEN, *_DROPPED, *_HOSTILE]
