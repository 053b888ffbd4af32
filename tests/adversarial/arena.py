"""Where attacks take place: sandboxes of one build, a sibling that must not notice, and the host's canary."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import time
from pathlib import Path
from typing import Any

from host_client import SandboxInterpreter, SandboxSettings
from host_client.errors import SessionLost
from host_client.providers.base import SandboxHandle
from host_client.providers.bubblewrap import BubblewrapProvider
from host_client.providers.docker import DockerProvider
from host_client.providers.isolation import Isolation
from tests.adversarial.attack import Attack
from tests.adversarial.memory import MemoryPeak
from tests.adversarial.tools import Tools

PRELUDE = Path(__file__).with_name("prelude.py").read_text("utf-8")

#: Small, so that bombs end quickly.
LIMITS: dict[str, Any] = {"memory": "320m", "pids": 256, "tmpfs": "32m", "cpus": 1.5, "max_sessions": 4}

#: Without an image, the host's Python runs the code; before 3.12, each fork copies more, as it counts references.
OLDER_PYTHONS_MEMORY = "384m"

MakeProvider = type[DockerProvider] | type[BubblewrapProvider]

_SETUP_DEADLINE_S = 20.0


def weakened(settings: SandboxSettings) -> Isolation:
    """Return what is no boundary: one uid for all, every system call, the host's network, no Landlock."""
    return Isolation(
        network="host",
        seccomp={"defaultAction": "SCMP_ACT_ALLOW"},
        separate_users=False,
        landlock=False,
        enforced=False,
    )


@dataclasses.dataclass(slots=True)
class Aftermath:
    """What is known once an attack was made.

    Attributes:
        value: What ``execute`` returned.
        error: What it raised.
        seconds: How long it took.
        growth_bytes: By how much this process grew meanwhile, at its peak.
    """

    attack: Attack
    target: Target
    value: Any
    error: Exception | None
    seconds: float
    growth_bytes: int

    def holds(self, text: str) -> bool:
        """Tell whether a text is in anything that came back. Hostile values may be larger than their parts."""
        pending, seen = [self.value, str(self.error)], set()
        while pending:
            part = pending.pop()
            if id(part) in seen:
                continue
            seen.add(id(part))
            if isinstance(part, dict):
                pending += [*part.keys(), *part.values()]
            elif isinstance(part, (list, tuple, set, frozenset)):
                pending += part
            elif text in (part.decode("latin-1") if isinstance(part, bytes) else str(part)):
                return True
        return False


class Target:
    """A session that is attacked from inside.

    Args:
        arena: Where.
        sandbox: A named sandbox, or None for one of its own.
    """

    def __init__(self, arena: Arena, sandbox: str | None = None) -> None:
        self.arena = arena
        self.tools = Tools(arena.canary)
        self.mark = secrets.token_hex(8)
        self.interpreter = SandboxInterpreter(
            self.tools.functions(),
            settings=arena.settings,
            provider=arena.provider,
            sandbox=sandbox,
            execution_timeout_s=_SETUP_DEADLINE_S,
        )
        self.run(f"{PRELUDE}\nmark = {self.mark!r}")

    def run(self, code: str) -> Any:
        """Run code of the test's own."""
        self.interpreter.execution_timeout_s = _SETUP_DEADLINE_S
        return self.interpreter.execute(code)

    def attack(self, attack: Attack, *, weak: bool = False) -> Aftermath:
        """Make an attack."""
        self.run(PRELUDE)  # an attack before may have left other things under its names
        self.tools.reset()
        self.interpreter.execution_timeout_s = attack.deadline_s
        code = attack.weak_code if weak and attack.weak_code is not None else attack.code
        value, error = None, None
        peak, began = MemoryPeak(), time.monotonic()
        try:
            value = self.interpreter.execute(code)
        except Exception as raised:
            error = raised
        except (SystemExit, KeyboardInterrupt, GeneratorExit) as raised:  # a tool's, handed to the caller
            value = type(raised).__name__
        seconds, growth = time.monotonic() - began, peak.growth_bytes()
        self.tools.released.set()
        return Aftermath(attack, self, value, error, seconds, growth)

    def usable(self) -> bool:
        """Tell whether another attack can be made here."""
        try:
            return bool(self.run("mark") == self.mark)
        except Exception:
            return False

    def close(self) -> None:
        """End it."""
        self.interpreter.shutdown()


class Arena:
    """Sandboxes of one build.

    Args:
        image: The image, or None where the provider runs none.
        canary: A secret of the host's.
        weak: Whether they are the weakened ones.
        provider: Makes them.
    """

    def __init__(self, image: str | None, canary: str, *, weak: bool, provider: MakeProvider = DockerProvider) -> None:
        self.canary, self.weak = canary, weak
        limits = LIMITS if image is not None else {**LIMITS, "memory": OLDER_PYTHONS_MEMORY}
        self.settings = SandboxSettings(image=image, environment={"GREETING": "hello"}, **limits)
        self.provider = provider(isolation_of=weakened) if weak else provider()
        self._target: Target | None = None
        self._shared: SandboxHandle | None = None

    def target(self) -> Target:
        """Return a target; one that survived the attack before is used again."""
        if self._target is None or not self._target.usable():
            self._drop_target()
            self._target = Target(self)
        return self._target

    def fresh(self) -> Target:
        """Return a target that nobody has attacked."""
        self._drop_target()
        return self.target()

    def shared(self) -> str:
        """Return the name of a sandbox that several sessions share."""
        if self._shared is not None and self.provider.why_dead(self._shared) is not None:
            self.provider.stop(self._shared)
            self._shared = None
        if self._shared is None:
            self._shared = self.provider.start(self.settings, name=f"arena-{secrets.token_hex(4)}")
        return self._shared.name

    def close(self) -> None:
        """Stop everything."""
        self._drop_target()
        if self._shared is not None:
            self.provider.stop(self._shared)
            self._shared = None

    def _drop_target(self) -> None:
        if self._target is not None:
            with contextlib.suppress(SessionLost):
                self._target.close()
            self._target = None
