"""The safety gate: nothing but checked, clamped, fresh actions of one stream ever comes out, and silence stops the arm."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diwa_core.control.limits import Clamp
from diwa_core.errors import GateError
from diwa_core.evaluate.rollout import executable
from diwa_ros.gate import Chunk, ChunkGate, ClockCheck, State, Watchdog, clamp_actions

STEP = 33_333_333
T0 = 1_000 * STEP


def make_chunk(stamp=T0, actions=None, checkpoint="a", contract="c", step=STEP, hold=False):
    actions = np.zeros((4, 7), np.float32) if actions is None else np.asarray(actions, np.float32)
    return Chunk(stamp, step, actions, hold, checkpoint, contract)


def make_gate():
    return ChunkGate("c", STEP, max_age_s=0.5)


def numbered(first, count=4):
    """Actions whose first component tells them apart."""
    actions = np.zeros((count, 7), np.float32)
    actions[:, 0] = (first + np.arange(count)) / 100
    return actions


def test_waypoints_are_given_at_their_stamps_and_nowhere_else():
    gate = make_gate()
    gate.accept(make_chunk(actions=numbered(1)), T0)
    given_x = [gate.command_at(T0 + i * STEP) for i in range(-1, 5)]
    assert given_x[0] is None and given_x[5] is None
    assert [round(float(c.action[0]) * 100) for c in given_x[1:5]] == [1, 2, 3, 4]


def test_new_chunk_replaces_the_rest_and_drops_its_past():
    gate = make_gate()
    gate.accept(make_chunk(actions=numbered(1)), T0)
    gate.accept(make_chunk(stamp=T0 + STEP, actions=numbered(11)), T0 + 2 * STEP)
    assert [round(float(gate.command_at(T0 + i * STEP).action[0]) * 100) for i in (2, 3, 4)] == [12, 13, 14]


@pytest.mark.parametrize("jitter", [-12_000_000, 12_000_000])
def test_ticks_that_are_not_on_the_grid_take_the_nearest_waypoint(jitter):
    gate = make_gate()
    gate.accept(make_chunk(actions=numbered(1)), T0)
    assert round(float(gate.command_at(T0 + 2 * STEP + jitter).action[0]) * 100) == 3


@pytest.mark.parametrize(
    "chunk, counter, words",
    [
        (make_chunk(actions=np.full((4, 7), np.nan)), "nonfinite", "finite"),
        (make_chunk(actions=np.full((4, 7), np.inf)), "nonfinite", "finite"),
        (make_chunk(actions=np.full((4, 7), 1e6)), "nonfinite", r"at most 10, found 1e\+06"),
        (make_chunk(actions=np.zeros((4, 6))), "shape", r"\(4, 6\)"),
        (make_chunk(actions=np.zeros(27)), "shape", r"\(27,\)"),
        (make_chunk(step=STEP // 2), "shape", "16.7 ms"),
        (make_chunk(stamp=T0 - 20 * STEP), "stale", "age"),
        (make_chunk(stamp=T0 - 5 * STEP), "stale", "now or later"),
        (make_chunk(stamp=T0 + 10 * STEP), "stale", "age"),
        (make_chunk(contract="other"), "foreign", "contract c, found other"),
        (make_chunk(checkpoint="b"), "foreign", "checkpoint a, found b"),
    ],
)
def test_bad_chunk_is_refused_counted_and_changes_nothing(chunk, counter, words):
    gate = make_gate()
    gate.accept(make_chunk(actions=numbered(1)), T0)
    with pytest.raises(GateError, match=words):
        gate.accept(chunk, T0)
    assert getattr(gate.drops, counter) == 1
    assert [round(float(gate.command_at(T0 + i * STEP).action[0]) * 100) for i in range(4)] == [1, 2, 3, 4]


def test_empty_chunk_ends_the_stream_and_lets_another_checkpoint_begin():
    gate = make_gate()
    gate.accept(make_chunk(actions=numbered(1)), T0)
    gate.accept(make_chunk(actions=np.zeros((0, 7))), T0)
    assert gate.command_at(T0) is None
    gate.accept(make_chunk(checkpoint="b"), T0)
    assert gate.command_at(T0).checkpoint_id == "b"


def test_empty_chunk_of_a_foreign_contract_does_not_end_the_stream():
    gate = make_gate()
    gate.accept(make_chunk(actions=numbered(1)), T0)
    with pytest.raises(GateError):
        gate.accept(make_chunk(actions=np.zeros((0, 7)), contract="other"), T0)
    assert gate.command_at(T0) is not None


numbers = st.one_of(st.floats(-3, 3, width=32), st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1e30]))
chunks = st.builds(
    lambda offset, rows, checkpoint, contract, hold: make_chunk(
        T0 + round(offset * STEP), np.array(rows, np.float32).reshape(-1, 7), checkpoint, contract, hold=hold
    ),
    st.floats(-30, 10),
    st.lists(st.lists(numbers, min_size=7, max_size=7), max_size=6),
    st.sampled_from("ab"),
    st.sampled_from(["c", "c", "other"]),
    st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(chunks, st.floats(0, 3)), max_size=12))
def test_whatever_is_sent_only_checked_actions_come_out(sent):
    """Any sequence of chunks at any times: every command is finite, inside the limits, of an accepted chunk and at most `H` steps old."""
    gate = make_gate()
    now = T0
    accepted = []
    for chunk, pause in sent:
        now += round(pause * STEP)
        try:
            gate.accept(chunk, now)
            accepted = [*accepted, chunk] if len(chunk.actions) else []
        except GateError:
            pass
        command = gate.command_at(now)
        if command is None:
            continue
        assert np.isfinite(command.action).all() and np.abs(command.action).max() <= 1
        assert command.action[6] in (-1.0, 1.0)
        source = [c for c in accepted if c.stamp_ns == command.observation_stamp_ns and c.checkpoint_id == command.checkpoint_id]
        assert source and source[-1].contract_id == "c"
        index = round((now - command.observation_stamp_ns) / STEP)
        assert any(0 <= i < len(c.actions) for c in source for i in (index - 1, index, index + 1))
        assert command.checkpoint_id == gate.checkpoint_id


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.floats(-3, 3, width=32), min_size=7, max_size=7), min_size=1, max_size=6))
def test_clamping_equals_the_evaluation_without_ros(rows):
    actions = np.array(rows, np.float32)
    clamped, mask = clamp_actions(actions)
    assert np.array_equal(clamped, executable(actions.copy()))
    assert np.array_equal(mask == Clamp.RANGE, (np.abs(actions) > 1).any(axis=1))


def test_silence_holds_then_stops_and_only_resume_goes_on():
    watchdog = Watchdog(hold_after_s=0.3, stop_after_s=1.0)
    watchdog.connect()
    watchdog.hear(10.0, ends=False)
    watchdog.check(10.29)
    assert watchdog.state == State.ACTIVE
    watchdog.check(10.31)
    assert watchdog.state == State.HOLD and not watchdog.may_command and "0.3 s" in watchdog.reason
    watchdog.hear(10.5, ends=False)
    assert watchdog.state == State.ACTIVE
    watchdog.check(11.6)
    assert watchdog.state == State.FAULT
    watchdog.hear(11.7, ends=False)
    assert watchdog.state == State.FAULT and not watchdog.accepts_chunks
    watchdog.resume()
    assert watchdog.state == State.IDLE
    with pytest.raises(GateError, match="FAULT or USER_STOPPED"):
        watchdog.resume()


def test_user_stop_survives_chunks_and_reconnection():
    watchdog = Watchdog()
    watchdog.connect()
    watchdog.stop()
    watchdog.hear(1.0, ends=False)
    watchdog.connect()
    watchdog.check(99.0)
    assert watchdog.state == State.USER_STOPPED


@pytest.mark.parametrize("stop", [lambda w: w.stop(), lambda w: w.fault("broken")])
def test_a_stop_survives_a_lost_connection(stop):
    watchdog = Watchdog()
    watchdog.connect()
    stop(watchdog)
    state, reason = watchdog.state, watchdog.reason
    watchdog.disconnect("silent")
    watchdog.disconnect("still silent")
    watchdog.connect()
    assert (watchdog.state, watchdog.reason) == (state, reason)
    watchdog.resume()
    watchdog.disconnect("silent")
    watchdog.connect()
    assert watchdog.state == State.IDLE


def test_in_lockstep_silence_is_no_fault():
    watchdog = Watchdog(lockstep=True)
    watchdog.connect()
    watchdog.hear(1.0, ends=False)
    watchdog.check(1000.0)
    assert watchdog.state == State.ACTIVE


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["hear", "end", "stop", "connect", "silent_robot", "resume"]), st.floats(0, 0.6)), max_size=30))
def test_commands_are_allowed_only_while_a_stream_is_fresh(events):
    """In real time, whatever happens: a command is allowed only if a chunk was accepted within the last hold_after_s."""
    watchdog = Watchdog(hold_after_s=0.3, stop_after_s=1.0)
    now, heard = 0.0, -1e9
    for event, pause in events:
        now += pause
        watchdog.check(now)
        if event in ("hear", "end") and watchdog.accepts_chunks:
            heard = now if event == "hear" else -1e9
            watchdog.hear(now, ends=event == "end")
        elif event == "stop":
            watchdog.stop()
        elif event == "connect":
            watchdog.connect()
        elif event == "silent_robot":
            watchdog.disconnect("silent")
        elif event == "resume" and watchdog.state in (State.FAULT, State.USER_STOPPED):
            watchdog.resume()
        assert not watchdog.may_command or now - heard <= 0.3


def test_the_clock_check_tells_a_jump_from_a_late_message():
    clock = ClockCheck(limit_s=0.5)
    stamps_s, arrivals_s = [100.0, 100.1, 100.2, 95.3, 95.4, 101.0], [7.0, 7.1, 7.5, 7.3, 7.4, 7.5]
    jumps = [clock.jump_s(round(stamp * 1e9), now) for stamp, now in zip(stamps_s, arrivals_s, strict=True)]
    assert [round(jump, 1) for jump in jumps] == [0, 0, 0, -4.7, 0, 5.5]
