"""Two sessions of one sandbox: what one does to the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from host_client.errors import SessionLost
from tests.adversarial.arena import Arena, Target
from tests.adversarial.attack import Attack
from tests.adversarial.attacks.neighbours import ATTACKS, PREPARED
from tests.adversarial.outcomes import Broken, Witnesses, check, check_word
from tests.adversarial.test_attacks import assert_falls

pytestmark = pytest.mark.docker

_REAL = [pytest.param(attack, id=attack.name, marks=pytest.mark.family(attack.family)) for attack in ATTACKS]
_WEAK = [
    pytest.param(attack, id=attack.name, marks=pytest.mark.family(attack.family))
    for attack in ATTACKS
    if attack.falls is not None
]


class Neighbourhood:
    """A sandbox with a victim; each attacker is a session of its own there."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._victim: Target | None = None

    def victim(self) -> Target:
        """Return the victim; one that was lost is replaced."""
        if self._victim is None or not self._victim.usable():
            self.close()
            self._victim = Target(self._arena, self._arena.shared())
        return self._victim

    def known(self) -> dict[str, Any]:
        """Prepare the victim, and return what an attacker may know of it: more than it could find out."""
        victim = self.victim()
        victim.attack(Attack(name="", family="neighbours", code="own = forged_call('tally')[1]['call_id']", expects=""))
        pid, uid, home, mark = victim.run(PREPARED)
        call, execution = victim.run("[own, execution_id()]")
        return {"pid": pid, "uid": uid, "home": home, "mark": mark, "call": call, "execution": execution}

    def attacker(self) -> Target:
        """Return a session of its own."""
        return Target(self._arena, self._arena.shared())

    def close(self) -> None:
        """End the victim."""
        if self._victim is not None:
            with contextlib.suppress(SessionLost):
                self._victim.close()
            self._victim = None


@pytest.fixture(scope="module")
def street(arena: Arena) -> Iterator[Neighbourhood]:
    made = Neighbourhood(arena)
    yield made
    made.close()


@pytest.fixture(scope="module")
def weak_street(weak_arena: Arena) -> Iterator[Neighbourhood]:
    made = Neighbourhood(weak_arena)
    yield made
    made.close()


def attack_neighbour(street: Neighbourhood, attack: Attack, witnesses: Witnesses, *, weak: bool) -> None:
    """Let one session attack another of its sandbox."""
    known, victim = street.known(), street.victim()
    attacker = street.attacker()
    try:
        attacker.run(f"victim = {known!r}")
        after = attacker.attack(attack, weak=weak)
        # The victim is the sibling here: it shares the sandbox.
        near = Witnesses(witnesses.canary, witnesses.canary_file, victim.interpreter)
        if weak:
            assert_falls(after, near)
            return
        check(after, near)
        check_word("HOST", after, near)
        if victim.run("mark") != victim.mark:
            raise Broken("the victim lost what it held")
    finally:
        with contextlib.suppress(SessionLost):
            attacker.close()


@pytest.mark.parametrize("attack", _REAL)
def test_a_neighbour_is_spared_by(attack: Attack, street: Neighbourhood, witnesses: Witnesses) -> None:
    attack_neighbour(street, attack, witnesses, weak=False)


@pytest.mark.weakened
@pytest.mark.parametrize("attack", _WEAK)
def test_in_the_weakened_build_a_neighbour_falls_to(
    attack: Attack, weak_street: Neighbourhood, witnesses: Witnesses
) -> None:
    attack_neighbour(weak_street, attack, witnesses, weak=True)


@pytest.mark.family("neighbours")
def test_nothing_of_a_session_is_left_for_the_next_one_with_its_uid(arena: Arena) -> None:
    first = Target(arena, arena.shared())
    left = "['/tmp/left', '/dev/shm/left']"
    first.run(f"for path in {left}: os.mkdir(path); open(path + '/x', 'w').close(); os.chmod(path, 0)")
    daemon = "subprocess.Popen(['sleep', '1000'], start_new_session=True).pid"
    uid, pid = first.run("os.getuid()"), first.run(daemon)
    first.close()
    second = Target(arena, arena.shared())
    try:
        assert second.run("os.getuid()") == uid, "the lowest free slot is taken first"
        assert second.run(f"[path for path in {left} if os.path.lexists(path)]") == []
        assert second.run(f"os.path.exists('/proc/{pid}')") is False
    finally:
        second.close()
