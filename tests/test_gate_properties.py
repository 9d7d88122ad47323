"""Whatever comes in, what goes out keeps its speed, acceleration, jerk, workspace and joint margins."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from diwa_core.contract import Contract
from diwa_core.control.kinematics import forward, joint_step, turn_between
from diwa_core.control.limits import ARMS, PROFILES, Clamp, contract_limits, load_limits, read_limits
from diwa_core.control.motion import ActionLimiter, MotionFilter, from_coordinates, stoppable_speed, to_coordinates
from diwa_core.errors import ConfigError, GateError

STEP_S = 0.01
FR3 = ARMS["fr3"]
CENTRE = np.array([0.5, 0.0, 0.3, 0, 0, 0])
CONTRACT = Contract()

anything = st.one_of(st.floats(-2, 2), st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -1e30]))
poses = st.lists(anything, min_size=6, max_size=6).map(np.array)
near = st.lists(st.floats(-0.5, 0.5), min_size=6, max_size=6).map(lambda offset: CENTRE + np.array(offset))
rates = st.one_of(st.none(), st.lists(st.floats(-3, 3), min_size=6, max_size=6).map(np.array), poses)
asked = st.tuples(st.one_of(near, near, poses), rates, st.sampled_from(["follow", "follow", "follow", "brake"]), st.integers(1, 12))
limits_of_any_kind = st.builds(
    lambda speed, acceleration, jerk: read_limits(
        {"profile": "fr3", "max_speed_m_s": speed, "max_acceleration_m_s2": acceleration, "max_jerk_m_s3": jerk}, CONTRACT
    ),
    st.floats(0.01, 3),
    st.floats(0.05, 9),
    st.floats(1, 4500),
)


def assert_within(commanded, limits, step_s):
    """Finite differences of commanded coordinates [T, X], from rest to rest, are inside the limits; so are the coordinates."""
    padded = np.concatenate([np.repeat(commanded[:1], 4, axis=0), commanded])
    for order, bound in enumerate((limits.speed, limits.acceleration, limits.jerk), start=1):
        found = np.abs(np.diff(padded, n=order, axis=0)) / step_s**order
        assert (found <= bound * (1 + 1e-6) + 1e-13 / step_s**order).all(), (order, found.max(0), bound)
    lower, upper = limits.box
    assert (commanded >= lower - 1e-8).all() and (commanded <= upper + 1e-8).all()


@settings(max_examples=60, deadline=None)
@given(limits_of_any_kind, st.lists(asked, max_size=25))
def test_whatever_is_asked_for_the_commanded_pose_keeps_its_limits(limits, sequence):
    motion = MotionFilter(limits, STEP_S)
    motion.reset(CENTRE)
    commanded = [CENTRE]
    for target, rate, how, steps in sequence:
        for _ in range(steps):
            commanded.append(motion.brake() if how == "brake" else motion.follow(target, rate)[0])
    assert_within(np.array(commanded), limits, STEP_S)
    lower, upper = limits.box
    for _ in range(1500):
        if motion.is_resting:
            break
        commanded.append(motion.brake())
    assert motion.is_resting
    assert (np.array(commanded) >= lower - 1e-8).all() and (np.array(commanded) <= upper + 1e-8).all()


@settings(max_examples=8, deadline=None)
@given(st.lists(near, min_size=1, max_size=5))
def test_a_target_inside_the_limits_is_reached_and_not_overshot(targets):
    motion = MotionFilter(FR3, STEP_S)
    motion.reset(CENTRE)
    lower, upper = FR3.box
    for target in (np.clip(target, lower, upper) for target in targets):
        before = motion.coordinates
        path = np.array([motion.follow(target)[0] for _ in range(400)])
        np.testing.assert_allclose(path[-1], target, atol=1e-9)
        assert (path >= np.minimum(before, target) - 1e-8).all() and (path <= np.maximum(before, target) + 1e-8).all()


@pytest.mark.parametrize("room", [1e-6, 1e-3, 0.01, 0.5])
def test_the_speed_given_for_a_room_is_stopped_from_within_it(room):
    motion = MotionFilter(FR3, STEP_S)
    speed = stoppable_speed(np.full(6, room), FR3.acceleration, FR3.jerk)
    motion.reset(CENTRE)
    motion._input.current_velocity = speed.tolist()
    for _ in range(1000):
        end = motion.brake()
    np.testing.assert_allclose(end - CENTRE, room, rtol=1e-6)


@settings(max_examples=6, deadline=None)
@given(st.lists(near, min_size=1, max_size=6))
def test_joints_keep_their_margin_wherever_the_hand_is_sent(targets):
    """The arm follows the commanded pose exactly; its joints, integrated finely, never enter the margin."""
    joints = np.array([0.0, 0.2, 0.0, -2.2, 0.0, 2.4, 0.8])
    wide = read_limits(
        {"profile": "fr3", "workspace_lower_m": [-1, -1, -0.5], "workspace_upper_m": [1, 1, 1.2], "max_tilt_rad": 1.2}, CONTRACT
    )
    motion = MotionFilter(wide, STEP_S)
    start = forward_coordinates(joints, wide)
    motion.reset(start)
    lower, upper = np.array(FR3.joint_lower_rad) + 0.1, np.array(FR3.joint_upper_rad) - 0.1
    for target in targets:
        for _ in range(150):
            before = motion.coordinates
            after, _ = motion.follow(start + 2 * (target - CENTRE), joints=joints)
            joints = move_joints(joints, before, after)
            assert (joints >= lower).all() and (joints <= upper).all(), joints


def forward_coordinates(joints, limits):
    """Coordinates of the TCP for joints of the arm."""
    position, orientation, _ = forward(joints)
    return to_coordinates(position, Rotation.from_matrix(orientation), limits)


def move_joints(joints, before, after, parts=4):
    """Joints after the hand has gone from `before` to `after`, by the Jacobian in small parts."""
    turn = (Rotation.from_rotvec(after[3:]) * Rotation.from_rotvec(before[3:]).inv()).as_rotvec()
    for _ in range(parts):
        joints = joints + joint_step(forward(joints)[2], np.concatenate([after[:3] - before[:3], turn]) / parts)
    return joints


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1.2, 1.2), min_size=3, max_size=3), st.lists(st.floats(-0.1, 0.1), min_size=3, max_size=3))
def test_the_turn_between_near_orientations_is_the_true_one(start, step):
    start, end = np.array(start), np.add(start, step)
    true = (Rotation.from_rotvec(end) * Rotation.from_rotvec(start).inv()).as_rotvec()
    np.testing.assert_allclose(turn_between(start, end), true, atol=5e-4)


def test_the_jacobian_is_the_derivative_of_the_pose():
    joints = np.array([0.3, -0.4, 0.2, -1.9, 0.1, 1.7, 0.6])
    position, orientation, jacobian = forward(joints)
    for index in range(7):
        moved = joints.copy()
        moved[index] += 1e-6
        there, turned, _ = forward(moved)
        np.testing.assert_allclose((there - position) / 1e-6, jacobian[:3, index], atol=1e-5)
        spin = (turned @ orientation.T - np.eye(3)) / 1e-6
        np.testing.assert_allclose([spin[2, 1], spin[0, 2], spin[1, 0]], jacobian[3:, index], atol=1e-5)


def test_the_hand_of_the_known_pose_is_where_franka_says():
    """Joints (0, -pi/4, 0, -3pi/4, 0, pi/2, pi/4), the arm's ready pose: TCP at x 0.307 m, z 0.487 m, pointing straight down."""
    position, orientation, _ = forward(np.array([0, -np.pi / 4, 0, -3 * np.pi / 4, 0, np.pi / 2, np.pi / 4]))
    np.testing.assert_allclose(position, [0.307, 0.0, 0.487], atol=1e-3)
    np.testing.assert_allclose(orientation, np.diag([1, -1, -1]), atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(near, st.floats(-0.3, 0.3)), min_size=1, max_size=20))
