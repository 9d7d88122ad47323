"""Smooth robot targets from steps at the policy's rate: interpolation, then bounds on speed, acceleration and jerk.

Poses are position (m) and unit quaternion xyzw, float64 [7]. Two moving averages follow the speed limit: the mean over T1 of a path no
faster than V changes its velocity by at most 2V/T1 per second, and the mean over T2 of that its acceleration by at most 2A/T2. Means of
points in a convex workspace stay in it, nothing overshoots, and the delay is known: (T1 + T2) / 2.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from diwa_core.control.robot_config import Limits

QUATERNION_SHARE = 0.98  # of the angular limits: means of quaternions turn a little unevenly


class PoseSmoother:
    """Give it where to be and when (`aim`), ask it every period where to be now (`step`)."""

    def __init__(self, limits: Limits, period_s: float) -> None:
        """`period_s`: time between two calls of `step`."""
        self.limits, self.period_s = limits, period_s
        smoothing_s = 2 * max(limits.speed_m_s / limits.acceleration_m_s2, limits.speed_rad_s / limits.acceleration_rad_s2 / QUATERNION_SHARE)
        jerk_s = 2 * max(limits.acceleration_m_s2 / limits.jerk_m_s3, limits.acceleration_rad_s2 / limits.jerk_rad_s3 / QUATERNION_SHARE)
        self.averages = tuple(MovingAverage(max(1, math.ceil(width_s / period_s))) for width_s in (smoothing_s, jerk_s))

    @property
    def delay_s(self) -> float:
        """How far the output trails the interpolated target."""
        return sum((average.size - 1) / 2 for average in self.averages) * self.period_s

    def start(self, pose: np.ndarray) -> None:
        """Stand still at `pose` [7]."""
        self.source, self.goal, self.arrive_s = pose.copy(), pose.copy(), 0.0
        for average in self.averages:
            average.fill(pose)
        self.last = pose.copy()

    def aim(self, pose: np.ndarray, arrive_s: float) -> None:
        """Be at `pose` [7] at `arrive_s` (the clock of `step`), in a straight line from where the path is."""
        self.goal, self.arrive_s = nearest_sign(pose, self.source), arrive_s

    def step(self, now_s: float) -> tuple[np.ndarray, np.ndarray]:
        """The pose [7] for now and its velocity [6] (m/s, rad/s)."""
        steps_left = max(1.0, (self.arrive_s - now_s) / self.period_s + 1.0)
        self.source = move_towards(self.source, self.goal, 1.0 / steps_left, self.limits, self.period_s)
        pose = self.source
        for average in self.averages:
            pose = average.push(pose)
        pose = np.concatenate([pose[:3], pose[3:] / np.linalg.norm(pose[3:])])
        twist = pose_difference(self.last, pose) / self.period_s
        self.last = pose
        return pose, twist

    @property
    def is_settled(self) -> bool:
        """Whether the output has arrived at the goal."""
        return bool(np.abs(pose_difference(self.last, self.goal)).max() < 1e-6)


class MovingAverage:
    """Mean of the last `size` vectors."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.window: deque[np.ndarray] = deque(maxlen=size)

    def fill(self, value: np.ndarray) -> None:
        """As if `value` had been there for ever."""
        self.window.extend([value] * self.size)

    def push(self, value: np.ndarray) -> np.ndarray:
        """Add a vector, return the mean."""
        self.window.append(value)
        return np.mean(self.window, axis=0)


def move_towards(pose: np.ndarray, goal: np.ndarray, share: float, limits: Limits, period_s: float) -> np.ndarray:
    """`share` of the way from `pose` to `goal` [7], no further than the speed limits allow in one period."""
    step = pose_difference(pose, goal) * share
    length, angle = np.linalg.norm(step[:3]), np.linalg.norm(step[3:])
    step[:3] *= min(1.0, limits.speed_m_s * period_s / max(length, 1e-12))
    step[3:] *= min(1.0, QUATERNION_SHARE * limits.speed_rad_s * period_s / max(angle, 1e-12))
    return nearest_sign(np.concatenate([pose[:3] + step[:3], multiply(exponential(step[3:]), pose[3:])]), pose)


def pose_difference(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Translation and rotation vector [6] that lead from `start` to `end` [7], both in the common frame."""
    x, y, z, w = start[3:]
    turn = multiply(end[3:], np.array([-x, -y, -z, w]))
    turn = turn if turn[3] >= 0 else -turn
    sine = math.sqrt(float(turn[:3] @ turn[:3]))
    factor = 2.0 if sine < 1e-9 else 2.0 * math.atan2(sine, float(turn[3])) / sine
    return np.concatenate([end[:3] - start[:3], factor * turn[:3]])


def exponential(rotation_vector: np.ndarray) -> np.ndarray:
    """Rotation vector (rad) [3] -> quaternion xyzw [4]."""
    angle = math.sqrt(float(rotation_vector @ rotation_vector))
    factor = 0.5 if angle < 1e-9 else math.sin(angle / 2) / angle
    return np.array([*(factor * rotation_vector), math.cos(angle / 2)])


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Product of two quaternions xyzw: first b, then a."""
    (ax, ay, az, aw), (bx, by, bz, bw) = a, b
    return np.array(
        [
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
            aw * bw - ax * bx - ay * by - az * bz,
        ]
    )


def nearest_sign(pose: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """`pose` [7] with that sign of its quaternion that is nearer to the reference's: both mean the same rotation."""
    return pose.copy() if pose[3:] @ reference[3:] >= 0 else np.concatenate([pose[:3], -pose[3:]])
