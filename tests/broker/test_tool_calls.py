"""The tool-call queue: every arrow of the drawing, on a clock that the test moves."""

from __future__ import annotations

import pytest

from broker.errors import CallGone, LeaseExpired, TooManyCalls, UnknownCall
from broker.protocol import limits
from broker.protocol.messages import CallState, ErrorInfo, ToolCallRequest, ToolResult, Verdict
from broker.testing import FakeClock
from broker.tool_calls import REMEMBERED_CALLS, TERMINAL, IllegalTransition, ToolCall, ToolCallQueue


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def queue(clock: FakeClock) -> ToolCallQueue:
    return ToolCallQueue(clock=clock)


def asked(key: str = "k", tool: str = "search") -> ToolCallRequest:
    return ToolCallRequest(key=key, execution_id="e", tool=tool, args=[key])


def answer(value: object, attempt: int = 1) -> ToolResult:
    return ToolResult(attempt=attempt, value=value)


def test_calls_are_claimed_in_the_order_in_which_they_came(queue: ToolCallQueue) -> None:
    made = [queue.submit(asked(str(n))) for n in range(5)]
    assert queue.claim(limit=2, lease_s=60) == made[:2]
    assert queue.claim(limit=10, lease_s=60) == made[2:]
    assert queue.claim(limit=10, lease_s=60) == []


def test_a_claim_leads_to_done_and_the_value_is_kept(queue: ToolCallQueue) -> None:
    call = queue.submit(asked(), [b"blob"], size=4)
    assert call.state is CallState.QUEUED
    queue.claim(limit=1, lease_s=60)
    assert (call.state, call.attempt) == (CallState.LEASED, 1)
    queue.start(call.call_id, 1)
    assert call.state is CallState.STARTED
    queue.finish(call.call_id, answer(42), [b"raw"], size=3)
    assert (call.state, call.value, call.value_blobs) == (CallState.DONE, 42, [b"raw"])
    assert call.blobs == ()  # the arguments' bytes are given back
    assert len(queue) == 0


def test_an_error_of_the_host_ends_the_call_as_failed(queue: ToolCallQueue) -> None:
    call = queue.submit(asked())
    queue.claim(limit=1, lease_s=60, start=True)
    queue.finish(call.call_id, ToolResult(attempt=1, value=7, error=ErrorInfo(type="ValueError", message="no")))
    assert (call.state, call.value) == (CallState.FAILED, None)
    assert call.error == ErrorInfo(type="ValueError", message="no")


def test_the_same_answer_twice_gets_the_stored_outcome(queue: ToolCallQueue) -> None:
    call = queue.submit(asked())
    queue.claim(limit=1, lease_s=60)
    queue.finish(call.call_id, answer("first"))
    assert queue.finish(call.call_id, answer("second")) is call
    assert call.value == "first"


def test_the_same_key_is_the_same_call_even_after_its_end(queue: ToolCallQueue) -> None:
    call = queue.submit(asked("a"))
    assert queue.submit(asked("a")) is call
    queue.claim(limit=1, lease_s=60)
    queue.finish(call.call_id, answer(1))
    assert queue.submit(asked("a")) is call
    assert queue.claimable == 0


def test_a_leased_call_whose_lease_is_lost_goes_back_to_the_head_of_the_queue(
    queue: ToolCallQueue, clock: FakeClock
) -> None:
    first, second = queue.submit(asked("1")), queue.submit(asked("2"))
    queue.claim(limit=1, lease_s=10)
    clock.advance(10)
    assert queue.claim(limit=2, lease_s=10) == [first, second]
    assert (first.attempt, second.attempt) == (2, 1)


