"""The seccomp profile that the engine is handed: ours, from ``sandbox_image/seccomp.json``, or the user's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sandbox_image
from host_client.errors import BadSetting

_FILE = "seccomp.json"
#: Our own part of the file, which engines do not know: rules that a setting adds.
_OURS = "rlmSandbox"
#: A profile goes into every request for a container.
_MAX_PROFILE_BYTES = 1 << 20

Profile = dict[str, Any]


def own_profile(*, network: bool = False) -> Profile:
    """Return our profile, as the engine wants it.

    Args:
        network: With the rules for internet sockets.
    """
    profile: Profile = json.loads((Path(sandbox_image.__path__[0]) / _FILE).read_text("utf-8"))
    added: Mapping[str, Any] = profile.pop(_OURS)
    if network:
        profile["syscalls"] += added["network"]
    return profile


def read_profile(path: str) -> Profile:
    """Return a profile of the user's, in Docker's format.

    Raises:
        BadSetting: The file cannot be read, or is no such profile.
    """
    setting = f"setting seccomp={path!r}"
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_MAX_PROFILE_BYTES + 1)
        profile = json.loads(raw)
    except OSError as error:
        raise BadSetting(f"{setting}: the profile cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadSetting(f"{setting}: the profile is not JSON: {error}") from error
    if len(raw) > _MAX_PROFILE_BYTES:
        raise BadSetting(f"{setting}: the profile is larger than {_MAX_PROFILE_BYTES} bytes")
    if not isinstance(profile, dict) or not str(profile.get("defaultAction", "")).startswith("SCMP_ACT_"):
        raise BadSetting(
            f"{setting}: this is no seccomp profile: it has no defaultAction",
            help="sandbox_image/seccomp.json is one; Docker's documentation has the format",
        )
    return profile