def test_a_target_never_leads_the_measured_pose_by_more_than_the_leash(sequence):
    motion = MotionFilter(FR3, STEP_S)
    motion.reset(CENTRE)
    for target, offset in sequence:
        measured = CENTRE + offset * np.array([0.1, -0.1, 0.1, 0, 0, 0])
        drawn, clamps = motion._leash(target, measured)
        assert np.linalg.norm((drawn - measured)[:3]) <= 0.05 + 1e-9 and np.linalg.norm((drawn - measured)[3:]) <= 0.2 + 1e-9
        assert (clamps == Clamp.LEASH) == bool(np.abs(drawn - target).max() > 1e-9)


actions = st.lists(
    st.lists(st.floats(-1, 1, width=32), min_size=7, max_size=7).map(lambda row: np.array(row, np.float32)), min_size=1, max_size=60
)


@settings(max_examples=50, deadline=None)
@given(actions, st.sampled_from(["fer", "fr3"]))
def test_actions_of_a_simulated_arm_keep_the_limits_of_a_real_one(rows, profile):
    limits = load_limits(profile, CONTRACT)
    limiter, scale = ActionLimiter(limits, CONTRACT), np.repeat([CONTRACT.max_delta_m, CONTRACT.max_delta_rad], 3)
    limited = np.array([limiter.limit(row)[0] for row in rows])
    assert np.abs(limited).max() <= 1 and np.array_equal(limited[:, 6], np.array(rows)[:, 6])
    path = np.cumsum(limited[:, :6].astype(float) * scale, axis=0)
    for order, bound in enumerate((limits.speed, limits.acceleration, limits.jerk), start=1):
        padded = np.concatenate([np.zeros((4, 6)), path])
        rounding = 2**order * 6e-8 * scale * CONTRACT.rate_hz**order  # of float32 actions
        assert (np.abs(np.diff(padded, n=order, axis=0)) * CONTRACT.rate_hz**order <= bound + rounding).all()