def test_a_started_call_whose_lease_is_lost_waits_for_its_holder_and_is_then_unknown(
    queue: ToolCallQueue, clock: FakeClock
) -> None:
    call = queue.submit(asked())
    queue.claim(limit=1, lease_s=10, start=True)
    clock.advance(10)
    queue.expire_leases()
    assert (call.state, call.orphaned) == (CallState.STARTED, True)
    assert queue.claim(limit=1, lease_s=10) == []
    clock.advance(limits.ATTACH_GRACE_S)
    queue.expire_leases()
    assert call.state is CallState.UNKNOWN
    assert call.error is not None
    assert call.error.type == "ToolOutcomeUnknown"
    assert queue.claim(limit=1, lease_s=10) == []
    with pytest.raises(CallGone):
        queue.finish(call.call_id, answer("too late"))


def test_an_expired_holder_whom_nobody_replaced_may_still_answer(queue: ToolCallQueue, clock: FakeClock) -> None:
    call = queue.submit(asked())
    queue.claim(limit=1, lease_s=10)
    clock.advance(60)
    queue.finish(call.call_id, answer("late, but alone"))
    assert (call.state, call.value) == (CallState.DONE, "late, but alone")
    assert queue.claimable == 0


def test_an_expired_holder_who_was_replaced_cannot_answer(queue: ToolCallQueue, clock: FakeClock) -> None:
    call = queue.submit(asked())
    queue.claim(limit=1, lease_s=10)
    clock.advance(11)
    queue.claim(limit=1, lease_s=10)
    with pytest.raises(LeaseExpired):
        queue.finish(call.call_id, answer("late", attempt=1))
    queue.finish(call.call_id, answer("mine", attempt=2))
    with pytest.raises(LeaseExpired):  # nor after the other one has answered
        queue.finish(call.call_id, answer("late", attempt=1))
    assert call.value == "mine"


def test_an_answer_to_a_call_that_nobody_claimed_is_refused(queue: ToolCallQueue) -> None:
    call = queue.submit(asked())
    with pytest.raises(LeaseExpired):
        queue.finish(call.call_id, answer("forged"))
    assert call.state is CallState.QUEUED


def test_starting_after_the_lease_was_lost_is_refused(queue: ToolCallQueue, clock: FakeClock) -> None:
    call = queue.submit(asked())
    queue.claim(limit=1, lease_s=10)
    clock.advance(11)
    with pytest.raises(LeaseExpired):
        queue.start(call.call_id, 1)
    assert call.state is CallState.QUEUED


def test_starting_twice_is_starting_once(queue: ToolCallQueue) -> None:
    call = queue.submit(asked())
    queue.claim(limit=1, lease_s=10)
    assert queue.start(call.call_id, 1) is queue.start(call.call_id, 1)
    assert call.state is CallState.STARTED


def test_a_renewed_lease_lasts_from_its_renewal(queue: ToolCallQueue, clock: FakeClock) -> None:
    call = queue.submit(asked())
    queue.claim(limit=1, lease_s=10, start=True)
    clock.advance(9)
    assert queue.renew([(call.call_id, 1)], 10) == []
    clock.advance(9)
    queue.expire_leases()
    assert call.state is CallState.STARTED
    clock.advance(1)
    queue.expire_leases()
    assert call.orphaned
    assert queue.renew([(call.call_id, 1)], 10) == []  # nobody replaced the holder: it goes on
    assert not call.orphaned
    clock.advance(10 + limits.ATTACH_GRACE_S)
    queue.expire_leases()
    assert call.orphaned
    clock.advance(limits.ATTACH_GRACE_S)
    queue.expire_leases()
    assert call.state is CallState.UNKNOWN


def test_renewing_names_what_is_lost(queue: ToolCallQueue, clock: FakeClock) -> None:
    held, done, lost = (queue.submit(asked(key)) for key in "abc")
    queue.claim(limit=2, lease_s=100)
    queue.claim(limit=1, lease_s=1)
    queue.finish(done.call_id, answer(1))
    clock.advance(2)
    queue.expire_leases()  # back in the queue
    wanted = [(held.call_id, 1), (done.call_id, 1), (lost.call_id, 1), ("nobody's", 1), (held.call_id, 2)]
    assert queue.renew(wanted, 10) == [done.call_id, lost.call_id, "nobody's", held.call_id]


