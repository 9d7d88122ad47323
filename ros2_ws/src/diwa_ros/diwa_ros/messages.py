"""Filling and reading messages: stamps in integer nanoseconds, arrays without per-element cost, and the QoS of the graph."""

from __future__ import annotations

import array

import numpy as np
from builtin_interfaces.msg import Duration, Time
from geometry_msgs.msg import PoseStamped
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from scipy.spatial.transform import Rotation

from diwa_core.data.messages import NANOSECONDS
from diwa_core.data.messages import from_pose as from_pose
from diwa_core.data.messages import to_ns as to_ns


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
