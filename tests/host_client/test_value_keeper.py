"""Claims about values that the worker keeps."""

from __future__ import annotations

from broker.protocol.values import Decoder, Encoder
from host_client.value_keeper import ValueKeeper

BIG = "x" * 100_000


def _send(keeper: ValueKeeper, kept: dict[str, object], arrived: bool = True, **variables: object) -> int:
    """One execution as host and worker see it; returns how many bytes travelled beside the JSON."""
    encoder = Encoder(keeper=keeper)
    encoded = {name: encoder.encode(value, name) for name, value in variables.items()}
    for key in keeper.drop():
        kept.pop(key, None)
    keeper.settle(arrived=arrived)
    if arrived:
        decoder = Decoder(encoder.blobs, kept=kept)
        assert {name: decoder.decode(value) for name, value in encoded.items()} == variables
    return sum(map(len, encoder.blobs))


def test_a_large_value_travels_once() -> None:
    keeper, kept = ValueKeeper(), {}
    assert _send(keeper, kept, context=BIG) == len(BIG)
    assert _send(keeper, kept, context=BIG) == 0


def test_an_equal_value_is_recognised_without_being_the_same_object() -> None:
    keeper, kept = ValueKeeper(), {}
    _send(keeper, kept, context=BIG)
    assert _send(keeper, kept, context="x" * len(BIG)) == 0


def test_another_value_of_the_same_length_is_not_mistaken_for_it() -> None:
    keeper, kept = ValueKeeper(), {}
    _send(keeper, kept, context=BIG)
    assert _send(keeper, kept, context="y" * len(BIG)) == len(BIG)
    assert _send(keeper, kept, context=b"y" * len(BIG)) == len(BIG)


def test_values_inside_containers_are_kept_too() -> None:
    keeper, kept = ValueKeeper(), {}
    assert _send(keeper, kept, documents=[BIG, {"more": BIG + "!"}]) == 2 * len(BIG) + 1
    assert _send(keeper, kept, documents=[BIG, {"more": BIG + "!"}]) == 0


def test_what_an_execution_does_not_use_is_dropped_on_both_sides() -> None:
    keeper, kept = ValueKeeper(), {}
    _send(keeper, kept, context=BIG)
    _send(keeper, kept, other=1)
    assert kept == {}
    assert _send(keeper, kept, context=BIG) == len(BIG)


def test_memory_is_bounded_by_the_inputs_of_one_execution() -> None:
    keeper, kept = ValueKeeper(), {}
    for number in range(20):
        _send(keeper, kept, context=BIG + str(number))
    assert len(kept) == 1


def test_a_value_that_may_not_have_arrived_is_sent_again_under_another_id() -> None:
    keeper, kept = ValueKeeper(), {}
    _send(keeper, kept, arrived=False, context=BIG)
    assert _send(keeper, kept, context=BIG) == len(BIG)
    assert list(kept) == ["v2"]


def test_a_value_that_was_there_before_a_failure_is_still_known_after_it() -> None:
    keeper, kept = ValueKeeper(), {}
    _send(keeper, kept, context=BIG)
    _send(keeper, kept, arrived=False, context=BIG)
    assert _send(keeper, kept, context=BIG) == 0
