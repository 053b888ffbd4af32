"""Versions of what a saved session needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterable
from typing import Any

_OURS = frozenset({"__main__", "__mp_main__", "broker"})


def versions(packages: Iterable[str]) -> dict[str, Any]:
    """Return what a session would be restored with.

    Args:
        packages: Names of distributions.

    Returns:
        ``{"python", "can", "packages": {name: version, or "" where it is not there}}``; ``can`` tells whether there is
        what saving and restoring take.
    """
    try:
        can = importlib.util.find_spec("cloudpickle") is not None
    except ImportError:
        can = False
    return {
        "python": platform.python_version(),
        "can": can,
        "packages": {name: _version(name) or "" for name in packages},
    }


def needed_by(modules: Iterable[str]) -> dict[str, str]:
    """Return the distributions that modules come from, with their versions; the standard library is left out."""
    tops = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - _OURS
    found, names = {}, None
    for top in sorted(tops):
        version = _version(top)
        if version is not None:
            found[top] = version
            continue
        names = importlib.metadata.packages_distributions() if names is None else names
        found.update({name: _version(name) or "" for name in names.get(top, ())[:1]})
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except Exception:  # not there, or something that is no package's name
        return None
