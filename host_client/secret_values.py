"""Secrets for generated code: which ones, and where their values come from. What shows them shows their names only."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from broker.protocol.opening import secret_name_problem, secrets_problem
from host_client.env_file import read_env_file
from host_client.errors import BadSetting

#: A shorter text is found by chance in any output: masking it would mangle that, and not masking it would show it.
MIN_CHARS = 6

#: Looked at for names that the environment has not; in the folder that the process runs in.
ENV_FILE = Path(".env")


class Secrets(Collection[str]):
    """The secrets of a session: names with values, or names alone, whose values are read when a session is opened.

    A collection of their names. ``repr`` has the names only; values that were given cannot be pickled.

    Args:
        given: Values by name.
        named: Names whose values the environment has, or ``.env``.

    Raises:
        BadSetting: A name or value that cannot be a secret; the message has no value.
    """

    __slots__ = ("_given", "_named")

    def __init__(self, given: Mapping[str, str] | None = None, named: Collection[str] = ()) -> None:
        self._given = dict(given or {})
        self._named = tuple(dict.fromkeys(named))
        for name in self:
            _refuse(secret_name_problem(name))
        _check_values(self._given)

    @classmethod
    def of(cls, secrets: Any) -> Secrets:
        """Return secrets from ``{"NAME": value}`` or ``["NAME"]``; None and an empty one stand for none.

        Raises:
            BadSetting: It is something else, or cannot be.
        """
        if isinstance(secrets, Secrets):
            return secrets
        if isinstance(secrets, Mapping):
            return cls(given=secrets)
        if secrets is None or (isinstance(secrets, Collection) and not isinstance(secrets, (str, bytes))):
            return cls(named=secrets or ())
        # Not shown: it may be the value itself.
        raise BadSetting(
            f"secrets must be a dict of names and values, or a list of names, got {type(secrets).__name__}"
        )

    def values(self, environ: Mapping[str, str] | None = None, env_file: Path = ENV_FILE) -> dict[str, str]:
        """Return the values by name, as they are now.

        Args:
            environ: By default this process' environment; it wins over the file.
            env_file: Need not exist.

        Raises:
            BadSetting: One is missing, empty or impossible; the message names it.
        """
        values = {**self._given, **self._look_up(environ, env_file)}
        for name in self._named:
            if not values.get(name):
                raise BadSetting(
                    f"secret {name}: it is {'empty' if name in values else 'missing'} in the environment and in .env",
                    help="rlm-sandbox secrets check shows which ones are there",
                )
        _check_values(values)
        return values

    def only(self, names: Iterable[str]) -> Secrets:
        """Return some of these secrets."""
        wanted = set(names)
        given = {name: value for name, value in self._given.items() if name in wanted}
        return Secrets(given, [name for name in self._named if name in wanted])

    def presence(self, environ: Mapping[str, str] | None = None, env_file: Path = ENV_FILE) -> dict[str, str]:
        """Return ``set``, ``empty`` or ``missing`` by name."""
        found = {**self._given, **self._look_up(environ, env_file)}
        return {name: "missing" if name not in found else "set" if found[name] else "empty" for name in self}

    def __contains__(self, name: object) -> bool:
        return name in self._given or name in self._named

    def __iter__(self) -> Iterator[str]:
        return iter((*self._given, *(name for name in self._named if name not in self._given)))

    def __len__(self) -> int:
        return len(set(self._given).union(self._named))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secrets):
            return NotImplemented
        return (self._given, self._named) == (other._given, other._named)

    def __hash__(self) -> int:
        return hash(frozenset(self))

    def __repr__(self) -> str:
        return f"Secrets({', '.join(self)})"

    def __copy__(self) -> Secrets:
        return self  # nothing in it changes

    def __deepcopy__(self, memo: dict[int, Any]) -> Secrets:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self._given:
            self._not_pickled()
        return type(self), (None, self._named)

    def _look_up(self, environ: Mapping[str, str] | None, env_file: Path) -> dict[str, str]:
        if not self._named:
            return {}
        found = {**read_env_file(env_file), **(os.environ if environ is None else environ)}
        return {name: found[name] for name in self._named if name in found and name not in self._given}

    def _not_pickled(self) -> NoReturn:
        raise TypeError(
            f"the values of secrets ({', '.join(self._given)}) are not pickled; give names alone, "
            "secrets=['NAME'], and let each process read them from its environment"
        )


def _check_values(values: Mapping[str, str]) -> None:
    _refuse(secrets_problem(values))
    for name, value in values.items():
        if len(value) < MIN_CHARS:
            raise BadSetting(
                f"secret {name}: it has fewer than {MIN_CHARS} characters, too few to be masked in what code prints",
                help="what need not be masked can be set with environment={...}",
            )


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise BadSetting(problem)
