"""The attacks of one session on everything around it, one file for each family."""

from __future__ import annotations

from tests.adversarial.attack import Attack
from tests.adversarial.attacks import (
    files,
    forgery,
    frames,
    log_injection,
    network,
    privileged,
    protocol,
    resources,
    stubborn,
)

ALL: list[Attack] = [
    *forgery.ATTACKS,
    *network.ATTACKS,
    *files.ATTACKS,
    *privileged.ATTACKS,
    *log_injection.ATTACKS,
    *protocol.ATTACKS,
    *frames.ATTACKS,
    *stubborn.ATTACKS,
    *resources.ATTACKS,
]
