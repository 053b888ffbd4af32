"""Putting lines into the sandbox's log, or escapes into somebody's terminal."""

from __future__ import annotations

from tests.adversarial.attack import denied

_FAMILY = "log injection"

ATTACKS = [
    denied("PID 1's error stream", _FAMILY, "open('/proc/1/fd/2', 'w').write('INJECTED')", falls=True),
    denied("the broker's error stream", _FAMILY, "open(f'/proc/{broker()}/fd/2', 'w').write('INJECTED')"),
    denied(
        "the console",
        _FAMILY,
        "os.open('/dev/console', os.O_WRONLY) if os.path.exists('/dev/console') else os.open('/dev/canary', os.O_CREAT)",
    ),
    denied(
        "typing into a terminal",
        _FAMILY,
        "__import__('fcntl').ioctl(os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY), 0x5412, b'x')",
    ),
]
