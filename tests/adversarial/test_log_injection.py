"""What generated code can put into the sandbox's log, and from there into somebody's terminal: nothing."""

from __future__ import annotations

import json
import logging

import pytest

from host_client.engine import connect_engine
from host_client.log_view import lines_of, readable
from tests.adversarial.arena import Arena, Target

pytestmark = [pytest.mark.docker, pytest.mark.family("log injection")]

_INJECTED = "INJECTED\x1b[2J"

#: Every way in which text of generated code comes near the broker or the supervisor.
_WAYS = {
    "output": "print({text!r}); sys.stderr.write({text!r})\nfor fd in (0, 1, 2): os.write(fd, {text!r}.encode())",
    "an error": "raise type({text!r}, (Exception,), {{}})({text!r})",
    "the name of a tool": "forged_call({text!r})",
    "a path": "guest('GET', '/v1/tool-calls/' + 'INJECTED%1b%0a')",
    "a header": "guest('GET', '/v1/x', None, 'INJECTED: \\x1b[2J\\r\\n')",
    "a broken request": "connect(GUEST_SOCKET).sendall(b'INJECTED \\x1b[2J\\n\\n')",
    "a frame": "send_raw(frame({{'type': {text!r}, {text!r}: 1}}))",
    "the name of a process": "_libc.prctl(15, b'INJECTED', 0, 0, 0)",
    "an end of the worker": "_libc.prctl(15, b'INJECTED', 0, 0, 0); os._exit(3)",
    "streams of PID 1": (
        "for fd in (0, 1, 2):\n    with contextlib.suppress(OSError): open(f'/proc/1/fd/{{fd}}', 'w').write('INJECTED')"
    ),
}


def _log(target: Target) -> str:
    handle = target.interpreter.sandbox_handle
    assert handle is not None
    with connect_engine() as engine:
        return engine.logs(handle.sandbox_id)


@pytest.mark.parametrize("way", _WAYS)
def test_nothing_comes_into_the_log_by(way: str, arena: Arena) -> None:
    name = arena.shared()
    target = Target(arena, name)
    try:
        handle = target.interpreter.sandbox_handle
        try:
            target.run(_WAYS[way].format(text=_INJECTED))
        except Exception as error:
            logging.getLogger(__name__).debug("it may fail: %s", error)
        assert handle is not None
        with connect_engine() as engine:
            text = engine.logs(handle.sandbox_id)
        assert "serving" in text, "this is its log"
        assert "INJECTED" not in text
        for line in text.splitlines():
            assert isinstance(json.loads(line), dict), line
    finally:
        target.close()


@pytest.mark.weakened
def test_in_the_weakened_build_the_log_falls(weak_arena: Arena) -> None:
    target = weak_arena.target()
    target.run("with open('/proc/1/fd/2', 'w') as file: file.write('INJECTED\\n')")
    assert "INJECTED" in _log(target)


@pytest.mark.parametrize(
    "line",
    [
        b"\x1b]0;owned\x07\x1b[2J\x1b[1A",
        b'{"event": "x", "text": "\\u001b[2J\\n\\u001b[1A\\r\\u202e"}',
        b'{"event": "\\u001b[2J", "from": "\\u001b[2J", "at": "\\u001b[2J", "level": "\\u001b[2J", "\\u001b[2J": 1}',
        b'{"event": ["\\u001b[2J"], "nested": {"a": ["\\u009b2J"]}}',
        b"[" * 100_000,
        b"\xff\xfe\x1b[2J",
        b'{"event": "x", "at": 1e308}',
        b'{"event": "x\\r\\nforged  broker  session_opened"}',
    ],
)
def test_whatever_stands_in_a_log_drives_no_terminal(line: bytes) -> None:
    shown = "\n".join(readable(text) for text in lines_of([line, b"\n"]))
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert not any(row.startswith("forged") for row in shown.splitlines())
