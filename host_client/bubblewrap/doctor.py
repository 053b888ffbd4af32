"""``rlm-sandbox doctor`` where there is no engine: what a sandbox finds itself, and what would make it stronger."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from broker.protocol.self_test import Check
from host_client.bubblewrap.cgroups import command_prefix
from host_client.bubblewrap.program import bwrap_version, find_bwrap
from host_client.doctor import Layer, landlock_layer, look_inside, shown, table, verdict
from host_client.machine import Machine
from host_client.providers.bubblewrap import BubblewrapProvider, adapted
from host_client.providers.isolation import Isolation
from host_client.settings import SandboxSettings


def run(settings: SandboxSettings, why: str, *, say: Callable[[str], None] = print) -> int:
    """Print the table; return 1 where something that was asked for does not hold.

    Args:
        settings: What to look at.
        why: Why this provider is used.
        say: Prints one line.

    Raises:
        SandboxError: No bubblewrap, no files, or a sandbox that does not start at all.
    """
    say(f"Provider: bubblewrap ({why})")
    wanted = adapted(settings, Isolation.of(settings))
    inside = look_inside(wanted, BubblewrapProvider())
    say("The sandbox, as it finds itself")
    for line in table(inside):
        say(line)
    say("This machine")
    for layer in layers(settings, inside):
        for line in shown(layer):
            say(line)
    return verdict(inside, say)


def layers(settings: SandboxSettings, inside: Sequence[Check], machine: Machine | None = None) -> list[Layer]:
    """Return what would make the boundary stronger, and whether it is there.

    Args:
        settings: What was asked for.
        inside: The sandbox's checks.
        machine: Where ``bwrap`` is.
    """
    machine = machine or Machine()
    version = ".".join(map(str, bwrap_version(machine, find_bwrap(machine))))
    limited = all(check.held for check in inside if check.name in ("memory", "processes and threads", "cores"))
    root = os.geteuid() == 0
    return [
        Layer("kernel", os.uname().release, None),
        Layer("bubblewrap", version, None),
        landlock_layer(inside),
        Layer(
            "users",
            "one for the supervisor, one for the broker, one for each session" if root else "one",
            None
            if root
            else "broker and session share the host user's number, and are kept apart by namespaces; one session in "
            "a sandbox. As root, or with a container engine, each has its own",
        ),
        Layer(
            "control groups",
            "hold" if limited else "not for this user",
            None
            if limited
            else "memory, processes and cores are not limited for the whole sandbox"
            + ("" if command_prefix(settings) else "; with systemd for users (systemd-run --user) they would be"),
        ),
        Layer(
            "a container engine",
            "not used",
            "seccomp, Landlock, namespaces and limits are the same; what is weaker stands in docs/security.md",
        ),
    ]
