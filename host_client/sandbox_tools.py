"""Checks, before any code runs, that a sandbox has what the tools that run in it need."""

from __future__ import annotations

from collections.abc import Sequence

from host_client.aside import Aside
from host_client.errors import BadSetting, MalformedReply
from host_client.tool_definitions import HostTool


def check_shipped(tools: Sequence[HostTool], aside: Aside) -> None:
    """Ask the session for the packages that these tools need; without such needs it is not asked.

    Raises:
        BadSetting: Something is missing there, or has another version; the message names tool and package.
        SandboxError: The session gave no answer.
    """
    needs = {tool.name: tool.marks.shipped for tool in tools if tool.marks.shipped is not None}
    requirements = sorted({each for need in needs.values() for each in need.requirements})
    modules = sorted({each for need in needs.values() for each in need.modules})
    if not requirements and not modules:
        return
    missing = aside.ask("missing", requirements=requirements, modules=modules)
    if not isinstance(missing, dict):
        raise MalformedReply("the session did not say which packages it has")
    for name, need in needs.items():
        for each in (*need.requirements, *need.modules):
            if each in missing:
                raise _missing(name, each, str(missing[each]))


def _missing(tool: str, what: str, there: str) -> BadSetting:
    package = what.partition("==")[0]
    found = f"has version {there[:80]} of it" if there else "does not have it"
    return BadSetting(
        f"tool {tool!r} needs {what!r}, and the sandbox's image {found}",
        help=f"add it: SandboxSettings(packages=({package!r},)), RLM_SANDBOX_PACKAGES={package}, or a line in "
        "sandbox_image/requirements-guest.txt and `make image`",
    )
