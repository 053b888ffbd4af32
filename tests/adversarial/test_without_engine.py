"""The same attacks on sandboxes without an engine: every family, one sandbox for as many attacks as it survives.

What the broker alone answers for is the same code as in a container, so of these families one attack in eight is made;
and of bombs and loops, which take their time, one of each kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
from _pytest.mark import ParameterSet

from host_client import SandboxInterpreter
from host_client.providers.bubblewrap import BubblewrapProvider
from tests.adversarial.arena import Arena
from tests.adversarial.attack import Attack
from tests.adversarial.attacks import ALL
from tests.adversarial.attacks.neighbours import ATTACKS as NEIGHBOURS
from tests.adversarial.outcomes import Witnesses, check
from tests.adversarial.test_attacks import assert_falls
from tests.adversarial.test_neighbours import Neighbourhood, attack_neighbour
from tests.bubblewrap.sandboxes import make_ready

pytestmark = [pytest.mark.docker, pytest.mark.provider("bubblewrap")]

_THE_BROKERS = ("protocol", "lifecycle")
_ONE_IN = 8
#: Held here even by the weakened build: the pipe of the log is the keeper's, whom nothing inside is.
_STRONGER = {"PID 1's error stream"}


def _cases(attacks: Iterable[Attack]) -> list[ParameterSet]:
    return [pytest.param(attack, id=attack.name, marks=pytest.mark.family(attack.family)) for attack in attacks]


#: By what ends them: an interrupt, the end of the worker, the end of a process that runs no more.
_LOOPS = {
    "loop: in Python",
    "loop: in C with the lock held",
    "loop: interrupts ignored",
    "loop: a process that stops itself",
}
#: The other bombs are of the same kinds: processes, memory.
_AGAIN = {"bomb: forks", "bomb: memory of processes that were executed anew", "bomb: memory without a name"}
_AGAIN |= {attack.name for attack in ALL if attack.name.startswith("loop:")} - _LOOPS
_SAMPLE = [attack for attack in ALL if attack.family in _THE_BROKERS][::_ONE_IN]
_REAL = [attack for attack in ALL if attack.family not in _THE_BROKERS and attack.name not in _AGAIN] + _SAMPLE
_WEAK = [attack for attack in _REAL if attack.falls is not None and attack.name not in _STRONGER]
#: Those that end at once; what floods and bombs do to a neighbour is the control group's affair.
_NEAR = [attack for attack in NEIGHBOURS if "DENY" in attack.expects or "VALUE" in attack.expects]


@pytest.fixture(scope="module")
def near(witnesses: Witnesses) -> Iterator[Witnesses]:
    """The host's canary, and a sibling made by the same provider."""
    make_ready()
    settings = Arena(None, witnesses.canary, weak=False, provider=BubblewrapProvider).settings
    with SandboxInterpreter(settings=settings, provider=BubblewrapProvider()) as sibling:
        yield Witnesses(witnesses.canary, witnesses.canary_file, sibling)


@pytest.fixture(scope="module")
def bare_arena(near: Witnesses) -> Iterator[Arena]:
    made = Arena(None, near.canary, weak=False, provider=BubblewrapProvider)
    yield made
    made.close()


@pytest.fixture(scope="module")
def weak_bare_arena(near: Witnesses) -> Iterator[Arena]:
    made = Arena(None, near.canary, weak=True, provider=BubblewrapProvider)
    yield made
    made.close()


@pytest.fixture(scope="module")
def bare_street(bare_arena: Arena) -> Iterator[Neighbourhood]:
    made = Neighbourhood(bare_arena)
    yield made
    made.close()


def test_the_sample_has_every_family_of_attacks_from_inside() -> None:
    assert {attack.family for attack in ALL} == {attack.family for attack in _REAL}
    assert {attack.name for attack in _REAL} >= _LOOPS
    assert {attack.family for attack in NEIGHBOURS} == {attack.family for attack in _NEAR}


@pytest.mark.parametrize("attack", _cases(_REAL))
def test_without_an_engine_it_holds_against(attack: Attack, bare_arena: Arena, near: Witnesses) -> None:
    check(bare_arena.target().attack(attack), near)
    if attack.name.startswith("bomb:"):
        bare_arena.fresh()  # its children may hold memory for half a minute, of which the next attack would die


@pytest.mark.weakened
@pytest.mark.parametrize("attack", _cases(_WEAK))
def test_without_an_engine_the_weakened_build_falls_to(attack: Attack, weak_bare_arena: Arena, near: Witnesses) -> None:
    assert_falls(weak_bare_arena.target().attack(attack, weak=True), near)


@pytest.mark.parametrize("attack", _cases(_NEAR))
def test_without_an_engine_a_neighbour_is_spared_by(
    attack: Attack, bare_street: Neighbourhood, near: Witnesses
) -> None:
    attack_neighbour(bare_street, attack, near, weak=False)
