"""``rlm-sandbox doctor``: is the boundary on this machine what it should be, and what would make it stronger?

It starts a sandbox, reads its self-test, throws it away, and looks at what the engine says about itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from broker.protocol.self_test import Check
from host_client.connected_sandbox import transport_to
from host_client.engine import connect_engine
from host_client.providers.base import SandboxProvider
from host_client.providers.docker import DockerProvider
from host_client.providers.engine_api import Engine
from host_client.providers.isolation import Isolation
from host_client.providers.launch import self_test
from host_client.providers.self_test import engine_limits
from host_client.settings import SandboxSettings

_NAME_COLUMNS, _WANTED_COLUMNS, _LINE_COLUMNS = 32, 40, 100


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """Something that this machine has or has not, beyond what a sandbox asks for.

    Attributes:
        name: What it is.
        found: What is there.
        costs: What its absence costs, and what helps; None where it is there.
    """

    name: str
    found: str
    costs: str | None


def run(
    settings: SandboxSettings,
    *,
    say: Callable[[str], None] = print,
    connect: Callable[[], Engine] = connect_engine,
    provider: DockerProvider | None = None,
    why: str = "provider='docker' was asked for",
) -> int:
    """Print the table; return 1 where something that was asked for does not hold.

    Args:
        settings: What to look at.
        say: Prints one line.
        connect: Returns the engine.
        provider: Starts the sandbox; by default one like every interpreter's.
        why: Why this provider is used.

    Raises:
        SandboxError: No engine, no image, or a sandbox that does not start at all.
    """
    engine = connect()
    try:
        info = engine.info()
    finally:
        engine.close()
    say(f"Provider: docker ({why})")
    provider = provider or DockerProvider(connect=connect)
    inside = look_inside(settings, provider)
    transport = provider.choose_transport(settings)
    say(f"Transport: {transport.name} ({transport.why})")
    around = engine_limits(info)
    for title, checks in (("The sandbox, as it finds itself", inside), ("The engine's limits", around)):
        say(title)
        for line in table(checks):
            say(line)
    say("This machine")
    for layer in layers(info, inside):
        for line in shown(layer):
            say(line)
    return verdict([*inside, *around], say)


def layers(info: Mapping[str, Any], inside: Sequence[Check]) -> list[Layer]:
    """Return what would make the boundary stronger, and whether it is there.

    Args:
        info: The engine's description of itself.
        inside: The sandbox's checks.
    """
    options = {part for text in info.get("SecurityOptions") or () for part in text.split(",")}
    own_users = "rootless" if "name=rootless" in options else "userns-remap" if "name=userns" in options else None
    mandatory = next((name for name in ("apparmor", "selinux") if f"name={name}" in options), None)
    runsc = next((name for name in info.get("Runtimes") or () if "runsc" in name), None)
    version = str(info.get("CgroupVersion", "1"))
    return [
        Layer("kernel", str(info.get("KernelVersion", "unknown")), None),
        landlock_layer(inside),
        Layer(
            "rootless or userns-remap",
            own_users or "no",
            None
            if own_users
            else "root inside (PID 1 alone, without most rights) is root's number outside. See docs/security.md",
        ),
        Layer(
            "AppArmor or SELinux",
            mandatory or "no",
            None if mandatory else "one layer less around the container; users, seccomp and Landlock do not need it",
        ),
        Layer(
            "gVisor",
            f"as runtime {runsc}" if runsc else "not installed",
            None
            if runsc
            else "the host's kernel is shared: a hole in what seccomp leaves open is a hole in the boundary. Once "
            "installed: RLM_SANDBOX_RUNTIME=runsc",
        ),
        Layer(
            "control groups",
            f"version {version}",
            None
            if version == "2"
            else "version 1 kills single processes, not groups, when memory runs out; limits hold all the same",
        ),
    ]


def landlock_layer(inside: Sequence[Check]) -> Layer:
    """Return whether this kernel has Landlock."""
    found = next((check.found for check in inside if check.name == "Landlock"), "unknown")
    return Layer(
        "Landlock",
        found,
        None
        if found.startswith("on")
        else "a session can make itself as hard to kill as the broker when memory runs out; the sandbox then dies "
        "as a whole, with the reason 'oom'. Kernels from 5.13 on have it",
    )


def look_inside(settings: SandboxSettings, provider: SandboxProvider) -> list[Check]:
    """Start a sandbox, return what it finds itself, and throw it away.

    Raises:
        SandboxError: It does not start at all.
    """
    # Whatever is wrong must become a row of the table, not an error at the first of them.
    lenient = dataclasses.replace(settings, insecure=True)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it would say what the table says
    try:
        handle = provider.start(lenient)
    finally:
        logging.disable(before)
    try:
        with contextlib.closing(transport_to(provider, handle)) as transport:
            return self_test(transport, settings, Isolation.of(settings))
    finally:
        provider.stop(handle)


def table(checks: Sequence[Check]) -> Iterator[str]:
    """Yield the lines of a table of checks."""
    yield f"        {'check':<{_NAME_COLUMNS}}{'wanted':<{_WANTED_COLUMNS}}found"
    for check in checks:
        verdict = "ok  " if check.held else "WEAK"
        row = f"{check.name:<{_NAME_COLUMNS}}{check.wanted:<{_WANTED_COLUMNS}}{check.found}"
        yield f"  {verdict}  {_printable(row)}"
    yield ""


def shown(layer: Layer) -> Iterator[str]:
    """Yield the lines that tell of a layer."""
    mark = "ok  " if layer.costs is None else "--  "
    yield f"  {mark}  {layer.name:<{_NAME_COLUMNS}}{_printable(layer.found)}"
    if layer.costs is not None:
        indent = " " * (8 + _NAME_COLUMNS)
        yield from textwrap.wrap(layer.costs, _LINE_COLUMNS, initial_indent=indent, subsequent_indent=indent)


def verdict(checks: Sequence[Check], say: Callable[[str], None]) -> int:
    """Say what the checks come to; return 1 where one does not hold."""
    failed = [check.name for check in checks if not check.held]
    say("")
    if failed:
        say(f"{len(failed)} of {len(checks)} checks do not hold: {', '.join(failed)}.")
        say("Sandboxes are refused until they do, or until RLM_SANDBOX_INSECURE=1 accepts it. See docs/security.md.")
        return 1
    say(f"All {len(checks)} checks hold. '--' marks what this machine lacks, and what that costs.")
    return 0


def _printable(text: str) -> str:
    """What comes from a sandbox must not steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
