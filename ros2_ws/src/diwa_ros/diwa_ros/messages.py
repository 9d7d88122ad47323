"""Filling and reading messages: stamps in integer nanoseconds, arrays without per-element cost, and the QoS of the graph."""

from __future__ import annotations

import array

import numpy as np
from builtin_interfaces.msg import Duration, Time
from geometry_msgs.msg import PoseStamped
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from scipy.spatial.transform import Rotation

NANOSECONDS = 1_000_000_000
GIMBAL_LOCK = 1e-7  # cosine of the middle angle


def reliable(depth: int) -> QoSProfile:
    """Reliable, keep-last `depth`, volatile: states and commands."""
    return QoSProfile(depth=depth, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.RELIABLE)


LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
CAMERA = qos_profile_sensor_data


def to_time(stamp_ns: int) -> Time:
    """Nanoseconds -> builtin_interfaces/Time."""
    return Time(sec=stamp_ns // NANOSECONDS, nanosec=stamp_ns % NANOSECONDS)


def to_duration(duration_ns: int) -> Duration:
    """Nanoseconds -> builtin_interfaces/Duration."""
    return Duration(sec=duration_ns // NANOSECONDS, nanosec=duration_ns % NANOSECONDS)


def to_ns(stamp: Time | Duration) -> int:
    """builtin_interfaces/Time or Duration -> nanoseconds."""
    return stamp.sec * NANOSECONDS + stamp.nanosec


def to_float32(values: np.ndarray) -> array.array:
    """Array of any shape -> what a float32[] field takes without a copy per element."""
    return array.array("f", np.ascontiguousarray(values, dtype=np.float32).tobytes())


def to_float64(values: np.ndarray) -> array.array:
    """Array of any shape -> what a float64[] field takes without a copy per element."""
    return array.array("d", np.ascontiguousarray(values, dtype=np.float64).tobytes())


def from_floats(values: array.array | np.ndarray) -> np.ndarray:
    """float32[] or float64[] field -> float array; no copy."""
    return np.asarray(values) if isinstance(values, np.ndarray) else np.frombuffer(values, dtype=values.typecode)


def to_pose(pose: np.ndarray, stamp_ns: int, frame_id: str) -> PoseStamped:
    """xyz (m) and euler xyz (rad) [6] -> PoseStamped."""
    message = PoseStamped()
    message.header.stamp = to_time(stamp_ns)
    message.header.frame_id = frame_id
    position, orientation = message.pose.position, message.pose.orientation
    position.x, position.y, position.z = (float(v) for v in pose[:3])
    x, y, z, w = Rotation.from_euler("xyz", pose[3:]).as_quat()
    orientation.x, orientation.y, orientation.z, orientation.w = float(x), float(y), float(z), float(w)
    return message


def from_pose(message: PoseStamped) -> np.ndarray:
    """PoseStamped -> xyz and euler xyz, float64 [6]. A quaternion that is not finite or zero gives NaN, never an exception."""
    position, orientation = message.pose.position, message.pose.orientation
    quaternion = np.array([orientation.x, orientation.y, orientation.z, orientation.w])
    if not np.isfinite(quaternion).all() or np.linalg.norm(quaternion) < 1e-6:
        euler = np.full(3, np.nan)
    else:
        euler = to_euler(Rotation.from_quat(quaternion).as_matrix())
    return np.concatenate([[position.x, position.y, position.z], euler])


def to_euler(matrix: np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] -> euler xyz (R = Rz Ry Rx) [3]; at gimbal lock yaw is 0, without the warning SciPy's would print."""
    level = np.hypot(matrix[0, 0], matrix[1, 0])
    pitch = np.arctan2(-matrix[2, 0], level)
    if level < GIMBAL_LOCK:
        return np.array([np.arctan2(-matrix[1, 2], matrix[1, 1]), pitch, 0.0])
    return np.array([np.arctan2(matrix[2, 1], matrix[2, 2]), pitch, np.arctan2(matrix[1, 0], matrix[0, 0])])