@pytest.mark.parametrize("state", [CallState.CANCELLED, CallState.EXPIRED])
def test_closing_ends_every_open_call_and_refuses_their_answers(queue: ToolCallQueue, state: CallState) -> None:
    queued, leased, started, done = (queue.submit(asked(key)) for key in "abcd")
    queue.claim(limit=4, lease_s=60)
    queue.start(started.call_id, 1)
    queue.finish(done.call_id, answer("kept"))
    queue.close(state)
    assert [call.state for call in (queued, leased, started)] == [state] * 3
    assert (done.state, done.value) == (CallState.DONE, "kept")
    with pytest.raises(CallGone):
        queue.finish(started.call_id, answer("late"))
    assert queue.next_lease_end() is None


def test_every_call_ends_exactly_once(clock: FakeClock) -> None:
    ended: list[str] = []
    queue = ToolCallQueue(clock=clock, on_ended=lambda call: ended.append(call.call_id))
    calls = [queue.submit(asked(str(n))) for n in range(4)]
    queue.claim(limit=1, lease_s=1, start=True)
    queue.claim(limit=1, lease_s=60)
    queue.finish(calls[1].call_id, answer(1))
    queue.finish(calls[1].call_id, answer(1))
    clock.advance(2)
    queue.expire_leases()
    queue.close(CallState.CANCELLED)
    queue.close(CallState.EXPIRED)
    assert sorted(ended) == sorted(call.call_id for call in calls)


def test_too_many_open_calls_are_refused_and_room_comes_back(clock: FakeClock) -> None:
    queue = ToolCallQueue(clock=clock, max_open=2)
    first = queue.submit(asked("1"))
    queue.submit(asked("2"))
    with pytest.raises(TooManyCalls):
        queue.submit(asked("3"))
    queue.claim(limit=1, lease_s=60)
    queue.finish(first.call_id, answer(1))
    with pytest.raises(TooManyCalls):  # its outcome is still held for the caller
        queue.submit(asked("3"))
    queue.note_read(first)
    queue.submit(asked("3"))


def test_too_many_bytes_of_arguments_are_refused_but_one_large_call_is_not(clock: FakeClock) -> None:
    queue = ToolCallQueue(clock=clock, max_open_bytes=100)
    large = queue.submit(asked("1"), size=500)
    with pytest.raises(TooManyCalls):
        queue.submit(asked("2"), size=1)
    queue.claim(limit=1, lease_s=60)
    queue.finish(large.call_id, answer(1))
    queue.submit(asked("2"), size=1)


def test_a_call_is_forgotten_only_after_its_outcome_was_read(queue: ToolCallQueue) -> None:
    unread = queue.submit(asked("unread"))
    queue.claim(limit=1, lease_s=60)
    queue.finish(unread.call_id, answer("still here"))
    for n in range(REMEMBERED_CALLS + 1):
        call = queue.submit(asked(str(n)))
        queue.claim(limit=1, lease_s=60)
        queue.finish(call.call_id, answer(n))
        queue.note_read(call)
        queue.note_read(call)
        if n == 0:
            oldest = call
    assert queue.get(unread.call_id).value == "still here"
    with pytest.raises(UnknownCall):
        queue.get(oldest.call_id)
    assert queue.submit(asked("0")) is not oldest  # its key is free again


def test_ids_are_the_queues_own_and_differ_between_queues(queue: ToolCallQueue) -> None:
    ids = {queue.submit(asked(str(n))).call_id for n in range(100)}
    assert len(ids) == 100
    other = ToolCallQueue().submit(asked("0")).call_id
    assert other not in ids


@pytest.mark.parametrize("state", sorted(TERMINAL, key=lambda state: state.value))
def test_no_terminal_state_is_ever_left(queue: ToolCallQueue, state: CallState) -> None:
    call = ToolCall("c", asked(), (), 0, state=state)
    for to in CallState:
        with pytest.raises(IllegalTransition):
            queue._move(call, to)


# Calls that went by the lane


def begun(queue: ToolCallQueue, key: str = "1", lease_s: float = 60) -> ToolCall:
    call = queue.begun(f"e-{key}", asked(key), size=1, idempotent=False, lease_s=lease_s)
    assert call is not None
    return call