@settings(max_examples=50, deadline=None)
@given(actions)
def test_the_simulation_profile_passes_every_action_bit_for_bit(rows):
    limiter = ActionLimiter(load_limits("simulation", CONTRACT), CONTRACT)
    for row in rows:
        limited, clamps = limiter.limit(row)
        assert limited is row and clamps == Clamp.NONE


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_valid_and_only_the_simulation_lets_everything_pass(profile):
    limits = load_limits(profile, CONTRACT)
    assert limits.profile == profile
    assert limits.allows_everything_of(CONTRACT) == (profile == "simulation")
    np.testing.assert_allclose(contract_limits(CONTRACT).speed, [0.6] * 3 + [1.5] * 3)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"profile": "ur5"}, "expected one of simulation, fer, fr3"),
        ({"max_speed_ms": 0.1}, "Did you mean 'max_speed_m_s'"),
        ({"profile": "fr3", "max_speed_m_s": 3.5}, r"limits.max_speed_m_s: expected at most 3, what the arm 'fr3' can do"),
        ({"profile": "fr3", "max_jerk_m_s3": 5000}, "at most 4500"),
        ({"max_speed_m_s": -1.0}, "above 0 and finite, found -1"),
        ({"max_speed_m_s": float("nan")}, "above 0 and finite, found nan"),
        ({"workspace_lower_m": [0, 0, 0]}, "workspace_lower_m and workspace_upper_m of 3 values each"),
        ({"profile": "fr3", "workspace_lower_m": [0.8, 0, 0]}, "more than 0 above"),
        ({"profile": "fr3", "joint_margin_rad": 2.0}, "more than 4 above"),
        ({"profile": "fr3", "max_yaw_rad": 3.2}, "below half a turn"),
    ],
)
def test_limits_that_make_no_sense_are_refused_by_name(values, words):
    with pytest.raises(ConfigError, match=words):
        read_limits(values, CONTRACT)


def test_an_arm_outside_its_workspace_is_named_and_not_moved():
    motion = MotionFilter(FR3, STEP_S)
    with pytest.raises(GateError, match="before the first step"):
        motion.follow(CENTRE)
    with pytest.raises(GateError, match=r"x of 0\.250 to 0\.750, found 0\.900"):
        motion.reset(np.array([0.9, *CENTRE[1:]]))
    with pytest.raises(GateError, match="finite"):
        motion.reset(np.full(6, np.nan))


def test_coordinates_of_a_pose_go_both_ways():
    limits = load_limits("fr3", CONTRACT)
    coordinates = np.array([0.4, 0.1, 0.3, 0.2, -0.3, 1.4])
    position, rotation = from_coordinates(coordinates, limits)
    np.testing.assert_allclose(to_coordinates(position, rotation, limits), coordinates, atol=1e-12)
