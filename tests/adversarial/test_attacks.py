"""Every attack from inside a sandbox, against the real build and, where it can tell them apart, the weakened one."""

from __future__ import annotations

import pytest

from host_client.errors import SessionLost
from tests.adversarial.arena import Aftermath, Arena
from tests.adversarial.attack import Attack
from tests.adversarial.attacks import ALL
from tests.adversarial.outcomes import Broken, Witnesses, check, check_word

pytestmark = pytest.mark.docker

_REAL = [pytest.param(attack, id=attack.name, marks=pytest.mark.family(attack.family)) for attack in ALL]
_WEAK = [
    pytest.param(attack, id=attack.name, marks=pytest.mark.family(attack.family))
    for attack in ALL
    if attack.falls is not None
]


def test_every_attack_has_a_name_of_its_own() -> None:
    assert len({attack.name for attack in ALL}) == len(ALL)


@pytest.mark.parametrize("attack", _REAL)
def test_the_real_build_holds_against(attack: Attack, arena: Arena, witnesses: Witnesses) -> None:
    check(arena.target().attack(attack), witnesses)


@pytest.mark.weakened
@pytest.mark.parametrize("attack", _WEAK)
def test_the_weakened_build_falls_to(attack: Attack, weak_arena: Arena, witnesses: Witnesses) -> None:
    assert_falls(weak_arena.target().attack(attack, weak=True), witnesses)


def assert_falls(after: Aftermath, witnesses: Witnesses) -> None:
    """The attack succeeds: its word is broken, and not by a mistake in its own code."""
    word = after.attack.falls
    assert word is not None
    assert after.error is None or isinstance(after.error, SessionLost), after.error
    if word == "DENY":
        assert after.value == "worked", f"denied here too: {after.value!r}"
        return
    with pytest.raises(Broken):
        check_word(word, after, witnesses)