def test_a_call_that_went_by_the_lane_is_started_and_waits_for_its_holders_answer_alone(queue: ToolCallQueue) -> None:
    call = begun(queue)
    assert (call.call_id, call.state, call.attempt, queue.held, queue.claimable) == ("e-1", CallState.STARTED, 1, 1, 0)
    assert queue.claim(limit=10, lease_s=60) == []
    queue.finish("e-1", answer("told"))
    assert (call.state, call.value, len(queue)) == (CallState.DONE, "told", 0)


def test_the_same_call_by_the_lane_again_or_under_a_key_that_was_posted_is_none(queue: ToolCallQueue) -> None:
    begun(queue)
    assert queue.begun("e-1", asked("1"), size=1, idempotent=False, lease_s=60) is None
    posted = queue.submit(asked("2"))
    assert queue.begun("e-2", asked("2"), size=1, idempotent=False, lease_s=60) is None
    assert queue.submit(asked("1")) is queue.get("e-1")
    assert queue.claim(limit=10, lease_s=60) == [posted]


def test_calls_by_the_lane_count_like_others() -> None:
    queue = ToolCallQueue(max_open=2, max_open_bytes=10)
    queue.begun("e-1", asked("1"), size=8, idempotent=False, lease_s=60)
    with pytest.raises(TooManyCalls):
        queue.begun("e-2", asked("2"), size=3, idempotent=False, lease_s=60)
    queue.begun("e-2", asked("2"), size=2, idempotent=False, lease_s=60)
    with pytest.raises(TooManyCalls):
        queue.begun("e-3", asked("3"), size=0, idempotent=False, lease_s=60)


def test_a_call_by_the_lane_is_offered_once_more_as_the_same_attempt(queue: ToolCallQueue) -> None:
    call = begun(queue)
    queue.offer_again(call)
    queue.offer_again(call)
    assert (queue.claimable, queue.held) == (1, 0)
    assert queue.claim(limit=10, lease_s=60, start=True) == [call]
    assert (call.state, call.attempt, queue.claimable, queue.held) == (CallState.STARTED, 1, 0, 1)


def test_an_answer_takes_the_offer_back(queue: ToolCallQueue) -> None:
    call = begun(queue)
    queue.offer_again(call)
    queue.finish(call.call_id, answer(1))
    assert (call.state, queue.claimable, queue.claim(limit=10, lease_s=60)) == (CallState.DONE, 0, [])
    queue.offer_again(call)
    assert queue.claimable == 0


@pytest.mark.parametrize("start", [False, True])
def test_a_call_that_was_claimed_is_never_offered_again(queue: ToolCallQueue, start: bool) -> None:
    call = queue.submit(asked())
    queue.claim(limit=1, lease_s=60, start=start)
    queue.offer_again(call)
    assert queue.claimable == 0


def test_a_new_holder_is_told_of_a_call_by_the_lane_and_alone_says_what_becomes_of_it(queue: ToolCallQueue) -> None:
    call = begun(queue)
    queue.offer_again(call)
    assert queue.take_over() == [call]
    queue.offer_again(call)
    assert queue.claim(limit=10, lease_s=60) == []
    queue.resolve(call.call_id, 1, Verdict.QUEUED)
    assert queue.claim(limit=10, lease_s=60, start=True) == [call]
    assert call.attempt == 2
    queue.offer_again(call)
    assert queue.claim(limit=10, lease_s=60) == []


def test_a_call_by_the_lane_whose_holder_falls_silent_is_unknown_in_the_end(
    queue: ToolCallQueue, clock: FakeClock
) -> None:
    call = begun(queue, lease_s=10)
    queue.offer_again(call)
    clock.advance(10)
    queue.expire_leases()
    assert queue.claim(limit=1, lease_s=60) == []
    clock.advance(limits.ATTACH_GRACE_S)
    queue.expire_leases()
    assert call.state is CallState.UNKNOWN
