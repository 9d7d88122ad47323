"""Frames on the camera clock: equal stamps in simulation, the newest earlier sample on a robot, and named faults for bad streams."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diwa_core.contract import Contract
from diwa_core.data.alignment import EXECUTED, JOINTS, POSE, TARGET, FrameAligner
from diwa_core.errors import DataError

STEP = 33_333_333
STREAMS = ("rgb_static", "rgb_gripper", JOINTS, POSE, TARGET, EXECUTED)


def make_value(name, number):
    """A value of the stream's shape that tells which sample it is."""
    if name.startswith("rgb"):
        return np.full((64, 64, 3), number % 256, np.uint8)
    return np.full({JOINTS: 8, POSE: 6, TARGET: 6, EXECUTED: 7}[name], float(number))


def make_aligner(**arguments):
    return FrameAligner(Contract(), **arguments)


def add_tick(aligner, n, skip=(), now_s=None):
    for name in STREAMS:
        if name not in skip:
            aligner.add(name, n * STEP, make_value(name, n), n / 30 if now_s is None else now_s)


def test_frame_is_complete_only_with_every_stream():
    aligner = make_aligner()
    for name in STREAMS[:-1]:
        aligner.add(name, STEP, make_value(name, 1), 0.0)
        assert aligner.pop() == []
    aligner.add(EXECUTED, STEP, make_value(EXECUTED, 1), 0.0)
    (frame,) = aligner.pop()
    assert frame.stamp_ns == STEP and aligner.pop() == []
    observation = frame.observation
    assert observation.robot_obs.shape == (15,) and (observation.robot_obs == 1).all() and (observation.target_pose == 1).all()


def test_robot_obs_has_calvins_order():
    aligner = make_aligner()
    values = {JOINTS: np.arange(10.0, 18.0), POSE: np.arange(6.0), TARGET: np.zeros(6), EXECUTED: np.array([0, 0, 0, 0, 0, 0, -1.0])}
    for name in STREAMS:
        aligner.add(name, STEP, values.get(name, make_value(name, 1)), 0.0)
    (frame,) = aligner.pop()
    assert frame.observation.robot_obs.tolist() == [0, 1, 2, 3, 4, 5, 17, 10, 11, 12, 13, 14, 15, 16, -1]


