"""The command ``secrets check``: which secrets are there, and whether they arrive, without showing them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from host_client.errors import BadSetting
from host_client.providers.base import SandboxProvider
from host_client.secret_values import Secrets
from host_client.settings import SandboxSettings

#: Tells of each name whether generated code finds something under it.
_LOOK = "import os\n[name for name in names if os.environ.get(name)]"
_NAME_COLUMNS = 32


def run(
    names: Sequence[str],
    settings: SandboxSettings,
    *,
    say: Callable[[str], None] = print,
    prepare: Callable[[SandboxSettings], object] = lambda settings: None,
    provider: SandboxProvider | None = None,
) -> int:
    """Print a line for each secret; return 1 where one is missing, cannot be used, or does not arrive.

    Args:
        names: Names of variables; by default those that the settings name.
        settings: How the sandbox is made that is asked.
        say: Prints one line.
        prepare: Brings up what a sandbox needs; called where there is something to ask it.
        provider: Where the sandbox comes from.

    Raises:
        BadSetting: A name that cannot be one.
        SandboxError: The sandbox does not start.
    """
    secrets = Secrets.of(names or settings.secrets)
    if not secrets:
        say("no secrets are named; name them: rlm-sandbox secrets check NAME, or RLM_SANDBOX_SECRETS=NAME,OTHER")
        return 1
    unusable = {name: problem for name in secrets if (problem := _problem(name, secrets))}
    usable = [name for name in secrets if name not in unusable]
    arrived = _look_inside(usable, secrets, settings, prepare, provider) if usable else set()
    for name, found in secrets.presence().items():
        inside = "in the sandbox: present" if name in arrived else "in the sandbox: absent"
        say(f"{name:<{_NAME_COLUMNS}}{found:<9}{inside}")
    for problem in unusable.values():
        say(problem)
    return 0 if len(arrived) == len(secrets) else 1


def _problem(name: str, secrets: Secrets) -> str | None:
    try:
        secrets.only([name]).values()
    except BadSetting as error:
        return error.message
    return None


def _look_inside(
    names: Iterable[str],
    secrets: Secrets,
    settings: SandboxSettings,
    prepare: Callable[[SandboxSettings], object],
    provider: SandboxProvider | None,
) -> set[str]:
    """Return the names under which generated code finds something, in a sandbox that is thrown away."""
    from host_client.interpreter import SandboxInterpreter  # which imports DSPy

    prepare(settings)
    asked = dataclasses.replace(settings, secrets=secrets.only(names), journal=":memory:")
    with SandboxInterpreter(settings=asked, provider=provider) as interpreter:
        return set(interpreter.execute(_LOOK, {"names": list(names)}))
