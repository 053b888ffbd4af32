"""Every transition of a pooled sandbox: those that are drawn, and that there are no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from host_client.pool_place import IllegalTransition, Place, PlaceState

STEPS: dict[str, Callable[[Place[str]], None]] = {
    "ready": lambda place: place.ready("sandbox", 1.0),
    "lend": lambda place: place.lend("a", "somebody", 2.0),
    "keep": lambda place: place.keep(3.0),
    "end": lambda place: place.end(4.0),
    "gone": lambda place: place.gone(5.0),
}
#: How to get into each state.
WAYS: dict[PlaceState, list[str]] = {
    PlaceState.STARTING: [],
    PlaceState.WARM: ["ready"],
    PlaceState.LEASED: ["ready", "lend"],
    PlaceState.KEPT: ["ready", "lend", "keep"],
    PlaceState.ENDING: ["ready", "end"],
    PlaceState.GONE: ["gone"],
}
#: As drawn in the module's docstring.
DRAWN = {
    (PlaceState.STARTING, "ready"): PlaceState.WARM,
    (PlaceState.STARTING, "gone"): PlaceState.GONE,
    (PlaceState.WARM, "lend"): PlaceState.LEASED,
    (PlaceState.WARM, "end"): PlaceState.ENDING,
    (PlaceState.LEASED, "keep"): PlaceState.KEPT,
    (PlaceState.LEASED, "end"): PlaceState.ENDING,
    (PlaceState.KEPT, "lend"): PlaceState.LEASED,
    (PlaceState.KEPT, "end"): PlaceState.ENDING,
    (PlaceState.ENDING, "gone"): PlaceState.GONE,
}


def place_in(state: PlaceState) -> Place[str]:
    place: Place[str] = Place(1, 0.0)
    for step in WAYS[state]:
        STEPS[step](place)
    assert place.state is state
    return place


@pytest.mark.parametrize("state", list(PlaceState))
@pytest.mark.parametrize("step", list(STEPS))
def test_a_place_goes_where_it_is_drawn_to_go_and_nowhere_else(state: PlaceState, step: str) -> None:
    place = place_in(state)
    # Nothing is kept for nobody: so a place that is to be refused here for its state gets a session first.
    place.session = "a"
    to = DRAWN.get((state, step))
    if to is not None:
        STEPS[step](place)
        assert place.state is to
        return
    with pytest.raises(IllegalTransition):
        STEPS[step](place)
    assert place.state is state


def test_what_ran_code_of_a_session_goes_to_no_other_one() -> None:
    place = place_in(PlaceState.KEPT)
    for other in (None, "b"):
        with pytest.raises(IllegalTransition, match="of session 'a'"):
            place.lend(other, "somebody", 6.0)
    place.lend("a", "somebody else", 6.0)
    assert (place.uses, place.holder) == (2, "somebody else")


def test_what_ran_code_of_nobody_in_particular_is_not_kept() -> None:
    place = place_in(PlaceState.WARM)
    place.lend(None, "somebody", 2.0)
    with pytest.raises(IllegalTransition, match="kept for no session"):
        place.keep(3.0)
