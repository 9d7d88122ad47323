"""Stamps, arrays and poses survive the way into a message and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diwa_core.contract import rot6d
from diwa_ros.messages import from_floats, from_pose, to_float32, to_float64, to_ns, to_pose, to_time

angles = st.floats(-np.pi, np.pi)
middle_angles = st.one_of(st.floats(-1.5, 1.5), st.sampled_from([np.pi / 2, -np.pi / 2, np.pi / 2 - 1e-9, 1e-6 - np.pi / 2]))


@given(st.integers(0, 2**31 * 10**9 - 1))
def test_stamps_are_exact(stamp_ns):
    assert to_ns(to_time(stamp_ns)) == stamp_ns


@given(st.tuples(angles, middle_angles, angles))
@pytest.mark.filterwarnings("error")
def test_pose_keeps_position_and_rotation(euler):
    """Also at gimbal lock, where the angles are not unique but the rotation is, and without a warning."""
    pose = np.array([0.1, -0.2, 0.3, *euler])
    back = from_pose(to_pose(pose, 5, "world"))
    np.testing.assert_array_equal(back[:3], pose[:3])
    np.testing.assert_allclose(rot6d(back[3:]), rot6d(pose[3:]), atol=1e-6)


@pytest.mark.parametrize("quaternion", [(0, 0, 0, 0), (float("nan"), 0, 0, 1), (float("inf"), 0, 0, 1)])
def test_pose_without_a_rotation_is_nan(quaternion):
    message = to_pose(np.zeros(6), 0, "world")
    orientation = message.pose.orientation
    orientation.x, orientation.y, orientation.z, orientation.w = map(float, quaternion)
    assert np.isnan(from_pose(message)[3:]).all()


def test_arrays_are_exact_and_flat():
    values = np.random.default_rng(0).normal(size=(3, 4))
    assert np.array_equal(from_floats(to_float64(values)), values.reshape(-1))
    assert np.array_equal(from_floats(to_float32(values)), values.astype(np.float32).reshape(-1))
