"""Where the joints of a Franka go when its hand moves: enough to stop before a joint meets its limit.

FER and FR3 share their Denavit-Hartenberg parameters (Craig's convention, Franka's documentation). Letters: J joints (7).
"""

from __future__ import annotations

from math import cos, sin, sqrt

import numpy as np
from scipy.spatial.transform import Rotation

from diwa_core.control.limits import MotionLimits

A_M = (0.0, 0.0, 0.0, 0.0825, -0.0825, 0.0, 0.088)
D_M = (0.333, 0.0, 0.316, 0.0, 0.384, 0.0, 0.0)
ALPHA_RAD = (0.0, -np.pi / 2, np.pi / 2, np.pi / 2, -np.pi / 2, np.pi / 2, np.pi / 2)
FLANGE_M, HAND_M = 0.107, 0.1034  # flange behind joint 7, TCP of the hand behind the flange
HAND_YAW_RAD = -np.pi / 4
_COS_ALPHA, _SIN_ALPHA = np.cos(ALPHA_RAD), np.sin(ALPHA_RAD)
_LOCAL = np.zeros((7, 4, 4))  # what does not depend on the joints
_LOCAL[:, 0, 3], _LOCAL[:, 3, 3] = A_M, 1.0
_LOCAL[:, 1, 2], _LOCAL[:, 1, 3] = -_SIN_ALPHA, -_SIN_ALPHA * D_M
_LOCAL[:, 2, 2], _LOCAL[:, 2, 3] = _COS_ALPHA, _COS_ALPHA * D_M
_HAND = Rotation.from_euler("z", HAND_YAW_RAD).as_matrix()
_NEXT, _LAST = [1, 2, 0], [2, 0, 1]
DAMPING = 0.02  # of the pseudo-inverse: near a singularity joints move fast and this says so without becoming infinite
_DAMPED = DAMPING**2 * np.eye(6)
SMALL_RAD = 1e-4  # of a rotation: its Jacobian is the identity
RESERVE_RAD, RESERVE_SHARE = 0.02, 0.5  # for the straight lines that the prediction draws; the share is of the largest motion of a joint
RETREAT = 0.2  # of the largest motion of a joint, by which one inside its margin must come out
MIN_MANIPULABILITY = 0.008  # below it no prediction of the joints is worth anything; conditions of about 80
NEAR_RAD, NEAR_PARTS = 0.4, 4  # this near a margin, the way is predicted in parts


def forward(joints: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Joints rad [J] -> (TCP position m [3], orientation matrix [3, 3], Jacobian of linear and angular velocity [6, J])."""
    cosine, sine = np.cos(joints), np.sin(joints)
    local = _LOCAL.copy()  # [J, 4, 4]
    local[:, 0, 0], local[:, 0, 1] = cosine, -sine
    local[:, 1, 0], local[:, 1, 1] = sine * _COS_ALPHA, cosine * _COS_ALPHA
    local[:, 2, 0], local[:, 2, 1] = sine * _SIN_ALPHA, cosine * _SIN_ALPHA
    frames = np.empty((7, 4, 4))
    frame = frames[0] = local[0]
    for index in range(1, 7):
        frame = frames[index] = frame @ local[index]
    position = frame[:3, 3] + (FLANGE_M + HAND_M) * frame[:3, 2]
    axes, arms = frames[:, :3, 2], position - frames[:, :3, 3]
    linear = axes[:, _NEXT] * arms[:, _LAST] - axes[:, _LAST] * arms[:, _NEXT]  # cross product; np.cross takes five times as long
    return position, frame[:3, :3] @ _HAND, np.concatenate([linear, axes], axis=1).T


def joint_step(jacobian: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Joint motion [J] for a small motion of the hand [6], m and rad: damped least squares."""
    return jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + _DAMPED, step)


def manipulability(jacobian: np.ndarray) -> float:
    """How far from a singularity (Yoshikawa 1985), lengths in metres: 0.08 in the ready pose, 0 where a direction is lost."""
    return float(np.sqrt(max(np.linalg.det(jacobian @ jacobian.T), 0.0)))


def turn_between(start: np.ndarray, end: np.ndarray) -> list[float]:
    """The turn, as a rotation vector [3], from one rotation vector [3] to another that is not far away: left Jacobian of SO(3) half-way."""
    step, middle = (end - start).tolist(), ((start + end) / 2).tolist()
    angle = sqrt(sum(value * value for value in middle))
    if angle < SMALL_RAD:
        return step
    once = _cross(middle, step)
    twice = _cross(middle, once)
    first, second = (1 - cos(angle)) / angle**2, (angle - sin(angle)) / angle**3
    return [a + first * b + second * c for a, b, c in zip(step, once, twice, strict=True)]


def _cross(a: list[float], b: list[float]) -> list[float]:
    return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]


class JointGuard:
    """Says whether a motion of the hand keeps every joint its margin away from its limits, and the arm away from singularities."""

    def __init__(self, limits: MotionLimits) -> None:
        margin = limits.joint_margin_rad
        self.lower, self.upper = np.array(limits.joint_lower_rad) + margin, np.array(limits.joint_upper_rad) - margin

    def allows(self, joints: np.ndarray, start: np.ndarray, end: np.ndarray) -> bool:
        """Whether the hand may go from `start` to `end`, coordinates [6], when the joints are `joints` rad [J] at the start.

        A joint already inside its margin must come out of it: what is not clearly outwards would creep further in, error by error.
        """
        step = np.concatenate([end[:3] - start[:3], turn_between(start[3:], end[3:])])
        jacobian = forward(joints)[2]
        change, room = joint_step(jacobian, step), manipulability(jacobian)
        before, after = self.depth(joints), self.depth(joints + change)
        if max(before.max(), after.max()) < -NEAR_RAD and room > 2 * MIN_MANIPULABILITY:
            return True
        inside, reserve = before > -RESERVE_RAD, RESERVE_RAD + RESERVE_SHARE * np.abs(change).max()
        if (after > before - RETREAT * np.abs(change).max())[inside].any():
            return False
        for _ in range(NEAR_PARTS):  # a stretched elbow turns much faster than a straight line says
            joints = joints + joint_step(jacobian, step / NEAR_PARTS)
            jacobian = forward(joints)[2]
            if (self.depth(joints) > -reserve)[~inside].any() or manipulability(jacobian) < min(MIN_MANIPULABILITY, room):
                return False
        return True

    def depth(self, joints: np.ndarray) -> np.ndarray:
        """How far each joint is inside its margin, rad [J]; negative: how far away from it."""
        return np.maximum(self.lower - joints, joints - self.upper)