@settings(max_examples=150, deadline=None)
@given(st.permutations([(n, name) for n in range(1, 5) for name in STREAMS]))
def test_any_order_between_streams_gives_frames_of_equal_stamps_only(arrivals):
    """Samples of each stream in order, streams interleaved anyhow: no frame ever mixes stamps, and the last frame always comes."""
    by_stream = {name: iter(range(1, 5)) for name in STREAMS}
    aligner, frames = make_aligner(max_skew_s=0.0), []
    for _, name in arrivals:
        n = next(by_stream[name])
        aligner.add(name, n * STEP, make_value(name, n), 0.0)
        frames += aligner.pop()
    stamps = [frame.stamp_ns // STEP for frame in frames]
    assert stamps == sorted(set(stamps)) and stamps[-1] == 4
    for frame, n in zip(frames, stamps, strict=True):
        assert (frame.observation.robot_obs == n).all() and (frame.previous_action == n).all()
        assert all((image == n).all() for image in frame.observation.images.values())
    assert aligner.skipped == 4 - len(frames)


def test_free_running_streams_wait_until_passed_and_take_the_newest_before():
    aligner = make_aligner(max_skew_s=0.02)
    add_tick(aligner, 3, skip=(JOINTS,))
    aligner.add(JOINTS, 3 * STEP - 15_000_000, make_value(JOINTS, 7), 0.0)
    assert aligner.pop() == []
    aligner.add(JOINTS, 3 * STEP + 1_000_000, make_value(JOINTS, 8), 0.0)
    (frame,) = aligner.pop()
    assert (frame.observation.robot_obs[6:14] == 7).all()


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_free_running_camera_and_robot_give_nearly_every_frame(phase, seed):
    """Camera and robot at 30 Hz each, any phase, 3 ms of jitter: the executed action of every frame ended less than a step away."""
    rng = np.random.default_rng(seed)
    jitter = lambda: int(rng.uniform(-3e6, 3e6))  # noqa: E731
    arrivals = []
    for n in range(10, 50):
        camera, robot = n * STEP + jitter(), round((n + phase) * STEP) + jitter()
        arrivals += [(camera, name, camera) for name in STREAMS[:2]] + [(robot, name, robot) for name in STREAMS[2:]]
    aligner, frames = make_aligner(max_skew_s=0.045), []
    for _, name, stamp in sorted(arrivals):
        aligner.add(name, stamp, make_value(name, stamp // STEP), stamp / 1e9)
        frames += aligner.pop()
    assert len(frames) >= 30


def test_sample_beyond_the_skew_gives_no_frame_and_a_named_fault():
    aligner = make_aligner(max_skew_s=0.02)
    add_tick(aligner, 3, skip=("rgb_gripper",))
    aligner.add("rgb_gripper", 3 * STEP - 30_000_000, make_value("rgb_gripper", 1), 0.0)
    aligner.add("rgb_gripper", 3 * STEP + 3_000_000, make_value("rgb_gripper", 2), 0.0)
    assert aligner.pop() == []
    assert [(f.stream, "max_skew_s" in f.message) for f in aligner.find_faults(0.1, may_rest=False)] == [("rgb_gripper", True)]


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("may_rest", [True, False])
def test_missing_stream_is_named(name, may_rest):
    aligner = make_aligner(timeout_s=0.5)
    for n in range(1, 40):
        add_tick(aligner, n, skip=(name,))
    assert aligner.pop() == []
    assert [(f.stream, f.message) for f in aligner.find_faults(40 / 30, may_rest)] == [(name, "nothing has ever arrived")]


def test_lockstep_stall_names_the_stream_that_is_missing():
    """In lock-step everything stops with the missing stream; the others are silent too, but not behind."""
    aligner = make_aligner(timeout_s=0.5)
    add_tick(aligner, 1)
    assert len(aligner.pop()) == 1
    add_tick(aligner, 2, skip=("rgb_static",), now_s=100.0)
    assert aligner.find_faults(100.1, may_rest=True) == []
    assert [f.stream for f in aligner.find_faults(100.6, may_rest=True)] == ["rgb_static"]


def test_nothing_at_all_is_a_fault_only_after_the_timeout():
    aligner = make_aligner(timeout_s=0.5)
    assert aligner.find_faults(10.0, may_rest=False) == aligner.find_faults(10.4, may_rest=False) == []
    assert [f.message for f in aligner.find_faults(10.6, may_rest=False)] == ["nothing has arrived yet"]


def test_resting_together_is_normal_in_lockstep_and_a_fault_on_the_clock():
    aligner = make_aligner(timeout_s=0.5)
    add_tick(aligner, 1)
    assert aligner.find_faults(1000.0, may_rest=True) == []
    assert [f.stream for f in aligner.find_faults(1000.0, may_rest=False)] == ["inputs"]


def test_time_going_backwards_is_refused_until_restart():
    aligner = make_aligner()
    add_tick(aligner, 100)
    assert len(aligner.pop()) == 1
    for name in STREAMS:
        with pytest.raises(DataError, match=f"{name}: time went backwards"):
            aligner.add(name, 5 * STEP, make_value(name, 5), 4.0)
    assert aligner.pop() == [] and aligner.is_faulty("rgb_static")
    assert aligner.restart() is None
    add_tick(aligner, 6)
    assert [frame.stamp_ns for frame in aligner.pop()] == [6 * STEP]


def test_restart_gives_the_newest_complete_frame_again():
    aligner = make_aligner()
    assert aligner.restart() is None
    add_tick(aligner, 1)
    add_tick(aligner, 2)
    aligner.pop()
    assert aligner.restart().stamp_ns == 2 * STEP and aligner.pop() == []


def test_repeated_tick_changes_nothing():
    aligner = make_aligner()
    add_tick(aligner, 1)
    aligner.pop()
    add_tick(aligner, 1)
    assert aligner.pop() == []


def move_arm(aligner, n, x_m, image):
    """A tick with a given picture on the static camera and the hand at x over the table; whether a frame came out."""
    add_tick(aligner, n, skip=("rgb_static", POSE))
    aligner.add(POSE, n * STEP, np.array([x_m, -0.08, 0.5, 0, 0, 0]), n / 30)
    aligner.add("rgb_static", n * STEP, image, n / 30)
    return bool(aligner.pop())


IMAGE = make_value("rgb_static", 1)


def test_camera_that_repeats_while_the_arm_moves_is_frozen_and_recovers():
    aligner = make_aligner(frozen_frames=10, frozen_motion_m=0.05)
    given_frames = [move_arm(aligner, n, 0.004 * n - 0.1, IMAGE) for n in range(30)]
    assert given_frames == [n < 13 for n in range(30)], "0.05 m after 13 repeats at 4 mm each"
    assert [(f.stream, f.message.split(":")[0]) for f in aligner.find_faults(1.0, False)] == [("rgb_static", "frozen")]
    assert not move_arm(aligner, 30, 0.9, IMAGE), "leaving the table does not unfreeze it"
    assert move_arm(aligner, 31, 0.1, make_value("rgb_static", 2))
    assert aligner.find_faults(1.04, False) == []


@pytest.mark.parametrize("speed_m", [0.0, 0.02])
def test_rendered_camera_may_repeat_while_the_arm_is_still_or_out_of_sight(speed_m):
    aligner = make_aligner(frozen_frames=10, frozen_motion_m=0.05)
    assert all(move_arm(aligner, n, 0.3 * (speed_m > 0) + speed_m * n, IMAGE) for n in range(60))


def test_real_camera_may_not_repeat_at_all():
    aligner = make_aligner(frozen_frames=10, frozen_motion_m=0.0)
    assert [move_arm(aligner, n, 0.0, IMAGE) for n in range(12)] == [True] * 10 + [False] * 2
